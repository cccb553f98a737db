"""Signed reports: any change shows, the key stays secret, records are named for its holder only."""

import base64
import json
import pickle

import pytest

from schemas.errors import ConfigError
from transforms.sign_report import ReportDamaged, ReportKey, fingerprint, verify

REPORT = {"version": 1, "sound": True, "links": [{"table": "patient", "keys": ["missing:ab"]}]}


@pytest.fixture
def key(tmp_path) -> ReportKey:
    made = ReportKey(f"file:{tmp_path / 'report.key'}")
    assert made.make() and not made.make()
    return made


def test_a_report_is_as_it_was_signed(key):
    signed = json.loads(json.dumps(key.sign(REPORT)))
    assert verify(signed) == (REPORT, key.public)
    assert len(fingerprint(key.public)) == 16


@pytest.mark.parametrize("change", ["content", "signature", "algorithm", "key", "nothing there"])
def test_any_change_shows(key, change):
    signed = json.loads(json.dumps(key.sign(REPORT)))
    if change == "content":
        signed["report"]["links"][0]["table"] = "visit"
    elif change == "signature":
        value = bytearray(base64.b64decode(signed["signature"]["value"]))
        value[5] ^= 1
        signed["signature"]["value"] = base64.b64encode(value).decode()
    elif change == "algorithm":
        signed["signature"]["algorithm"] = "none"
    elif change == "key":
        signed["signature"]["public_key"] = base64.b64encode(bytes(32)).decode()
    else:
        signed = [1]
    with pytest.raises(ReportDamaged):
        verify(signed)


def test_the_key_is_in_no_repr_and_no_pickle_and_must_be_one(key, tmp_path, monkeypatch):
    secret = base64.b64decode((tmp_path / "report.key").read_text())
    assert secret not in pickle.dumps(key) and secret.hex() not in repr(key)
    assert pickle.loads(pickle.dumps(key)).public == key.public
    monkeypatch.setenv("REPORT_KEY", base64.b64encode(secret).decode())
    assert ReportKey("env:REPORT_KEY").public == key.public
    monkeypatch.setenv("REPORT_KEY", "short")
    for reference in ("env:REPORT_KEY", "env:NOT_THERE", f"file:{tmp_path / 'absent'}"):
        with pytest.raises(ConfigError):
            _ = ReportKey(reference).public
    (tmp_path / "report.key").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod"):
        _ = ReportKey(f"file:{tmp_path / 'report.key'}").public


def test_a_record_is_named_for_the_holder_of_the_key_only(key, tmp_path):
    other = ReportKey(f"file:{tmp_path / 'other.key'}")
    other.make()
    name = key.name_of("main", "patient", "M1")
    assert name == key.name_of("main", "patient", "M1") and len(name) == 16
    assert (
        len({name, other.name_of("main", "patient", "M1"), key.name_of("east", "patient", "M1")})
        == 3
    )
