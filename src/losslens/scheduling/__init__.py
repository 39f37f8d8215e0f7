"""Jobs on Slurm: what is submitted, as which code, and what became of it. submitit and Slurm do the work."""
