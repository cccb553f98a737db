"""Decimals and floating point numbers of events as canonical text, exactly."""

import base64
import binascii
import re

_DIGITS_MAX = 2_000  # Oracle's NUMBER has 40, PostgreSQL's numeric may have far more.
_SCALE_MAX = 400
_FLOAT = re.compile(r"(-?)(\d+)(?:\.(\d+))?(?:[eE]([+-]?\d+))?")
_PLAIN = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?")
_BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}")
# Shortest digits go out as a plain number up to here, then with an exponent, as PostgreSQL does.
_PLAIN_EXPONENT_MIN = -4


def bytes_of(text: str) -> bytes:
    """Returns the bytes of base64 text.

    Raises:
      ValueError: it is not base64.
    """
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise ValueError("not base64") from None


def unscaled_text(number: bytes, scale: int) -> str:
    """Returns the decimal `number / 10**scale`; `number` is big-endian in two's complement.

    Raises:
      ValueError: there are no bytes, or more digits than a record of a hospital has.
    """
    if not number or len(number) > _DIGITS_MAX or abs(scale) > _SCALE_MAX:
        raise ValueError("not a decimal")
    return scaled_text(int.from_bytes(number, "big", signed=True), scale)


def scaled_text(number: int, scale: int) -> str:
    """Returns `number / 10**scale` with exactly `scale` decimal places, none if it is not positive.

    >>> scaled_text(-5, 4)
    '-0.0005'
    """
    if scale <= 0:
        return str(number * 10**-scale)
    digits = str(abs(number)).rjust(scale + 1, "0")
    return f"{'-' if number < 0 else ''}{digits[:-scale]}.{digits[-scale:]}"


def float_text(literal: str, plain_exponent_max: int) -> str:
    """Returns a float's shortest digits in PostgreSQL's form: `1e+15`, `2.25e-07`, `0.5`, `3`.

    Args:
      literal: as Java writes it; NaN and the infinities stay as they are.
      plain_exponent_max: 15 for a double, 6 for a float: from there on with an exponent.
    """
    match = _FLOAT.fullmatch(literal)
    if match is None:
        if literal in ("NaN", "Infinity", "-Infinity"):
            return literal
        raise ValueError("not a float")
    minus, whole, fraction, power = match.groups(default="")
    digits = (whole + fraction).lstrip("0")
    exponent = int(power or 0) - len(fraction) + len(digits) - len(digits.rstrip("0"))
    text = digits.rstrip("0")
    if not text:
        return f"{minus}0"
    first = len(text) + exponent - 1  # Power of ten of the first digit.
    if _PLAIN_EXPONENT_MIN <= first < plain_exponent_max:
        return minus + scaled_text(int(text), -exponent)
    mantissa = text[0] + (f".{text[1:]}" if len(text) > 1 else "")
    return f"{minus}{mantissa}e{'-' if first < 0 else '+'}{abs(first):02}"


def is_plain(text: str) -> bool:
    """Whether the text reads as a decimal number."""
    return _PLAIN.fullmatch(text) is not None


def is_base64(text: str) -> bool:
    """Whether the text reads as base64 of at least one byte."""
    return bool(text) and len(text) % 4 == 0 and _BASE64.fullmatch(text) is not None
