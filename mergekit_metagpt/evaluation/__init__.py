"""Scores of models on tasks of lm-eval, and what they say about a merge."""
