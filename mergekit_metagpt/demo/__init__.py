"""Small models that the demo trains itself, and merges of them."""
