"""Writing: from change batches to rows and ledger of a consult store, in one transaction."""
