"""Sets of rows that a delivery has written to several stores, all or none (ADR 0026)."""
