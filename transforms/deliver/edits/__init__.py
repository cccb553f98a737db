"""Edits that clients make at stores: stamped, carried, joined (ADRs 0017, 0019)."""
