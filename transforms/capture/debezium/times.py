"""Dates and times of events as canonical text: ISO, a blank for the `T`, no needless zeros.

A value without a zone keeps none: Debezium counts such a value from 1970 as if it were UTC, and
the mapping says which zone it is. What is finer than a microsecond is cut off: no canonical
time holds it.
"""

import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_DAY_US = 86_400_000_000
_DAY_MIN, _DAY_MAX = -719_162, 2_932_896  # Years 1 .. 9999.
_US_MIN, _US_MAX = _DAY_MIN * _DAY_US, (_DAY_MAX + 1) * _DAY_US - 1
PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
_ISO = re.compile(
    r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d(?::\d\d)?)(?:\.(\d{1,9}))?)?(Z|[+-]\d\d(?::?\d\d)?)?"
)
_ISO_TIME = re.compile(r"(\d\d:\d\d(?::\d\d)?)(?:\.(\d{1,9}))?(Z|[+-]\d\d(?::?\d\d)?)?")
_INFINITE = ("infinity", "-infinity")
# The usual ZonedTimestamp: its text changes in two places, for a whole column at once.
_USUAL = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{0,5}[1-9])?Z$"
_USUAL_PARTS = r"^(.{10})T(.*)Z$"


def days_text(days: int) -> str:
    """Returns the date `days` after 1970-01-01.

    Raises:
      ValueError: it is in no year from 1 to 9999, e.g. PostgreSQL's `infinity`.
    """
    if not _DAY_MIN <= days <= _DAY_MAX:
        raise ValueError("no date")
    return str(np.datetime64(days, "D"))


def instant_text(count: int, unit: str) -> str:
    """Returns the date and time `count` units after 1970, rounded down to microseconds.

    Raises:
      ValueError: it is in no year from 1 to 9999.
    """
    us = count * 1_000_000 // PER_SECOND[unit]
    if not _US_MIN <= us <= _US_MAX:
        raise ValueError("no time")
    days, rest = divmod(us, _DAY_US)
    return f"{days_text(days)} {clock_text(rest, 'us')}"


def clock_text(count: int, unit: str) -> str:
    """Returns a time of day, or a duration: MySQL's go from -838 to 838 hours."""
    us = abs(count) * 1_000_000 // PER_SECOND[unit]
    seconds, fraction = divmod(us, 1_000_000)
    minutes, second = divmod(seconds, 60)
    hour, minute = divmod(minutes, 60)
    tail = f".{fraction:06}".rstrip("0") if fraction else ""
    return f"{'-' if count < 0 else ''}{hour:02}:{minute:02}:{second:02}{tail}"


def iso_text(text: str, zoned: bool) -> str:
    """Returns an ISO date, or date and time, in canonical form.

    Args:
      zoned: its zone counts. Else it is dropped: in the ISO mode Debezium writes `Z` behind what
        has no zone.

    Raises:
      ValueError: it is not ISO.
    """
    match = _ISO.fullmatch(text)
    if match is None:
        if text in _INFINITE:
            return text
        raise ValueError("not ISO")
    date, clock, fraction, zone = match.groups()
    if clock is None:
        return date
    return f"{date} {_clock(clock, fraction)}{_zone(zone) if zoned else ''}"


def iso_clock_text(text: str, zoned: bool) -> str:
    """Returns an ISO time of day in canonical form; see `iso_text`."""
    match = _ISO_TIME.fullmatch(text)
    if match is None:
        raise ValueError("not ISO")
    clock, fraction, zone = match.groups()
    return f"{_clock(clock, fraction)}{_zone(zone) if zoned else ''}"


def _clock(clock: str, fraction: str | None) -> str:
    whole = clock if len(clock) > 5 else f"{clock}:00"
    digits = (fraction or "")[:6].rstrip("0")
    return f"{whole}.{digits}" if digits else whole


def _zone(zone: str | None) -> str:
    if zone is None:
        return ""
    if zone == "Z":
        return "+00"
    hours, minutes = zone[:3], zone[3:].lstrip(":")
    return hours if minutes in ("", "00") else f"{hours}:{minutes}"


def days_column(days: pa.Array) -> pa.Array | None:
    """Returns `days_text` of an int64 column, or None if a value has no text."""
    bounds = pc.min_max(days).as_py()
    if bounds["min"] is not None and not _DAY_MIN <= bounds["min"] <= bounds["max"] <= _DAY_MAX:
        return None
    return days.cast(pa.int32()).cast(pa.date32()).cast(pa.utf8())


def instant_column(counts: pa.Array, unit: str) -> pa.Array | None:
    """Returns `instant_text` of an int64 column, or None if a value has no text."""
    per_second = PER_SECOND[unit]
    bounds = pc.min_max(counts).as_py()
    if bounds["min"] is not None:
        low, high = (bounds[end] * 1_000_000 // per_second for end in ("min", "max"))
        if low < _US_MIN or high > _US_MAX:
            return None
    us = np.asarray(counts.fill_null(0))
    us = us // 1000 if unit == "ns" else us * (1_000_000 // per_second)
    valid = np.asarray(counts.is_valid())
    text = pa.array(us, pa.timestamp("us"), mask=~valid).cast(pa.utf8())
    return pc.replace_substring_regex(text, r"\.?0+$", "")


def zoned_column(texts: pa.Array) -> pa.Array | None:
    """Returns `iso_text` of the column if all of it is as Debezium usually writes it, else None."""
    if not pc.all(pc.match_substring_regex(texts, _USUAL)).as_py():
        return None if texts.null_count < len(texts) else texts
    return pc.replace_substring_regex(texts, _USUAL_PARTS, r"\1 \2+00")
