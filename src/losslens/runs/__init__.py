"""Runs: their specification, identity and folder on disk."""
