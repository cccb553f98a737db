"""Several stores, several clients, a bad network: the real merge code against its histories."""
