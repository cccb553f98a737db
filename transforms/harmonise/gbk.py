"""What a GBK store can hold, and what is written there instead of what it cannot."""

import dataclasses

import numba
import numpy as np
import pyarrow as pa

from transforms import parse_text
from transforms.harmonise.damaged_text import code_point, gbk_codes

MISSING = "〓"  # The printer's sign for a character that the case lacks; GBK has it.
# Checked: each reads as the character before it, and GBK has every character of it.
SUBSTITUTES = {
    "\u00b5": "\u03bc",  # Micro sign to the Greek letter.
    "⁰": "^0", "¹": "^1", "²": "^2", "³": "^3", "⁴": "^4", "⁵": "^5", "⁶": "^6", "⁷": "^7",
    "⁸": "^8", "⁹": "^9", "⁺": "^+", "⁻": "^-",
    "₀": "0", "₁": "1", "₂": "2", "₃": "3", "₄": "4", "₅": "5", "₆": "6", "₇": "7", "₈": "8",
    "₉": "9", "⁃": "-",
    "•": "·", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u2011": "-", "−": "-",
    "€": "EUR", "£": "GBP", "®": "(R)", "©": "(C)", "™": "(TM)",
    "½": "1/2", "¼": "1/4", "¾": "3/4", "⩽": "≤", "⩾": "≥", "㎍": "μg", "ℓ": "l",
    "ö": "o", "ä": "a", "ñ": "n", "ç": "c", "ø": "o",
    # Nobody sees these: a name with a mark of what is missing would be another name.
    "\u200b": "", "\u200c": "", "\u200d": "", "\u2060": "", "\ufeff": "", "\u200e": "",
    "\u200f": "", "\ufe0e": "", "\ufe0f": "", "\u00ad": "",
}  # fmt: skip
_SUPERSCRIPTS = frozenset("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻")


@dataclasses.dataclass(frozen=True)
class ForGbk:
    """A text as a GBK store gets it.

    Attributes:
      text: encodes to GBK.
      substituted: characters of the original that read the same in other words.
      lost: characters that nothing stands for: each is `MISSING` in `text`. A person is told.
    """

    text: str
    substituted: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()

    @property
    def faithful(self) -> bool:
        """Whether nothing is lost."""
        return not self.lost


def fits_gbk(array: pa.Array) -> np.ndarray:
    """Returns whether GBK holds every text as it is (bool[n]); a null fits."""
    offsets, data, valid = parse_text.text_buffers(array)
    fits = np.ones(len(array), np.bool_)
    _fits_kernel(offsets, data, valid, gbk_codes(), fits)
    return fits


def for_gbk(text: str) -> ForGbk:
    """Returns `text` for a GBK store: by substitutes that read the same, or visibly incomplete.

    A rare character of a name becomes `MISSING`, never `?`: the campus's staff see that it is
    not the name, and `lost` says which character it was.
    """
    codes = gbk_codes()
    if all(ord(char) < 128 or (ord(char) < 65536 and codes[ord(char)]) for char in text):
        return ForGbk(text)
    parts: list[str] = []
    substituted, lost = [], []
    raised = False
    for char in text:
        if ord(char) < 128 or (ord(char) < 65536 and codes[ord(char)]):
            parts.append(char)
            raised = False
        elif char in SUBSTITUTES:
            instead = SUBSTITUTES[char]
            # One caret for a whole exponent: 10⁻¹² is 10^-12.
            parts.append(instead[1:] if raised and char in _SUPERSCRIPTS else instead)
            substituted.append(char)
            raised = char in _SUPERSCRIPTS
        else:
            parts.append(MISSING)
            lost.append(char)
            raised = False
    return ForGbk("".join(parts), tuple(substituted), tuple(lost))


@numba.njit(nogil=True, cache=True)
def _fits_kernel(offsets, data, valid, codes, fits):
    for i in range(len(fits)):
        if len(valid) and not valid[i]:
            continue
        p, end = offsets[i], offsets[i + 1]
        while p < end:
            point, size = code_point(data, p)
            if point >= 128 and (point >= 65536 or codes[point] == 0):
                fits[i] = False
                break
            p += size
