#!/usr/bin/env bash
# Train on two nodes of a Slurm cluster, two workers on each, eight cores a worker:
#
#     sbatch examples/cluster/slurm.sh train.py --epochs 10
#
#SBATCH --job-name=dvkernels
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log
# Two minutes before the time is up this shell, and no other process, gets SIGTERM. It has become
# the launcher by then (see `exec` below), which hands it on to all workers: time for a checkpoint.
#SBATCH --signal=B:TERM@120
# A node that fails, or an urgent job, puts this one back into the queue.
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# The environment that dvkernels, mpi4py and one MPI are installed in, the same path on all nodes.
# Checkpoints go to a folder that all nodes see as well: the workers save together.
PYTHON="${PYTHON:-.venv/bin/python}"

# Which attempt this is, for programs that look for a checkpoint; launch counts on from here.
export DVKERNELS_ATTEMPT="${SLURM_RESTART_COUNT:-0}"

# The number of workers is that of the job's tasks, and Slurm tells mpiexec the nodes.
# --max-restarts: a job that fails by itself starts again here, without queueing.
# Where mpiexec may not be used, let srun start the workers, with the plugin that your MPI speaks
# (srun --mpi=list):  --launcher srun --launcher-option=--mpi=pmix
exec "$PYTHON" -m dvkernels launch \
    --threads-per-worker "${SLURM_CPUS_PER_TASK:-1}" --bind \
    --grace 110 --max-restarts 2 \
    "$@"
