"""Checkpoints: a program's objects, saved whole or not at all, restored by any number of workers.

Imports: communicators, context, devices, errors, html_table, profiler, pytree, replicas,
thread_frames, threads, user_errors, values, variables.
"""

from dvkernels.checkpoint.checkpoint import Checkpoint as Checkpoint
from dvkernels.checkpoint.manager import CheckpointManager as CheckpointManager
from dvkernels.checkpoint.restoring.restore import Restored as Restored
