"""Worker that saves and loads arrays with safetensors, NumPy, PyTorch or Orbax.

Started as ``checkpoint_worker.py NUM_RANKS LIBRARY``. The files of every library are synced in the
same way, and the loaded arrays are compared with the saved ones.
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
    """Sync a folder and all files in it to the disk."""
    for each in [path, *path.rglob("*")]:
        descriptor = os.open(each, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


class Safetensors:
    """Saving and loading by safetensors: one file."""

    def __init__(self) -> None:
        import safetensors.numpy

        self.module = safetensors.numpy

    def save(self, arrays, folder):
        self.module.save_file(arrays, folder / "arrays.safetensors")

    def restore(self, folder):
        return self.module.load_file(folder / "arrays.safetensors")


class Savez:
    """Saving and loading by ``numpy.savez``: one uncompressed zip file."""

    def save(self, arrays, folder):
        np.savez(folder / "arrays.npz", **arrays)

    def restore(self, folder):
        with np.load(folder / "arrays.npz") as archive:
            return {name: archive[name] for name in archive}


class Torch:
    """Saving and loading by PyTorch: one zip file of tensors that share memory with the arrays."""

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
    """Saving and loading by Orbax: a folder of chunks."""

    def __init__(self) -> None:
        import orbax.checkpoint

        self.checkpointer = orbax.checkpoint.PyTreeCheckpointer()

    def save(self, arrays, folder):
        self.checkpointer.save(folder / "arrays", arrays)

    def restore(self, folder):
        return self.checkpointer.restore(folder / "arrays")


LIBRARIES = {"safetensors": Safetensors, "savez": Savez, "torch": Torch, "orbax": Orbax}


if __name__ == "__main__":
    answer = protocol.claim_stdout()
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
            started = time.perf_counter()
            folder.mkdir()
            library.save(arrays, folder)
            sync(folder)
            seconds = time.perf_counter() - started
        else:
            started = time.perf_counter()
            loaded = library.restore(folder)
            seconds = time.perf_counter() - started
            wrong = sum(
                int(np.count_nonzero(np.asarray(loaded[key]) != array))
                for key, array in arrays.items()
            )
            del loaded
        answer(seconds=seconds, wrong=wrong, note="")
