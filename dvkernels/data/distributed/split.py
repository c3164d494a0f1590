"""Split of the elements of a step into one part per replica."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dvkernels.data.array_nest import Element, is_flat_dict, is_flat_tuple, leading_length
from dvkernels.data.distributed.balancer import Balancer
from dvkernels.data.distributed.padding import Padder
from dvkernels.data.distributed.stats import StatsRecorder
from dvkernels.data.distributed.to_device import BatchCopier, JaxCopier
from dvkernels.devices.device import Device
from dvkernels.errors import DatasetError
from dvkernels.pytree import describe_structure, flatten
from dvkernels.schedules import partition
from dvkernels.values.distributed import PerReplica
from dvkernels.values.placement import Placement

__all__: list[str] = []


class Splitter:
    """Splitter of batches into pytrees of ``PerReplica`` for the replicas of this worker.

    Parameters
    ----------
    num_local : int
        The number of local replicas.
    devices : sequence of Device
        The devices of the local replicas.
    owner : Placement, optional
        Passed to every ``PerReplica``.
    is_dealt : bool
        The elements are batches of single replicas, assigned to them in turn, not global batches.
    copier : BatchCopier, optional
        Copies the parts to their devices; without it they stay on the host.
    balancer : Balancer, optional
        Divides the batches; without it they are divided evenly.
    padder : Padder, optional
        Gives all parts one shape.
    """

    def __init__(
        self,
        num_local: int,
        devices: Sequence[Device],
        owner: Placement | None,
        is_dealt: bool,
        copier: BatchCopier | None = None,
        balancer: Balancer | None = None,
        padder: Padder | None = None,
    ) -> None:
        self._num_local = num_local
        self._devices = devices
        self._owner = owner
        self._is_dealt = is_dealt
        self._copier = copier
        self.balancer = balancer
        self._padder = padder
        self._slices: tuple[int, tuple[slice, ...]] = (-1, ())  # for the latest batch length

    def split(self, elements: list[Element], recorder: StatsRecorder) -> Any:
        """Return the parts: views of the one batch, or one element for each replica.

        The recorder adds up the time of the copies to devices.
        """
        if self.balancer is not None:
            self._slices = (-1, ())  # divide this batch anew
        nest = self._assign_elements(elements) if self._is_dealt else self._split_batch(elements[0])
        if self._padder is not None:
            nest = self._padder.pad(nest)
        return nest if self._copier is None else self._on_devices(nest, self._copier, recorder)

    def _on_devices(self, nest: Any, copier: BatchCopier, recorder: StatsRecorder) -> Any:
        """Return the parts, copied to their devices."""
        leaves, structure = flatten(nest)
        began = time.perf_counter()
        columns = copier.copy([leaf.values for leaf in leaves])
        recorder.count_copy(time.perf_counter() - began)
        parts = [self.per_replica(column) for column in columns]
        if isinstance(copier, JaxCopier) and self._owner is not None:
            for part in parts:
                copier.assemble(part, self._owner)
        return structure.unflatten(parts)

    def empty_like(self, element: Element) -> Element:
        """Return an element like ``element`` without rows; None if a leaf has no leading axis.

        It does not keep the arrays of ``element`` alive.
        """
        leaves, structure = flatten(element)
        arrays = [np.asarray(leaf) for leaf in leaves]
        if any(array.ndim == 0 for array in arrays):
            return None
        return structure.unflatten([np.empty((0, *a.shape[1:]), a.dtype) for a in arrays])

    def split_empty(self, empty: Element, recorder: StatsRecorder) -> Any:
        """Return an empty part for each replica, each like ``empty``."""
        return self.split([empty] * (self._num_local if self._is_dealt else 1), recorder)

    def per_replica(self, parts: Sequence[Any]) -> PerReplica[Any]:
        """Return one value per local replica."""
        return PerReplica(parts, devices=self._devices, owner=self._owner)

    def _assign_elements(self, elements: list[Element]) -> Any:
        """Assign one element to each replica, and an empty batch to the replicas left over."""
        if missing := self._num_local - len(elements):
            empty = self.empty_like(elements[0])
            if empty is None:
                raise DatasetError(
                    f"distribute_datasets_from_function: the last step has {len(elements)} "
                    f"elements for {self._num_local} replicas, and elements that are no batches "
                    f"have no empty part; batch the dataset, or drop the rest with take()"
                )
            elements = [*elements, *[empty] * missing]
        flat = [flatten(element) for element in elements]
        structure = flat[0][1]
        for index, (_, other) in enumerate(flat):
            if other != structure:
                raise DatasetError(
                    f"distribute_datasets_from_function: expected elements of one structure; got "
                    f"{describe_structure(structure)} and, {index} later, "
                    f"{describe_structure(other)}"
                )
        columns = zip(*(leaves for leaves, _ in flat), strict=True)
        return structure.unflatten([self.per_replica(column) for column in columns])

    def _split_batch(self, batch: Element) -> Any:
        # The most frequent structures, an array or a flat tuple or dict, avoid optree's 3 us.
        if type(batch) is np.ndarray:
            return self._parts([batch], batch)[0]
        if is_flat_tuple(batch):
            return tuple(self._parts(batch, batch))
        if is_flat_dict(batch):
            return dict(zip(batch, self._parts(batch.values(), batch), strict=True))
        leaves, spec = flatten(batch)
        if not leaves:
            leading_length(batch)  # raises: the batch has no array
        return spec.unflatten(self._parts(leaves, batch))

    def _parts(self, leaves: Iterable[Any], batch: Element) -> list[PerReplica[Any]]:
        length, slices = self._slices
        parts = []
        for leaf in leaves:
            shape = getattr(leaf, "shape", None)
            if not shape or shape[0] != length:
                length = leading_length(batch)  # raises if the leaves differ in length
                slices = tuple(slice(start, stop) for start, stop in self._divide(length))
                self._slices = (length, slices)
            parts.append(
                PerReplica(
                    [leaf[rows] for rows in slices], devices=self._devices, owner=self._owner
                )
            )
        return parts

    def _divide(self, length: int) -> list[tuple[int, int]]:
        """Return the start and the stop of each replica's part of a batch."""
        if self.balancer is None:
            return partition.parts(length, self._num_local)
        return self.balancer.parts(length)
