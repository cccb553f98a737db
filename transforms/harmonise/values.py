"""Single values by rule: codes, normal forms of text, canonical types."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.mappings import CodeList, ColumnRule
from schemas.tables import Kind
from transforms import parse_text
from transforms.harmonise.columns import codes_of, joined
from transforms.harmonise.rows import Rows, all_or_refused

_ICD10 = r"^([A-Z][0-9][0-9A-Z])(.+)$"


def combine(rows: Rows, rule: ColumnRule) -> tuple[pa.Array, np.ndarray | None]:
    """The text of a rule's source columns, and where it is unchanged."""
    parts = [rows[column] for column in rule.source]
    if len(parts) == 1:
        return parts[0], rows.unchanged(rule.source[0])
    unchanged = all_or_refused(rows, rule.source)
    if rule.join is None:
        return pc.coalesce(*parts), unchanged
    return joined(parts, rule.join), unchanged


def parse(text: pa.Array, kind: Kind, formats: tuple[str, ...], zone: int):
    """Returns `(array, bad)` of a canonical kind; bad is None where nothing can be."""
    if kind is Kind.INT:
        return parse_text.parse_int(text)
    if kind is Kind.DECIMAL:
        return parse_text.parse_decimal(text)
    if kind is Kind.BOOL:
        return parse_text.parse_bool(text)
    if kind is Kind.DATE:
        return parse_text.parse_date(text, formats)
    if kind is Kind.TIME:
        return parse_text.parse_time(text, formats, zone)
    return text, None


def recode(
    rows: Rows, text: pa.Array, names: tuple[str, CodeList], column: str, canonical: str
) -> pa.Array:
    """Campus codes to canonical ones; a code that is not listed is counted and remarked on."""
    name, codes = names
    encoded = text.dictionary_encode()
    written = encoded.dictionary.to_pylist()
    unknown = np.array([code not in codes.codes for code in written] + [False])
    if unknown.any():
        places = codes_of(encoded)
        mask = unknown[places]
        if rows.deletes is not None:
            mask &= ~rows.deletes  # What is taken away needs no dictionary.
        times = np.bincount(places[mask], minlength=len(written))
        rows.unknown_codes(column, name, {written[i]: int(times[i]) for i in times.nonzero()[0]})
        rows.remark(column, canonical, "unknown_code", mask, text)
    keep = codes.unknown == "keep"
    values = [codes.codes.get(code, code if keep else None) for code in written]
    return text if values == written else pa.array(values, pa.utf8()).take(encoded.indices)


def normal_text(form: str, texts: pa.Array) -> pa.Array:
    if form == "lower":
        return pc.utf8_lower(texts)
    if form == "upper":
        return pc.utf8_upper(texts)
    texts = pc.utf8_trim_whitespace(texts)
    if form == "icd10":
        texts = pc.replace_substring(pc.utf8_upper(texts), ".", "")
        texts = pc.replace_substring_regex(texts, _ICD10, r"\1.\2")
    return texts
