"""The tables of the MetaGPT paper, measured again: `python -m benchmarks.paper 1`."""
