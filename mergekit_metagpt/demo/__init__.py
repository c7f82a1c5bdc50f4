"""Small models that are trained on the spot, and merges of them."""
