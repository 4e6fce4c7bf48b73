"""Measurements of gpumove, beside its peers and under faults: `python -m benchmarks` runs them all (see README.md)."""
