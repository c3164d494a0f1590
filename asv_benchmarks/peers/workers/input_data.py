"""Data of the input benchmark, the same for all libraries.

Runs without dvkernels: workers run in environments of their own.
"""

from __future__ import annotations

import os
import zlib
from typing import Any

import numpy as np

__all__ = ["BATCH", "Blobs", "Rows", "decoded", "labelled", "rows"]

BATCH = 64
_ROWS, _WIDTH = 100_000, 64
_BLOBS, _NUMBERS = 3_000, 4_096


def rows() -> tuple[Any, Any]:
    """Return random float32 rows of shape (100000, 64), and a label for each: its index."""
    rng = np.random.default_rng(1)
    return rng.standard_normal((_ROWS, _WIDTH), dtype=np.float32), np.arange(_ROWS)


def labelled(case: str, folder: str) -> tuple[Any, Any]:
    """Return rows and labels, the rows in memory or mapped from a file in ``folder``."""
    if case == "arrays":
        return rows()
    path = os.path.join(folder, "rows.npy")
    if not os.path.exists(path):
        np.save(path, rows()[0])
    return np.load(path, mmap_mode="r"), np.arange(_ROWS)


class Rows:
    """Map-style data set of rows and labels."""

    def __init__(self, features: Any, labels: Any) -> None:
        self._features, self._labels = features, labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self._features[index], self._labels[index]


class Blobs:
    """Map-style data set of arrays of 16 KiB, compressed once and in memory."""

    def __init__(self) -> None:
        rng = np.random.default_rng(2)
        array = rng.integers(0, 50, _NUMBERS).astype(np.float32)
        self._blobs = []
        for label in range(_BLOBS):
            array[0] = label
            self._blobs.append(zlib.compress(array.tobytes(), 1))

    def __len__(self) -> int:
        return len(self._blobs)

    def __getitem__(self, index: int) -> bytes:
        return self._blobs[index]


def decoded(blob: bytes) -> Any:
    """Decompress a blob to an array of shape (4096,), float32, whose first element is the label."""
    return np.frombuffer(zlib.decompress(blob), np.float32)
