"""Padding of the parts of batches to one shape, with a weight for each row."""

from __future__ import annotations

from typing import Any, final

import numpy as np

from dvkernels.pytree import flatten
from dvkernels.values.distributed import PerReplica

__all__: list[str] = []


@final
class Padder:
    """Padder of parts to the longest part so far, which is that of a full batch from the first on.

    A program that is compiled for one shape so takes the last, shorter batch too. ``length`` is
    that of the longest part of a full batch, where other workers may have it.
    """

    def __init__(self, length: int = 0) -> None:
        self._length = length

    def pad(self, nest: Any) -> tuple[Any, PerReplica[Any]]:
        """Return the parts, filled up with zeros, and for each part the weights of its rows.

        A weight is float32: 1 for a row of the batch, and 0 for one that was added.
        """
        leaves, structure = flatten(nest)
        first = leaves[0]
        counts = [len(part) for part in first.values]
        self._length = max(self._length, *counts)
        padded = [
            PerReplica(map(self._padded, leaf.values), devices=leaf.devices, owner=leaf.owner)
            for leaf in leaves
        ]
        weights = [(np.arange(self._length) < count).astype(np.float32) for count in counts]
        weight = PerReplica(weights, devices=first.devices, owner=first.owner)
        return structure.unflatten(padded), weight

    def _padded(self, part: Any) -> Any:
        array = np.asarray(part)
        if len(array) == self._length:
            return array
        whole = np.zeros((self._length, *array.shape[1:]), array.dtype)
        whole[: len(array)] = array
        return whole
