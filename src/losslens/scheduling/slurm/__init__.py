"""Submission of jobs to Slurm, and their execution on the nodes."""
