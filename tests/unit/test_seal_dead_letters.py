"""Dead letters: sealed with a referenced key, opened only with it, altered never."""

import base64
import dataclasses
import errno
import os
import pickle
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.batches import Op, Reject
from schemas.errors import ConfigError, DeadLetterDamagedError
from schemas.positions import Position
from transforms.seal_dead_letters import Sealer, letter_id_of, make_key

LINK = "main>primary"
KEY = bytes(range(32))
REJECT = Reject(
    src_table="lis.result",
    position=Position(0x16B374D848, 3),
    op=int(Op.UPDATE),
    commit_us=1_772_352_000_000_000,
    reason="number",
    column="val_num",
    row={"mrn": "MRN-778899", "item_name": "钾", "val_num": "six", "unit": None},
)


def sealer_of(monkeypatch, key: bytes = KEY, name: str = "TEST_KEY", **more) -> Sealer:
    monkeypatch.setenv(name, base64.b64encode(key).decode())
    return Sealer(f"env:{name}", **more)


def test_a_letter_opens_to_what_was_sealed(monkeypatch):
    sealer = sealer_of(monkeypatch)
    letter = sealer.seal(REJECT, LINK)
    assert sealer.open(letter) == REJECT
    assert isinstance(sealer.open(letter).position, Position)
    assert (letter.src_table, letter.lsn, letter.seq) == ("lis.result", *REJECT.position)
    assert (letter.reason, letter.column, letter.op) == ("number", "val_num", Op.UPDATE)


def test_nothing_of_the_row_stands_in_the_open(monkeypatch):
    letter = sealer_of(monkeypatch).seal(REJECT, LINK)
    for value in ("MRN-778899", "钾", "six"):
        assert value.encode() not in letter.sealed
        assert value not in repr(letter)


def test_golden_letter(monkeypatch):
    """One letter, byte by byte: format 01, nonce 000102.., then ciphertext and 16-byte tag."""
    sealer = sealer_of(monkeypatch, random_bytes=lambda n: bytes(range(n)))
    letter = sealer.seal(REJECT, LINK)
    assert letter.letter_id == "1cfd945e3756fa12181a0ad1370ce38a5c20c27439b3149be6e30f8a174a3505"
    assert letter.key_id == "02f3f75ca7265df5"
    assert letter.sealed[:13] == bytes([1]) + bytes(range(12))
    assert letter.sealed[-16:].hex() == "2a13addcda8e0feb8fe6a804bb0275ef"


def test_the_id_repeats_and_the_ciphertext_does_not(monkeypatch):
    sealer = sealer_of(monkeypatch)
    one, two = sealer.seal(REJECT, LINK), sealer.seal(REJECT, LINK)
    assert one.letter_id == two.letter_id
    assert one.sealed != two.sealed
    other_reason = dataclasses.replace(REJECT, reason="unit", row={})
    assert sealer.seal(other_reason, LINK).letter_id == one.letter_id


def test_the_id_tells_places_apart():
    place = Position(5, 1)
    ids = {
        letter_id_of("a>b", "t", place, Op.INSERT),
        letter_id_of("a>c", "t", place, Op.INSERT),
        letter_id_of("a>b", "u", place, Op.INSERT),
        letter_id_of("a>b", "t", Position(5, 2), Op.INSERT),
        letter_id_of("a>b", "t", Position(51, 1), Op.INSERT),
        letter_id_of("a>b", "t", place, Op.DELETE),
        letter_id_of("a>b", "t", place, Op.INSERT, "conflict"),
    }
    assert len(ids) == 7


@pytest.mark.parametrize(
    "change",
    [
        {"letter_id": "0" * 64},
        {"reason": "other"},
        {"src_table": "his.patient"},
        {"lsn": 1},
        {"seq": 4},
        {"op": int(Op.INSERT)},
        {"commit_us": 0},
        {"column": "unit"},
        {"sealed": b""},
        {"sealed": b"\x01short"},
        {"sealed": b"\x02" + bytes(60)},
    ],
)
def test_an_altered_letter_is_not_opened(monkeypatch, change):
    sealer = sealer_of(monkeypatch)
    letter = dataclasses.replace(sealer.seal(REJECT, LINK), **change)
    with pytest.raises(DeadLetterDamagedError) as caught:
        sealer.open(letter)
    assert not caught.value.args


