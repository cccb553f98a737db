"""Logs and tracebacks: class and place, never the text of somebody else's error."""

import logging
import subprocess
import sys

import pytest

from runners.safe_log import SafeFormatter, safe_traceback
from schemas.errors import ConfigError

ROW = "Key (mrn)=(M-ZHANG-SAN)\nDETAIL: second line M-ZHANG-SAN"


def caught(outer: type[Exception] | None = None) -> Exception:
    try:
        try:
            raise ValueError(ROW)
        except ValueError as error:
            if outer is None:
                raise
            raise outer(ROW if outer is KeyError else "line 3: no such store") from error
    except (ValueError, KeyError, ConfigError) as error:
        return error


@pytest.mark.parametrize("outer", [None, KeyError])
def test_a_foreign_text_is_withheld_and_the_place_is_not(outer):
    text = safe_traceback(caught(outer))
    assert "ZHANG" not in text
    assert "DETAIL" not in text
    assert "ValueError: (text withheld)" in text
    assert "test_safe_log.py" in text
    assert "in caught" in text


def test_our_own_text_is_shown_and_its_cause_is_not():
    text = safe_traceback(caught(ConfigError))
    assert text.endswith("schemas.errors.ConfigError: line 3: no such store\n")
    assert "ZHANG" not in text


def test_a_chain_that_bites_its_tail_ends():
    error = caught()
    error.__context__ = error
    assert safe_traceback(error).count("Traceback") == 1


def test_a_log_record_is_formatted_safely():
    error = caught()
    record = logging.LogRecord(
        "x", logging.ERROR, "f", 1, "failed", (), (type(error), error, error.__traceback__)
    )
    text = SafeFormatter().format(record)
    assert "failed" in text
    assert "ZHANG" not in text


def test_a_guarded_process_says_nothing_by_any_way():
    code = f"""
import logging, traceback
from runners.safe_log import guard_process
guard_process()
try:
    raise ValueError({ROW!r})
except ValueError:
    logging.exception("one")
    logging.getLogger("apache_beam").error("two %s", traceback.format_exc())
except_text = traceback.format_exception
try:
    raise ValueError({ROW!r})
except ValueError as error:
    logging.error("three %s", except_text(error)[0])
    logging.error(error)
    logging.error("four %s", error)
raise ValueError({ROW!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("ValueError: (text withheld)") == 4
    assert done.stderr.count("ValueError (text withheld)") == 2
    assert "ZHANG" not in done.stderr
