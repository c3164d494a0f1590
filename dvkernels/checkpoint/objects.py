"""Tree of the user's objects: their kinds, and the tensors and data that each kind saves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from dvkernels import pytree
from dvkernels.checkpoint import generators
from dvkernels.checkpoint.format import json_codec
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
from dvkernels.checkpoint.storage import parallel_io
from dvkernels.devices import array_memory
from dvkernels.devices.array_spec import Spec
from dvkernels.errors import CheckpointError, DvKernelsError
from dvkernels.user_errors import brief, text_of
from dvkernels.variables.saved_variable import SavedVariable, saved_by
from dvkernels.variables.variable import Variable

__all__: list[str] = []

_MAX_OCCURRENCES = 1 << 20


@runtime_checkable
class HasState(Protocol):
    """Object that returns its state as plain data and arrays, and loads such a state."""

    def state_dict(self) -> Any:
        """Return the state."""

    def load_state_dict(self, state: Any) -> Any:
        """Load a state; after an error nothing has changed."""


@runtime_checkable
class HasSlots(HasState, Protocol):
    """Optimizer, which keeps slot variables and a step count for each variable.

    A checkpoint saves these by the paths of the variables, and the optimizer's progress once.
    """

    @property
    def slotted(self) -> tuple[Variable, ...]:
        """Variables that have slots."""

    @property
    def iterations(self) -> int:
        """Largest step count of a variable."""

    @property
    def slot_names(self) -> tuple[str, ...]:
        """Names of the slots of each variable."""

    def slots(self, variable: Variable) -> tuple[Variable, ...]:
        """Return the slots of a variable; create them if there are none."""

    def steps(self, variable: Variable) -> np.ndarray[Any, Any]:
        """Return the step count of a variable, a writable array of shape ()."""

    def progress(self) -> Any:
        """Return the state that does not belong to a variable."""

    def set_progress(self, state: Any) -> Any:
        """Load that state; after an error nothing has changed."""


STEPS = "steps"  # key of the step count among the slots of a variable


class OpenedContainer(NamedTuple):
    """Children of a container by name, their keys, and a function that rebuilds the container."""

    children: dict[str, Any]
    keys: tuple[Any, ...]
    rebuild: Callable[[list[Any]], Any]


def open_container(value: Any, path: str) -> OpenedContainer | None:
    """Return the children of a container; None for a leaf."""
    if pytree.is_leaf(value):
        return None
    children, metadata, keys, unflatten = pytree.flatten_one_level(value)
    names = [str(key) for key in keys]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(
            f"{path}: two of its keys are written {brief(twice)}; rename one of them"
        )
    return OpenedContainer(
        dict(zip(names, children, strict=True)),
        tuple(keys),
        lambda children: unflatten(metadata, children),
    )


def child(path: str, name: str) -> str:
    """Return the path of a child: names joined by "/", as in JSON pointers (RFC 6901)."""
    escaped = name.replace("~", "~0").replace("/", "~1")
    return f"{path}/{escaped}" if path else escaped


def walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the path and value of each leaf below ``path``; a tree of plain data is one leaf."""
    if _OccurrenceCounter().count(value, path, 0) > _MAX_OCCURRENCES:
        raise CheckpointError(
            f"{path}: containers in it occur at more than {_MAX_OCCURRENCES} places; refer to a "
            f"container of variables or arrays from one place only"
        )
    return _walk(value, path)


def _walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    inner = _inner(value, path)
    if inner is None:
        yield path, value
    else:
        for name, each in inner.children.items():
            yield from _walk(each, child(path, name))


def _inner(value: Any, path: str) -> OpenedContainer | None:
    return None if is_object(value) or json_codec.is_plain(value) else open_container(value, path)


