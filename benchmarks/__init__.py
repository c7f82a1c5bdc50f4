"""What is measured, side by side: run from the repository's root, `python -m benchmarks.speed`."""
