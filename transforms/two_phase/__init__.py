"""All or none at several stores: two-phase commit with presumed abort (ADR 0022)."""
