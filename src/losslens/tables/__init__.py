"""Reads and formats the tables of an analysis, for the report and W&B."""
