"""Snapshot of the objects of a save, and the division of its tensors among the workers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dvkernels.checkpoint import all_or_none
from dvkernels.checkpoint.format import json_codec, shards
from dvkernels.checkpoint.format.nodes import Node
from dvkernels.checkpoint.objects import ObjectTree
from dvkernels.communicators.base import Workers
from dvkernels.errors import CheckpointError
from dvkernels.user_errors import brief

__all__: list[str] = []


@dataclass(frozen=True)
class Snapshot:
    """Content of a save; its arrays may be the memory of the objects."""

    step: int | None
    metadata: Any
    objects: dict[str, Node]
    tensors: dict[str, Any]  # the arrays that this worker writes, by tensor name
    workers: Workers


def take(objects: Mapping[str, Any], step: int | None, metadata: Any) -> Snapshot:
    """Take a snapshot of objects; raise on all workers if one of them cannot save an object.

    A collective call. Tensors that all workers have are divided among them to be written.
    """
    shards.check_machine()
    if metadata is not None and not isinstance(metadata, Mapping):
        raise CheckpointError(f"metadata: expected a dict; got {brief(metadata)}")
    given = dict(metadata or {})
    json_codec.encode(given, "metadata")
    workers = all_or_none.workers_of(objects)
    if workers.size == 1:
        tree = ObjectTree(objects)
        tensors = tree.tensors
    else:
        what = "save" if step is None else f"save of step {step}"
        with all_or_none.announcing_failures(workers, what):
            tree = ObjectTree(objects)
        all_or_none.check_consistent(workers, what, {"the step": str(step)} | tree.descriptions)
        tensors = _tensors_to_write(workers, tree)
    return Snapshot(step, copy.deepcopy(given), tree.nodes, tensors, workers)


def _tensors_to_write(workers: Workers, tree: ObjectTree) -> dict[str, Any]:
    """Return this worker's own tensors, its part of the shared ones, and on the chief the rest.

    All workers compute the same division, because the sizes of shared tensors are equal on all.
    """
    shared = {name: array.nbytes for name, array in tree.tensors.items() if name in tree.shared}
    chosen = set(shards.balanced_groups(shared, workers.size)[workers.rank]) | tree.own
    if workers.rank == all_or_none.CHIEF:
        chosen |= tree.tensors.keys() - tree.shared
    return {name: array for name, array in tree.tensors.items() if name in chosen}
