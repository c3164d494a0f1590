"""The launcher: starts the workers of a job by mpiexec or srun, supervises them and cleans up.

Imports: checkpoint, cluster, communicators, deadlines, devices, errors.
"""
