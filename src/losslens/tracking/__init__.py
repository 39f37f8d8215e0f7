"""Logging to Weights & Biases: runs, artifacts, analyses, dashboards and syncing of offline runs."""
