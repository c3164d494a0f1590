"""Saving and loading arrays with safetensors, NumPy, PyTorch or Orbax: one of them a process.

Started as ``checkpoint_worker.py NUM_RANKS LIBRARY``. Every library's files are synced in the same
way, and what it loads is compared with what was saved.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import checkpoint_data
import numpy as np
import protocol


def sync(path: Path) -> None:
    """Make all files of a folder durable, and the folder."""
    for held in [path, *path.rglob("*")]:
        descriptor = os.open(held, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


class Safetensors:
    """One file."""

    def __init__(self) -> None:
        import safetensors.numpy

        self.module = safetensors.numpy

    def save(self, arrays, folder):
        self.module.save_file(arrays, folder / "arrays.safetensors")

    def restore(self, folder):
        return self.module.load_file(folder / "arrays.safetensors")


class Savez:
    """One zip file, not compressed."""

    def save(self, arrays, folder):
        np.savez(folder / "arrays.npz", **arrays)

    def restore(self, folder):
        with np.load(folder / "arrays.npz") as held:
            return {name: held[name] for name in held}


class Torch:
    """One zip file of tensors that share their memory with the arrays."""

    def __init__(self) -> None:
        import torch

        self.torch = torch

    def save(self, arrays, folder):
        tensors = {name: self.torch.from_numpy(array) for name, array in arrays.items()}
        self.torch.save(tensors, folder / "arrays.pt")

    def restore(self, folder):
        return {
            name: tensor.numpy() for name, tensor in self.torch.load(folder / "arrays.pt").items()
        }


class Orbax:
    """A folder of chunks."""

    def __init__(self) -> None:
        import orbax.checkpoint

        self.checkpointer = orbax.checkpoint.PyTreeCheckpointer()

    def save(self, arrays, folder):
        self.checkpointer.save(folder / "arrays", arrays)

    def restore(self, folder):
        return self.checkpointer.restore(folder / "arrays")


LIBRARIES = {"safetensors": Safetensors, "savez": Savez, "torch": Torch, "orbax": Orbax}


if __name__ == "__main__":
    answer = protocol.answers_go_to()
    name = sys.argv[2]
    library = LIBRARIES[name]()
    arrays = None
    for command in protocol.commands():
        if arrays is None:
            arrays = checkpoint_data.arrays(command["nbytes"])
        folder = Path(command["folder"]) / name
        wrong = 0
        if command["case"] == "save":
            shutil.rmtree(folder, ignore_errors=True)
            began = time.perf_counter()
            folder.mkdir()
            library.save(arrays, folder)
            sync(folder)
            seconds = time.perf_counter() - began
        else:
            began = time.perf_counter()
            loaded = library.restore(folder)
            seconds = time.perf_counter() - began
            wrong = sum(
                int(np.count_nonzero(np.asarray(loaded[key]) != array))
                for key, array in arrays.items()
            )
            del loaded
        answer(seconds=seconds, wrong=wrong, note="")
