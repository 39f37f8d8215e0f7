"""Analysis of finished runs: gathers the cohort, measures it (cached) and writes the tables."""