class _OccurrenceCounter:
    """Counts the containers in a tree, shared ones at each occurrence, visiting each once."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}
        self._ancestors: dict[int, str] = {}  # the paths of the containers being visited, by id
        self._kept: list[Any] = []  # references, so that no other object gets their ids

    def count(self, value: Any, path: str, depth: int) -> int:
        if id(value) in self._ancestors:
            raise CheckpointError(
                f"{path}: it is the {type(value).__name__} at {self._ancestors[id(value)]} again, "
                f"which contains itself; keep it out of the checkpoint"
            )
        if id(value) in self._known:
            return self._known[id(value)]
        inner = _inner(value, path)
        if inner is None:
            return 0
        if depth > json_codec.MAX_DEPTH:
            raise CheckpointError(
                f"{path}: nested deeper than {json_codec.MAX_DEPTH} levels, or contains itself"
            )
        self._kept.append(value)
        self._ancestors[id(value)] = path
        count = 1 + sum(
            self.count(each, child(path, name), depth + 1) for name, each in inner.children.items()
        )
        del self._ancestors[id(value)]
        self._known[id(value)] = count
        return count


def is_object(value: Any) -> bool:
    """Return whether a value is restored in place as a whole, unlike plain data and containers."""
    return (
        isinstance(value, Variable | np.ndarray)
        or generators.is_generator(value)
        or (isinstance(value, HasState) and not isinstance(value, type))
    )


def variables_of(objects: Mapping[str, Any]) -> dict[str, Variable]:
    """Return the variables among the objects, by path."""
    return {
        path: value
        for name, each in objects.items()
        for path, value in walk(each, child("", name))
        if isinstance(value, Variable)
    }


class ObjectTree:
    """Content of a checkpoint of objects: nodes, and arrays by tensor name.

    The arrays may be the memory of the objects: write or copy them before the objects change.
    Making the tree is a collective call, as it aggregates variables over all workers.

    Attributes
    ----------
    nodes : dict of str to Node
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

    def __init__(self, objects: Mapping[str, Any]) -> None:
        self.tensors: dict[str, Any] = {}
        self.shared: set[str] = set()
        self.own: set[str] = set()
        self.descriptions: dict[str, str] = {}
        self._names: set[str] = set()
        variables = variables_of(objects)
        # By id; a variable with several paths has its first.
        self._paths = {id(variable): path for path, variable in reversed(variables.items())}
        self._saved: dict[int, tuple[str, ...]] = {}
        self.nodes = {name: self._node(each, child("", name)) for name, each in objects.items()}

    def _node(self, value: Any, path: str) -> Node:
        if isinstance(value, Variable):
            return self._variable(value, path)
        if isinstance(value, np.ndarray):
            self.descriptions[path] = f"an array {Spec(value.shape, value.dtype)}"
            return ArrayNode(self._tensor(path, value))
        if generators.is_generator(value):
            return self._generator(value, path)
        if is_object(value):
            return self._with_state(value, path)
        if json_codec.is_plain(value):
            self.descriptions[path] = "plain data"
            return DataNode(copy.deepcopy(value))  # it may change before it is written
        inner = open_container(value, path)
        if inner is None:
            raise CheckpointError(
                f"{path}: expected variables, arrays, random generators, plain data, objects with "
                f"state_dict and load_state_dict, or containers of them; got {brief(value)}, a "
                f"{type(value).__name__}"
            )
        self.descriptions[path] = f"a {type(value).__name__} of {len(inner.children)}"
        return NestNode(
            type(value).__name__,
            {name: self._node(each, child(path, name)) for name, each in inner.children.items()},
        )

    def _generator(self, value: Any, path: str) -> GeneratorNode:
        # Only the chief's state is saved, so workers with independent generators are refused.
        kind, state = generators.kind(value), generators.state(value)
        encoded = repr(json_codec.encode(state, path, parallel_io.checksum))
        self.descriptions[path] = (
            f"a {kind} generator in state {parallel_io.checksum(encoded.encode())}"
        )
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

    def _tensor(self, name: str, array: Any) -> str:
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
