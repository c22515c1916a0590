"""Commits on disk: the log that holds them, folds into the shards, and what reads both: copies and verification.

Rows with uncommitted changes are not known here; they are in ``memory``.
"""
