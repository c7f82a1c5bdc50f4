"""Benchmarks. Run them from the repository's root, such as `python -m benchmarks.speed`."""
