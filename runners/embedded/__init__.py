"""A world to try everything in: real PostgreSQL campuses and believable traffic."""
