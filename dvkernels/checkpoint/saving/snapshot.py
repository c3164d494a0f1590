"""Snapshot of the objects of a save, and the division of its tensors among the workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dvkernels.checkpoint import all_or_none, generators
from dvkernels.checkpoint.format import json_codec, shards
from dvkernels.checkpoint.format.nodes import (
    ArrayNode,
    DataNode,
    GeneratorNode,
    NestNode,
    Node,
    StateNode,
    VariableNode,
)
from dvkernels.checkpoint.format.shards import DTYPES
from dvkernels.checkpoint.generators import RandomGenerator
from dvkernels.checkpoint.objects import (
    STEPS,
    HasSlots,
    HasState,
    ObjectTree,
    OpenedContainer,
    child,
)
from dvkernels.checkpoint.storage import parallel_io
from dvkernels.communicators.base import Workers
from dvkernels.devices import array_memory
from dvkernels.devices.array_spec import Array, HostArray, Spec
from dvkernels.errors import CheckpointError, DvKernelsError
from dvkernels.user_errors import brief, text_of
from dvkernels.variables.saved_variable import SavedVariable, saved_by
from dvkernels.variables.variable import Variable

__all__: list[str] = []


@dataclass(frozen=True)
class Snapshot:
    """Content of a save; its arrays may be the memory of the objects."""

    step: int | None
    metadata: Any  # as JSON values, like the objects
    objects: dict[str, Any]
    tensors: dict[str, HostArray]  # the arrays that this worker writes, by tensor name
    workers: Workers


def take(objects: dict[str, Any], step: int | None, metadata: Any) -> Snapshot:
    """Take a snapshot of objects; raise on all workers if one of them cannot save an object.

    A collective call. Tensors that all workers have are divided among them to be written.
    """
    shards.check_machine()
    if metadata is not None and not isinstance(metadata, Mapping):
        raise CheckpointError(f"metadata: expected a dict; got {brief(metadata)}")
    encoded = json_codec.encode(dict(metadata or {}), "metadata")
    tree = ObjectTree(objects)
    workers = tree.workers
    what = "save" if step is None else f"save of step {step}"
    with all_or_none.announcing_failures(workers, what):
        content = _Content(tree)
    if workers.size > 1:
        all_or_none.check_consistent(workers, what, {"the step": str(step)} | content.descriptions)
    return Snapshot(step, encoded, content.nodes, _tensors_to_write(workers, content), workers)


def _tensors_to_write(workers: Workers, content: _Content) -> dict[str, HostArray]:
    """Return this worker's own tensors, its part of the shared ones, and on the chief the rest.

    All workers compute the same division, because the sizes of shared tensors are equal on all.
    """
    shared = {
        name: array.nbytes for name, array in content.tensors.items() if name in content.shared
    }
    chosen = set(shards.balanced_groups(shared, workers.size)[workers.rank]) | content.own
    if workers.rank == all_or_none.CHIEF:
        chosen |= content.tensors.keys() - content.shared
    return {name: array for name, array in content.tensors.items() if name in chosen}


class _Content:
    """Content of a checkpoint of objects: nodes as JSON values, and arrays by tensor name.

    The arrays may be the memory of the objects: write or copy them before the objects change.
    Making the content is a collective call, as it aggregates variables over all workers.

    Attributes
    ----------
    nodes : dict of str to JSON value
    tensors : dict of str to array
        The tensors that this worker has.
    shared : set of str
        The tensors that every worker has, with the same bits.
    own : set of str
        The tensors that only this worker has. Tensors in neither set may differ between workers;
        those of the chief, the first worker, are saved.
    descriptions : dict of str to str
        Descriptions of the objects by path, which must be equal on all workers.
    """

    def __init__(self, tree: ObjectTree) -> None:
        self.tensors: dict[str, HostArray] = {}
        self.shared: set[str] = set()
        self.own: set[str] = set()
        self.descriptions: dict[str, str] = {}
        self._names: set[str] = set()
        self._is_plain = tree.is_plain
        # By id; a variable with several paths has its first.
        self._paths = {id(variable): path for path, variable in reversed(tree.variables.items())}
        self._saved: dict[int, tuple[str, ...]] = {}
        nodes = {name: self._node(item, child("", name)) for name, item in tree.items.items()}
        # Copies what the nodes refer to: plain data may change before it is written.
        self.nodes = {name: node.to_json() for name, node in nodes.items()}

    def _node(self, value: Any, path: str) -> Node:
        if isinstance(value, OpenedContainer):
            kind, children = type(value.value).__name__, value.children
            self.descriptions[path] = f"a {kind} of {len(children)}"
            return NestNode(
                kind, {name: self._node(each, child(path, name)) for name, each in children.items()}
            )
        if isinstance(value, Variable):
            return self._variable(value, path)
        if isinstance(value, np.ndarray):
            self.descriptions[path] = f"an array {Spec(value.shape, value.dtype)}"
            return ArrayNode(self._tensor(path, value))
        if generators.is_generator(value):
            return self._generator(value, path)
        if self._is_plain(value):
            self.descriptions[path] = "plain data"
            return DataNode(value)
        if isinstance(value, HasState) and not isinstance(value, type):
            return self._with_state(value, path)
        raise CheckpointError(
            f"{path}: expected variables, arrays, random generators, plain data, objects with "
            f"state_dict and load_state_dict, or containers of them; got {brief(value)}, a "
            f"{type(value).__name__}"
        )

    def _generator(self, value: RandomGenerator, path: str) -> GeneratorNode:
        # Only the chief's state is saved, so workers with independent generators are refused.
        kind, state = generators.kind(value), generators.state(value)
        arrays_as_checksums = json_codec.encode(
            state, path, lambda array: parallel_io.checksum(array.data)
        )
        checksum = parallel_io.checksum(repr(arrays_as_checksums).encode())
        self.descriptions[path] = f"a {kind} generator in state {checksum}"
        return GeneratorNode(kind, self._state(state, path))

    def _variable(self, variable: Variable, path: str) -> VariableNode:
        names = self._saved.get(id(variable))  # a variable at two paths is saved once
        if names is None:
            try:
                saved = saved_by(variable)
            except DvKernelsError as error:
                raise CheckpointError(
                    f"{path}: variable {variable.name!r} cannot be saved: {error}"
                ) from error
            names = self._tensors_of(saved, path)
            self._saved[id(variable)] = names
        modes = variable.synchronization.value, variable.aggregation.value
        spec = Spec(variable.shape, variable.dtype)
        self.descriptions[path] = f"a variable {spec} {'/'.join(modes)} of {len(names)} tensor(s)"
        return VariableNode(names, *modes)

    def _tensors_of(self, saved: SavedVariable, path: str) -> tuple[str, ...]:
        """Return the names of a variable's tensors on all workers; add those of this worker."""
        if saved.total == 1:
            self.shared.add(path)
            return (self._tensor(path, saved.arrays[0]),)
        names = tuple(f"{path}/copy-{k}" for k in range(saved.total))
        own = dict(zip(names[saved.first :], saved.arrays, strict=False))
        self.own |= own.keys()
        for name in names:
            if name in own:
                self._tensor(name, own[name])
            else:
                self._reserve(name)
        return names

    def _with_state(self, value: HasState, path: str) -> StateNode:
        try:
            state = value.progress() if isinstance(value, HasSlots) else value.state_dict()
        except DvKernelsError as error:
            raise CheckpointError(f"{path}: its state_dict() failed: {text_of(error)}") from error
        slots = {}
        for variable in value.slotted if isinstance(value, HasSlots) else ():
            assert isinstance(value, HasSlots)
            variable_path = self._paths.get(id(variable))
            if variable_path is None:
                raise CheckpointError(
                    f"{path}: it has slots of variable {variable.name!r}, which is not among the "
                    f"objects of this checkpoint; give it to Checkpoint too"
                )
            by_name = {
                name: saved_by(slot)
                for name, slot in zip(value.slot_names, value.slots(variable), strict=True)
            }
            by_name[STEPS] = SavedVariable((value.steps(variable),))
            slots[variable_path] = {
                name: self._tensors_of(saved, f"{child(path, 'slots')}/{variable_path}/{name}")[0]
                for name, saved in by_name.items()
            }
        self.descriptions[path] = (
            f"a {type(value).__name__} with slots of {', '.join(slots) or 'nothing'}"
        )
        return StateNode(type(value).__name__, self._state(state, path), slots)

    def _state(self, state: Any, path: str) -> Any:
        names = (f"{child(path, 'state')}/{k}" for k in range(1 << 62))
        return json_codec.encode(state, path, lambda array: self._tensor(next(names), array))

    def _tensor(self, name: str, array: Array) -> str:
        if array.dtype.name not in DTYPES or not array.dtype.isnative:
            raise CheckpointError(
                f"{name}: arrays of dtype {array.dtype!r} cannot be saved; cast it to one of "
                f"{', '.join(DTYPES)}"
            )
        self._reserve(name)
        on_host = array_memory.holding(array).to_host(array)
        self.tensors[name] = np.ascontiguousarray(on_host).reshape(array.shape)
        return name

    def _reserve(self, name: str) -> None:
        """Raise unless a tensor name is new and valid."""
        if name in self._names:
            raise CheckpointError(f"{name}: two objects have this name; rename one of them")
        try:
            name.encode()
        except UnicodeEncodeError:
            raise CheckpointError(f"{name!r}: a name must be valid Unicode") from None
        self._names.add(name)
