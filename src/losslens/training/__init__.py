"""Training one run: the rows in their order, two trainers, and what is written while they work."""
