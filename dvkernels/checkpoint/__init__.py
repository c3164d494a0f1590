"""Come back to the same place: what a run needs to go on, saved whole or not at all."""

from dvkernels.checkpoint.checkpoint import Checkpoint as Checkpoint
from dvkernels.checkpoint.manager import CheckpointManager as CheckpointManager
from dvkernels.checkpoint.restoring import Restored as Restored
