"""Reads a config, lets MergeKit plan it, and computes its coefficients in advance."""
