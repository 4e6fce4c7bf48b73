"""gpumove beside its peers: `python -m benchmarks.compare`."""
