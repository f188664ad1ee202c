"""Tests of what in benchmarks/ proves something."""
