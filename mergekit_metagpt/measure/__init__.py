"""Squared norms of whole models' task vectors, streamed through MergeKit's loaders."""
