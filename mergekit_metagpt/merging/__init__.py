"""Merges that appear whole or not at all, with a record."""
