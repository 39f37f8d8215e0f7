"""A run: what decides it, and its folder."""