@given(st.data())
def test_a_flipped_bit_is_noticed(data):
    with pytest.MonkeyPatch.context() as monkeypatch:
        sealer = sealer_of(monkeypatch)
        letter = sealer.seal(REJECT, LINK)
        sealed = bytearray(letter.sealed)
        bit = data.draw(st.integers(0, len(sealed) * 8 - 1))
        sealed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DeadLetterDamagedError):
            sealer.open(dataclasses.replace(letter, sealed=bytes(sealed)))


# Lone surrogates too: that is what undecodable bytes of an old campus may look like.
ROWS = st.dictionaries(
    st.text(max_size=8), st.none() | st.text(st.characters(), max_size=30), max_size=5
)


@given(ROWS, st.integers(0, 2**62), st.integers(0, 2**31 - 1))
def test_every_row_comes_back(row, lsn, seq):
    with pytest.MonkeyPatch.context() as monkeypatch:
        sealer = sealer_of(monkeypatch)
        reject = dataclasses.replace(REJECT, row=row, position=Position(lsn, seq))
        assert sealer.open(sealer.seal(reject, LINK)) == reject


def test_the_wrong_key_is_told_by_its_id(monkeypatch):
    right = sealer_of(monkeypatch)
    wrong = sealer_of(monkeypatch, bytes(32), "OTHER_KEY")
    letter = right.seal(REJECT, LINK)
    with pytest.raises(ConfigError) as caught:
        wrong.open(letter)
    assert right.key_id in str(caught.value)
    assert wrong.key_id in str(caught.value)
    assert "Remedy" in str(caught.value)


def test_the_key_is_in_no_repr_and_no_pickle(monkeypatch):
    sealer = sealer_of(monkeypatch)
    letter = sealer.seal(REJECT, LINK)  # The key has been read by now.
    assert repr(sealer) == "Sealer('env:TEST_KEY')"
    stored = pickle.dumps(sealer)
    assert KEY not in stored
    assert base64.b64encode(KEY) not in stored
    assert pickle.loads(stored).open(letter) == REJECT


def test_a_file_is_found_from_its_base(tmp_path):
    make_key(tmp_path / "dead-letter.key")
    letter = Sealer("file:dead-letter.key", tmp_path).seal(REJECT, LINK)
    assert Sealer(f"file:{tmp_path}/dead-letter.key").open(letter) == REJECT


def test_make_key_is_private_and_never_overwrites(tmp_path):
    path = tmp_path / "dead-letter.key"
    make_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    content = path.read_bytes()
    assert len(base64.b64decode(content)) == 32
    with pytest.raises(ConfigError, match="exists already"):
        make_key(path)
    assert path.read_bytes() == content
    with pytest.raises(ConfigError, match="Remedy"):
        make_key(tmp_path / "none" / "key")


def test_a_key_that_finds_no_room_leaves_no_file(tmp_path, monkeypatch):
    path = tmp_path / "dead-letter.key"

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match=r"No space left on device\. Remedy: make room"):
            make_key(path)
    assert list(tmp_path.iterdir()) == []
    make_key(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_key_file_is_told_with_the_command_that_makes_one(tmp_path):
    with pytest.raises(ConfigError) as caught:
        Sealer("file:dead-letter.key", tmp_path).seal(REJECT, LINK)
    assert "head -c 32 /dev/urandom | base64" in str(caught.value)
    assert str(tmp_path / "dead-letter.key") in str(caught.value)


def test_a_key_that_everybody_may_read_is_refused(tmp_path):
    path = tmp_path / "dead-letter.key"
    make_key(path)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        Sealer(f"file:{path}").seal(REJECT, LINK)


@pytest.mark.parametrize("content", [b"", b"c2hvcnQ=", b"not base64 !!", b"\xff\xfe"])
def test_a_file_that_holds_no_key_is_refused_without_repeating_it(tmp_path, content):
    path = tmp_path / "dead-letter.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="32 bytes in base64") as caught:
        Sealer(f"file:{path}").seal(REJECT, LINK)
    assert "c2hvcnQ" not in str(caught.value)


def test_a_missing_variable_is_told(monkeypatch):
    monkeypatch.delenv("ABSENT_KEY", raising=False)
    with pytest.raises(ConfigError, match="export ABSENT_KEY"):
        Sealer("env:ABSENT_KEY").seal(REJECT, LINK)


def test_a_key_given_in_place_of_a_reference_is_not_repeated():
    text = base64.b64encode(KEY).decode()
    with pytest.raises(ConfigError) as caught:
        Sealer(text)
    assert text not in str(caught.value)
