"""Completions of a model in this process, or of a server."""
