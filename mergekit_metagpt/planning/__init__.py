"""What a config asks for: read, planned by MergeKit, and its coefficients foretold."""
