"""The user's objects as a tree: which kinds there are, and what each of them saves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import optree

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
from dvkernels.devices.buffers import Spec
from dvkernels.errors import CheckpointError, DvKernelsError
from dvkernels.user_errors import shown, text_of
from dvkernels.variables.variable import SavedVariable, Variable, saved_by

__all__: list[str] = []

_MOST_PLACES = 1 << 20


@runtime_checkable
class HasState(Protocol):
    """What tells its state as plain data and arrays, and takes it back."""

    def state_dict(self) -> Any:
        """Return the state."""

    def load_state_dict(self, state: Any) -> Any:
        """Take a state over; after an error nothing has changed."""


@runtime_checkable
class HasSlots(HasState, Protocol):
    """An optimizer: for each variable it keeps others, and a count of steps.

    A checkpoint saves these by the paths of the variables, and beside them its progress.
    """

    @property
    def slotted(self) -> tuple[Variable, ...]:
        """The variables that have slots."""

    @property
    def iterations(self) -> int:
        """The most steps that a variable has taken."""

    @property
    def slot_names(self) -> tuple[str, ...]:
        """What each of them has."""

    def slots(self, variable: Variable) -> tuple[Variable, ...]:
        """Return the slots of a variable, which are made if there are none."""

    def steps(self, variable: Variable) -> np.ndarray[Any, Any]:
        """Return the count of a variable, an array of shape () that may be written."""

    def progress(self) -> Any:
        """Return the rest of its state."""

    def set_progress(self, state: Any) -> Any:
        """Take that over; after an error nothing has changed."""


STEPS = "steps"  # what a count is called among the slots of its variable


class Opened(NamedTuple):
    """A container, its children by name, and how to make one like it of others."""

    children: dict[str, Any]
    keys: tuple[Any, ...]
    rebuild: Callable[[list[Any]], Any]


def opened(value: Any, path: str) -> Opened | None:
    """Return what a container holds; None for anything else."""
    if optree.tree_is_leaf(value, none_is_leaf=True):
        return None
    held, metadata, keys, unflatten = optree.tree_flatten_one_level(value, none_is_leaf=True)
    names = [str(key) for key in keys]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(
            f"{path}: two of its keys are written {shown(twice)}; rename one of them"
        )
    return Opened(
        dict(zip(names, held, strict=True)),
        tuple(keys),
        lambda children: unflatten(metadata, children),
    )


def child(path: str, name: str) -> str:
    """Return the path of a child: names joined by "/", which "~1" stands for in a name."""
    escaped = name.replace("~", "~0").replace("/", "~1")
    return f"{path}/{escaped}" if path else escaped


def walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield what is no container below ``path``, with its path; plain data in one piece."""
    if _Places().count(value, path, 0) > _MOST_PLACES:
        raise CheckpointError(
            f"{path}: containers in it stand at more than {_MOST_PLACES} places; let what holds "
            f"variables or arrays stand at one"
        )
    return _walk(value, path)


def _walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    inner = _inner(value, path)
    if inner is None:
        yield path, value
    else:
        for name, each in inner.children.items():
            yield from _walk(each, child(path, name))


def _inner(value: Any, path: str) -> Opened | None:
    return None if is_object(value) or json_codec.is_plain(value) else opened(value, path)


