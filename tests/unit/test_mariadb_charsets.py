"""Text of the source's character sets: as Python's codecs read it, or marked, never guessed."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from transforms.capture.mariadb import charsets
from transforms.capture.mariadb.charsets import MARK, put_text, reading, tables


def converted(text: bytes, charset: str) -> bytes:
    read = reading(charset)
    made = tables([read.codec])
    out = np.zeros(3 * len(text) + 16, np.uint8)
    buffer = np.frombuffer(text + b"\0", np.uint8)
    arrays = (made.single[0], made.double[0], made.four)
    end = put_text(buffer, 0, len(text), read.mode, *arrays, out, 0)
    return out[:end].tobytes()


def by_codec(text: bytes, codec: str) -> bytes:
    try:
        return text.decode(codec).encode()
    except UnicodeDecodeError:
        return MARK + text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("张三", "张三"),
        ("乗俓匼", "乗俓匼"),  # Their second byte is a backslash.
        ("血钾 6.80↑ μ", "血钾 6.80↑ μ"),
        ("", ""),
    ],
)
def test_gbk(text, expected):
    assert converted(text.encode("gbk"), "gbk").decode() == expected
    assert converted(text.encode("gb18030"), "gb18030").decode() == expected


def test_what_only_gb18030_has():
    text = "䶮𬭎²³µ•€⁹"
    assert converted(text.encode("gb18030"), "gbk").decode() == text


@hypothesis.given(st.text())
def test_any_text_of_gb18030(text):
    hypothesis.assume(not any(0xD800 <= ord(c) < 0xE000 for c in text))
    assert converted(text.encode("gb18030"), "gb18030").decode() == text


@hypothesis.given(st.binary() | st.lists(st.sampled_from(b"\x81\x30\xfe\x7f\xff\x80A")).map(bytes))
@hypothesis.example(b"\xd5")
@hypothesis.example(b"\x81\x30\x81")
@hypothesis.example(b"\x84\x31\xa5\x30")  # Behind the last of the four byte forms in the BMP.
@hypothesis.example(b"\xe3\x32\x9a\x36")  # Behind U+10FFFF.
def test_any_bytes_are_read_as_the_codec_does_or_marked(text):
    assert converted(text, "gbk") == by_codec(text, "gb18030")


@pytest.mark.parametrize("charset", ["latin2", "big5", "euckr", "cp932", "cp1251", "tis620"])
@hypothesis.given(text=st.binary(max_size=8))
def test_any_bytes_of_other_sets(charset, text):
    assert converted(text, charset) == by_codec(text, reading(charset).codec)


def test_latin1_is_windows_1252_and_has_no_gaps():
    every = bytes(range(256))
    assert converted(every, "latin1").decode() == "".join(
        every[i : i + 1].decode("cp1252", errors="replace").replace("\ufffd", chr(i))
        for i in range(256)
    )


def test_a_set_that_is_not_known_gives_ascii_only():
    assert converted(b"K+", "keybcs2") == b"K+"
    assert converted(b"K\x80", "keybcs2") == MARK + b"K\x80"


def test_slow_sets_are_read_by_their_codec():
    assert reading("ucs2").mode == charsets.SLOW
    assert charsets.decoded(b"\x4f\x1a", "utf_16_be") == "会".encode()
    assert charsets.decoded(b"\x4f", "utf_16_be") == MARK + b"\x4f"


def test_the_mark_is_never_valid_text():
    with pytest.raises(UnicodeDecodeError):
        MARK.decode()
