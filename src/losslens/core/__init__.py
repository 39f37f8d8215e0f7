"""What every room stands on: errors, files, processes, redaction. Knows nothing of models, runs or losses."""
