"""Foundations of all packages: errors, files, processes, redaction. Independent of models, runs and losses."""
