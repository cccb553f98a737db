"""What the data is: canonical tables, change batches, mappings, errors, configuration."""
