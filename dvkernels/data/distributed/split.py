"""How elements become one part per replica."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from dvkernels.data.array_nest import flatten, is_flat_dict, is_flat_tuple, leading_length
from dvkernels.data.distributed.stats import StatsRecorder
from dvkernels.data.distributed.to_device import DeviceCopier
from dvkernels.errors import DatasetError
from dvkernels.nest import words_of
from dvkernels.schedules import partition
from dvkernels.values.distributed import PerReplica

__all__ = ["Splitter"]


class Splitter:
    """Makes nests of ``PerReplica`` for the replicas of this worker.

    Parameters
    ----------
    num_local : int
        How many these are.
    devices : iterable of Device, or None
        Of the local replicas.
    owner : object
        Handed on to every ``PerReplica``.
    conveyor : DeviceCopier, optional
        Brings the parts to their devices; they stay on the host if it is not given.
    is_dealt : bool
        Elements are the replicas' own batches, to be dealt in turn, not batches to be cut.
    """

    def __init__(
        self,
        num_local: int,
        devices: Iterable[Any] | None,
        owner: object,
        is_dealt: bool,
        conveyor: DeviceCopier | None = None,
    ) -> None:
        self._num_local = num_local
        self._devices = devices
        self._owner = owner
        self._is_dealt = is_dealt
        self._conveyor = conveyor
        self._slices: tuple[int, tuple[slice, ...]] = (-1, ())  # of the latest length

    def deal(self, elements: list[Any], clock: StatsRecorder) -> Any:
        """Return the parts: views of the one batch, or the elements, one for each replica.

        The clock counts what bringing them to devices takes.
        """
        nest = self._hand_out(elements) if self._is_dealt else self._split(elements[0])
        return nest if self._conveyor is None else self._carried(nest, self._conveyor, clock)

    def _carried(self, nest: Any, conveyor: DeviceCopier, clock: StatsRecorder) -> Any:
        """Return the parts on their devices."""
        leaves, structure = flatten(nest)
        began = time.perf_counter()
        columns = conveyor.carry([leaf.values for leaf in leaves])
        clock.count_copy(time.perf_counter() - began)
        return structure.unflatten([self.together(column) for column in columns])

    def empty(self, element: Any) -> Any:
        """Return an element like ``element`` without rows; None where there are no rows."""
        leaves, structure = flatten(element)
        arrays = [np.asarray(leaf) for leaf in leaves]
        if any(array.ndim == 0 for array in arrays):
            return None
        return structure.unflatten([_without_rows(array) for array in arrays])

    def deal_empty(self, empty: Any, clock: StatsRecorder) -> Any:
        """Return an empty part for each replica, each like ``empty``."""
        return self.deal([empty] * (self._num_local if self._is_dealt else 1), clock)

    def together(self, parts: list[Any]) -> PerReplica[Any]:
        """Return one value per local replica."""
        return PerReplica(parts, devices=self._devices, owner=self._owner)

    def _hand_out(self, elements: list[Any]) -> Any:
        """Give one element to each replica; those that miss one get an empty batch like it."""
        flat = [flatten(element) for element in elements]
        structure = flat[0][1]
        for place, (_, other) in enumerate(flat):
            if other != structure:
                raise DatasetError(
                    f"distribute_datasets_from_function: expected elements of one structure; got "
                    f"{words_of(structure)} and, {place} later, {words_of(other)}"
                )
        columns = [list(column) for column in zip(*(leaves for leaves, _ in flat), strict=True)]
        missing = self._num_local - len(elements)
        for column in columns if missing else ():
            array = np.asarray(column[0])
            if array.ndim == 0:
                raise DatasetError(
                    f"distribute_datasets_from_function: the last step has {len(elements)} "
                    f"elements for {self._num_local} replicas, and elements that are no batches "
                    f"have no empty part; batch the dataset, or drop the rest with take()"
                )
            column += [_without_rows(array)] * missing
        return structure.unflatten([self.together(column) for column in columns])

    def _split(self, batch: Any) -> Any:
        # The most frequent nests, an array, a flat tuple or dict, are spared optree's 3 us.
        if type(batch) is np.ndarray:
            return self._parts([batch], batch)[0]
        if is_flat_tuple(batch):
            return tuple(self._parts(batch, batch))
        if is_flat_dict(batch):
            return dict(zip(batch, self._parts(batch.values(), batch), strict=True))
        leaves, spec = flatten(batch)
        if not leaves:
            leading_length(batch)  # which says what is missing
        return spec.unflatten(self._parts(leaves, batch))

    def _parts(self, leaves: Iterable[Any], batch: Any) -> list[PerReplica[Any]]:
        length, slices = self._slices
        parts = []
        for leaf in leaves:
            shape = getattr(leaf, "shape", None)
            if not shape or shape[0] != length:
                length = leading_length(batch)  # the same for all leaves, or an error
                slices = tuple(
                    slice(start, stop) for start, stop in partition.parts(length, self._num_local)
                )
                self._slices = (length, slices)
            parts.append(
                PerReplica(
                    [leaf[where] for where in slices], devices=self._devices, owner=self._owner
                )
            )
        return parts


def _without_rows(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return no rows like those of ``array``, which does not keep it alive."""
    return np.empty((0, *array.shape[1:]), array.dtype)
