"""What happens to the data: one verb a file, a pure rule with a thin Beam shell around it."""
