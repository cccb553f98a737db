"""Read what laboratories print: numbers with signs and marks, reference ranges as one text."""

import re
import typing
import unicodedata

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RESULT = re.compile(rf"([<>≤≥]=?|=)?\s*({_NUMBER})", re.ASCII)
# `-2--1` is from minus two to minus one, `3.5--5.5` has a long dash.
_RANGES = (
    re.compile(rf"({_NUMBER})\s*(?:-|~|—{{1,2}}|–|―|至)\s*({_NUMBER})", re.ASCII),
    re.compile(rf"({_NUMBER})\s*--\s*({_NUMBER})", re.ASCII),
)
_BOUND = re.compile(rf"([<>≤≥])=?\s*({_NUMBER})", re.ASCII)
_SIGNS = {"<": "<", "≤": "<=", "<=": "<=", "≤=": "<=", ">": ">", "≥": ">=", ">=": ">=", "≥=": ">="}
# As people print them, for `value_text`.
PRINTED = {"<": "<", "<=": "≤", ">": ">", ">=": "≥"}


class Result(typing.NamedTuple):
    """A result as it reads: `number` and perhaps `comparator` and `mark`, or `text` alone.

    With a comparator (FHIR's: <, <=, >=, >) `text` is there, too: as it was written.
    """

    number: str | None
    comparator: str | None
    text: str | None
    mark: str | None


def read_result(written: str, marks: typing.Collection[str] = (), trim: str = "") -> Result:
    """Returns `6.80↑` as 6.80 with its mark, `<1.0` as 1.0 with its comparator, else the text.

    Full-width digits and signs are digits and signs. Nothing else is: `3+`, `1:80`, `1,250` and
    `5.2 mmol/L` stay texts.

    Args:
      marks: what may stand at one end of a number. trim: characters that may, and mean nothing.
    """
    blanks = " \t\u3000" + trim
    text, mark = written.strip(blanks), None
    for one in sorted(marks, key=len, reverse=True):
        if text.endswith(one) or text.startswith(one):
            mark = one
            text = text.removesuffix(one) if text.endswith(one) else text.removeprefix(one)
            break
    match = _RESULT.fullmatch(unicodedata.normalize("NFKC", text.strip(blanks)))
    if match is None:
        return Result(None, None, written, None)
    comparator = _SIGNS.get(match[1] or "=")
    return Result(match[2], comparator, written if comparator else None, mark)


def read_range(written: str) -> tuple[str | None, str | None] | None:
    """Returns `(low, high)` of a reference range, None if it has numbers that are not read.

    `3.5-5.5`, `3.5～5.5`, `3.5--5.5`, `<5.2`, `≥60`; what has no digit, e.g. `阴性`, has no limits.
    """
    text = unicodedata.normalize("NFKC", written).strip()
    for form in _RANGES:
        match = form.fullmatch(text)
        if match and float(match[1]) <= float(match[2]):
            return match[1], match[2]
    if match := _BOUND.fullmatch(text):
        return (None, match[2]) if match[1] in "<≤" else (match[2], None)
    return None if any(char.isdigit() for char in text) else (None, None)
