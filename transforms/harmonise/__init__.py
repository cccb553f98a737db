"""Harmonise decoded changes: a campus's tables and codes become the canonical ones."""

from transforms.harmonise.harmoniser import Harmonised, Harmoniser
from transforms.harmonise.lookups import Lookups
from transforms.harmonise.rows import Note, UnknownCode

__all__ = ["Harmonised", "Harmoniser", "Lookups", "Note", "UnknownCode"]
