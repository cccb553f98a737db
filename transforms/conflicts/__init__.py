"""Concurrent edits of one record: joined without loss, settled by rules or left to a person."""
