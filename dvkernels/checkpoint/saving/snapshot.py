"""What is to be saved, taken at one moment, and which worker writes what of it."""

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
from dvkernels.user_errors import shown

__all__: list[str] = []


@dataclass(frozen=True)
class Snapshot:
    """What is to be saved. The arrays may be those of the objects themselves."""

    step: int | None
    metadata: Any
    objects: dict[str, Node]
    tensors: dict[str, Any]  # those that this worker writes
    workers: Workers


def take(objects: Mapping[str, Any], step: int | None, metadata: Any) -> Snapshot:
    """Return what objects hold now, and raise if one of them cannot be saved, on any worker.

    Every worker calls this. Tensors that all have are dealt to them, so that each writes a part.
    """
    shards.check_machine()
    if metadata is not None and not isinstance(metadata, Mapping):
        raise CheckpointError(f"metadata: expected a dict; got {shown(metadata)}")
    given = dict(metadata or {})
    json_codec.encode(given, "metadata")
    workers = all_or_none.of(objects)
    if workers.size == 1:
        gathered = ObjectTree(objects)
        tensors = gathered.tensors
    else:
        what = "save" if step is None else f"save of step {step}"
        with all_or_none.telling(workers, what):
            gathered = ObjectTree(objects)
        all_or_none.check_alike(workers, what, {"the step": str(step)} | gathered.alike)
        tensors = _part_of(workers, gathered)
    return Snapshot(step, copy.deepcopy(given), gathered.nodes, tensors, workers)


def _part_of(workers: Workers, gathered: ObjectTree) -> dict[str, Any]:
    """Return what this worker writes: its own, its part of what all have, and as chief the rest.

    All work out the same: the sizes of what is shared are alike.
    """
    shared = {
        name: gathered.tensors[name].nbytes for name in gathered.tensors if name in gathered.shared
    }
    chosen = set(shards.dealt(shared, workers.size)[workers.rank]) | gathered.own
    if workers.rank == all_or_none.CHIEF:
        chosen |= gathered.tensors.keys() - gathered.shared
    return {name: array for name, array in gathered.tensors.items() if name in chosen}
