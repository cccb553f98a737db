"""Tell the placeholder for a value that the log does not carry from a value (traps 8, 9)."""

import base64
import functools
import hashlib
import typing
import uuid

DEFAULT = "__debezium_unavailable_value"


class Placeholder:
    """The connector's `unavailable.value.placeholder` in all the forms that columns give it.

    It is itself in text, base64 or hex where the column has bytes; an array holds it as its only
    element, or, where its elements are numbers, as one number a byte; a map as key and value.
    """

    def __init__(self, text: str = DEFAULT):
        raw = text.encode()
        name_based = uuid.UUID(bytes=hashlib.md5(raw, usedforsecurity=False).digest(), version=3)
        coded = {base64.b64encode(raw).decode(), base64.urlsafe_b64encode(raw).decode()}
        self._texts = frozenset({text, raw.hex(), str(name_based)} | coded)
        self._numbers = list(raw)
        self.marks = self._texts

    def __call__(self, value: typing.Any) -> bool:
        if isinstance(value, str):
            return value in self._texts
        if isinstance(value, list):
            one = len(value) == 1 and isinstance(value[0], str) and value[0] in self._texts
            return one or value == self._numbers
        if isinstance(value, dict):
            return self._is_map(value) or self(value.get("value"))
        return False

    def _is_map(self, value: dict) -> bool:
        return len(value) == 1 and all(k in self._texts and v == k for k, v in value.items())


@functools.lru_cache(maxsize=8)
def placeholder(text: str = DEFAULT) -> Placeholder:
    """Returns the test for a connector's placeholder."""
    return Placeholder(text)
