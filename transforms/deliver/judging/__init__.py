"""Judge the rows in a store: their quality, and which are one patient's (ADRs 0015, 0016)."""
