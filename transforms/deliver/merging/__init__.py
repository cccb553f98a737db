"""Merge batches into a store's tables, guarded by position (ADR 0008)."""
