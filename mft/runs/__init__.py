"""Runs that are over or under way: read back, listed, compared."""
