"""Compare merges of a real language model: `python -m benchmarks.language_model`."""
