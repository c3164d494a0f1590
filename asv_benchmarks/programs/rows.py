"""Rows of features with a target each, read in shuffled batches."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

import dvkernels as dv

__all__ = ["SEED", "Rows", "make"]

SEED = 0  # of the shuffle


class Rows(NamedTuple):
    """Features and targets, and the order of the rows in each epoch."""

    x: Any
    y: Any
    size: int  # of a batch
    epochs: int
    orders: tuple[Any, ...]

    def order(self, epoch: int) -> Any:
        """Return the order of an epoch.

        It is that of the dataset, so that results can be compared. NumPy draws one of its own
        nevertheless: what the shuffle of a program without this library costs is in its time.
        """
        np.random.default_rng(epoch).permutation(len(self.x))
        return self.orders[epoch]


def make(rows: int, columns: int, size: int, epochs: int = 1) -> Rows:
    """Draw the rows; the target says on which side of a plane a row lies."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((rows, columns))
    y = (x @ rng.standard_normal(columns) > 0).astype(float)
    shuffled = dv.Dataset.range(rows).shuffle(seed=SEED).batch(rows)
    orders = tuple(next(iter(shuffled.with_epoch(epoch))) for epoch in range(epochs))
    return Rows(x, y, size, epochs, orders)
