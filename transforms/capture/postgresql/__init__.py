"""A PostgreSQL source: replication slots, pgoutput and snapshots (ADRs 0001, 0003, 0010)."""
