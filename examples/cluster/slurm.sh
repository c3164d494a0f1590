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
# Two minutes before the time is up this script gets SIGTERM, and hands it on to all workers: time
# for a checkpoint.
#SBATCH --signal=B:TERM@120
# A node that fails, or an urgent job, puts this one back into the queue.
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# The environment that dvkernels, mpi4py and one MPI are installed in, the same path on all nodes.
# Checkpoints go to a folder that all nodes see as well: the workers save together.
PYTHON="${PYTHON:-.venv/bin/python}"

# Where all nodes see it, compiled code is compiled once: fill it with "$PYTHON -m dvkernels compile".
export NUMBA_CACHE_DIR="${NUMBA_CACHE_DIR:-$PWD/.numba-cache}"

# Which attempt this is, for programs that look for a checkpoint; launch counts on from here.
export DVKERNELS_ATTEMPT="${SLURM_RESTART_COUNT:-0}"

# The number of workers is that of the job's tasks, their threads are the tasks' cores, and Slurm
# tells mpiexec the nodes.
# --max-restarts: a job that fails by itself starts again here, without queueing.
# Where mpiexec may not be used, and with Open MPI always, let srun start the workers, with the
# plugin that your MPI speaks (srun --mpi=list), pmi2 for MPICH and pmix for Open MPI:
#     --launcher srun --launcher-option=--mpi=pmix
"$PYTHON" -m dvkernels launch --bind --grace 110 --max-restarts 2 "$@" &
launch=$!
trap 'told=yes; kill -TERM "$launch"' TERM
told=
status=0
wait "$launch" || status=$?
if [ "$told" ]; then # the signal ended the waiting, and not launch
    status=0
    wait "$launch" || status=$?
fi

# A PreemptionHandler was told to stop, has saved, and left with 42: back into the queue, to go on
# from there. But not if the job was cancelled, or its time is up for good.
if [ "$status" = 42 ] && [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
