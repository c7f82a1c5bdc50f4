"""Compare merge methods on small models trained for this: `python -m benchmarks.quality`."""
