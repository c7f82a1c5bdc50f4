"""Test whether the paper's assumptions hold for the user's own models."""
