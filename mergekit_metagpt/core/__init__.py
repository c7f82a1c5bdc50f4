"""The method in numbers and tensors: coefficients, kernels, directions; no files, no models."""
