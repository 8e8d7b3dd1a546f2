"""Chains of jobs on a SLURM cluster: data, pretraining, fine-tuning, evaluation. Runs the stages, imports none."""
