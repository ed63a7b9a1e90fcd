"""Runs as jobs of a Slurm cluster: profiles, scripts, chains of jobs, and how far they are."""