class _Places:
    """At how many places containers stand, found by going through each of them once."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}
        self._above: dict[int, str] = {}  # those that are being gone through, and their paths
        self._kept: list[Any] = []  # so that their identities stay theirs

    def count(self, value: Any, path: str, depth: int) -> int:
        if id(value) in self._above:
            raise CheckpointError(
                f"{path}: it is the {type(value).__name__} at {self._above[id(value)]} again, so "
                f"that it is in a circle; keep it out of the checkpoint"
            )
        if id(value) in self._known:
            return self._known[id(value)]
        inner = _inner(value, path)
        if inner is None:
            return 0
        if depth > json_codec.MAX_DEPTH:
            raise CheckpointError(
                f"{path}: nested deeper than {json_codec.MAX_DEPTH} levels, or in a circle"
            )
        self._kept.append(value)
        self._above[id(value)] = path
        count = 1 + sum(
            self.count(each, child(path, name), depth + 1) for name, each in inner.children.items()
        )
        del self._above[id(value)]
        self._known[id(value)] = count
        return count


def is_object(value: Any) -> bool:
    """Say whether it is restored in place by itself, and is no container to look into."""
    return (
        isinstance(value, Variable | np.ndarray)
        or generators.is_generator(value)
        or (isinstance(value, HasState) and not isinstance(value, type))
    )


def variables_of(objects: Mapping[str, Any]) -> dict[str, Variable]:
    """Return the variables by path."""
    return {
        path: value
        for name, each in objects.items()
        for path, value in walk(each, child("", name))
        if isinstance(value, Variable)
    }


class ObjectTree:
    """What a checkpoint of some objects consists of: nodes, and arrays by the tensors' names.

    The arrays may be those of the objects themselves: they are to be written, or copied, before
    the objects change. Aggregates bring all workers together.

    Attributes
    ----------
    nodes : dict of str to Node
    tensors : dict of str to array
        Those that this worker has.
    shared : set of str
        The tensors that every worker has, with the same bits.
    own : set of str
        The tensors that this worker alone has. What is in neither set is the chief's: each worker
        may have something else there, and the first worker's counts.
    alike : dict of str to str
        What must be the same on all workers, in words, by path.
    """

    def __init__(self, objects: Mapping[str, Any]) -> None:
        self.tensors: dict[str, Any] = {}
        self.shared: set[str] = set()
        self.own: set[str] = set()
        self.alike: dict[str, str] = {}
        self._names: set[str] = set()
        variables = variables_of(objects)
        self._paths = {id(variable): path for path, variable in reversed(variables.items())}
        self._saved: dict[int, tuple[str, ...]] = {}
        self.nodes = {name: self._node(each, child("", name)) for name, each in objects.items()}

    def _node(self, value: Any, path: str) -> Node:
        if isinstance(value, Variable):
            return self._variable(value, path)
        if isinstance(value, np.ndarray):
            self.alike[path] = f"an array {Spec(value.shape, value.dtype)}"
            return ArrayNode(self._tensor(path, value))
        if generators.is_generator(value):
            return self._generator(value, path)
        if is_object(value):
            return self._with_state(value, path)
        if json_codec.is_plain(value):
            self.alike[path] = "plain data"
            return DataNode(copy.deepcopy(value))  # written later, perhaps, than it changes
        inner = opened(value, path)
        if inner is None:
            raise CheckpointError(
                f"{path}: expected variables, arrays, random generators, plain data, objects with "
                f"state_dict and load_state_dict, or containers of them; got {shown(value)}, a "
                f"{type(value).__name__}"
            )
        self.alike[path] = f"a {type(value).__name__} of {len(inner.children)}"
        return NestNode(
            type(value).__name__,
            {name: self._node(each, child(path, name)) for name, each in inner.children.items()},
        )

    def _generator(self, value: Any, path: str) -> GeneratorNode:
        # Those of workers that draw apart would all go on as the chief's: that is not saved.
        kind, state = generators.kind(value), generators.state(value)
        words = repr(json_codec.encode(state, path, parallel_io.checksum))
        self.alike[path] = f"a {kind} generator in state {parallel_io.checksum(words.encode())}"
        return GeneratorNode(kind, self._state(state, path))

    def _variable(self, variable: Variable, path: str) -> VariableNode:
        names = self._saved.get(id(variable))  # one that stands at two paths is saved once
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
        held = Spec(variable.shape, variable.dtype)
        self.alike[path] = f"a variable {held} {'/'.join(modes)} in {len(names)}"
        return VariableNode(names, *modes)

    def _tensors_of(self, saved: SavedVariable, path: str) -> tuple[str, ...]:
        """Return the names of a variable's tensors, those that other workers have included."""
        if saved.total == 1:
            self.shared.add(path)
            return (self._tensor(path, saved.arrays[0]),)
        names = tuple(f"{path}/copy-{k}" for k in range(saved.total))
        held = dict(zip(names[saved.first :], saved.arrays, strict=False))
        self.own |= held.keys()
        for name in names:
            if name in held:
                self._tensor(name, held[name])
            else:
                self._take_name(name)
        return names

    def _with_state(self, value: HasState, path: str) -> StateNode:
        try:
            state = value.progress() if isinstance(value, HasSlots) else value.state_dict()
        except DvKernelsError as error:
            raise CheckpointError(f"{path}: its state_dict() failed: {text_of(error)}") from error
        slots = {}
        for variable in value.slotted if isinstance(value, HasSlots) else ():
            assert isinstance(value, HasSlots)
            of = self._paths.get(id(variable))
            if of is None:
                raise CheckpointError(
                    f"{path}: it has slots of variable {variable.name!r}, which is not among the "
                    f"objects of this checkpoint; give it to Checkpoint too"
                )
            held = {
                name: saved_by(slot)
                for name, slot in zip(value.slot_names, value.slots(variable), strict=True)
            }
            held[STEPS] = SavedVariable((value.steps(variable),))
            slots[of] = {
                name: self._tensors_of(saved, f"{child(path, 'slots')}/{of}/{name}")[0]
                for name, saved in held.items()
            }
        self.alike[path] = f"a {type(value).__name__} with slots of {', '.join(slots) or 'nothing'}"
        return StateNode(type(value).__name__, self._state(state, path), slots)

    def _state(self, state: Any, path: str) -> Any:
        names = (f"{child(path, 'state')}/{k}" for k in range(1 << 62))
        return json_codec.encode(state, path, lambda array: self._tensor(next(names), array))

    def _tensor(self, name: str, array: Any) -> str:
        if array.dtype.name not in DTYPES or not array.dtype.isnative:
            raise CheckpointError(
                f"{name}: arrays of dtype {array.dtype!r} are not saved; cast it to one of "
                f"{', '.join(DTYPES)}"
            )
        self._take_name(name)
        held = array_memory.holding(array).to_host(array)
        self.tensors[name] = np.ascontiguousarray(held).reshape(array.shape)
        return name

    def _take_name(self, name: str) -> None:
        if name in self._names:
            raise CheckpointError(f"{name}: two objects have this name; rename one of them")
        try:
            name.encode()
        except UnicodeEncodeError:
            raise CheckpointError(f"{name!r}: a name must be valid Unicode") from None
        self._names.add(name)
