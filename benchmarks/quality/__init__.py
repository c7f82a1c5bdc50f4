"""Which merge is best, on models trained for it: `python -m benchmarks.quality`."""
