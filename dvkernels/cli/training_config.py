"""Configuration of a run of ``train``, and the packages that it needs."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from dvkernels.errors import DvKernelsError

__all__: list[str] = []


@dataclass(frozen=True)
class TrainingConfig:
    """Hyperparameters of a training run; the same for every strategy."""

    epochs: int = 100
    batch_size: int = 2048  # global
    num_hidden: int = 768
    learning_rate: float = 0.05  # of the first step
    momentum: float = 0.9
    dtype: str = "float32"
    seed: int = 0


@dataclass(frozen=True)
class CheckpointConfig:
    """Folder and period of the checkpoints, and the exit status after a preemption."""

    directory: str
    every: int  # steps
    exit_code: int


class MissingExtraError(DvKernelsError, ImportError):
    """A package of the demo extra is not installed."""


def require_packages() -> None:
    """Raise if a package of the demo extra is not installed."""
    for package in ("sklearn", "rich", "threadpoolctl"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(
                f"train needs the package {package}; install the demo extra: "
                f"python -m pip install 'dvkernels[demo]'"
            )
