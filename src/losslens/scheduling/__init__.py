"""Job scheduling: submission to Slurm through submitit, and the status of runs."""
