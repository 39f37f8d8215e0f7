"""Weights & Biases: what is sent there, and how."""
