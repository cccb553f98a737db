"""Reading: from a source's own log to change batches."""
