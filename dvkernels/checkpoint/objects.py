"""The user's objects: their kinds, and the tree of containers that holds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from dvkernels import pytree
from dvkernels.checkpoint import generators
from dvkernels.checkpoint.format import json_codec
from dvkernels.communicators.base import Workers
from dvkernels.communicators.single import Single
from dvkernels.devices.array_spec import HostArray
from dvkernels.errors import CheckpointError
from dvkernels.user_errors import brief
from dvkernels.values.placement import Placement
from dvkernels.variables.variable import Variable

__all__: list[str] = []

_MAX_OCCURRENCES = 1 << 20
_SINGLE = Single()


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

    def steps(self, variable: Variable) -> HostArray:
        """Return the step count of a variable, a writable array of shape ()."""

    def progress(self) -> Any:
        """Return the state that does not belong to a variable."""

    def set_progress(self, state: Any) -> Any:
        """Load that state; after an error nothing has changed."""


STEPS = "steps"  # key of the step count among the slots of a variable


class OpenedContainer(NamedTuple):
    """Container with its children by name, their keys, and a function that rebuilds it."""

    value: Any
    children: dict[str, Any]  # of these, the containers may be opened in their turn
    keys: tuple[Any, ...]
    rebuild: Callable[[list[Any]], Any]
    num_containers: int = 1  # with those in it, shared ones at each occurrence


def open_container(value: Any, path: str) -> OpenedContainer | None:
    """Open a container, but not its children; return None for a leaf."""
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
        value,
        dict(zip(names, children, strict=True)),
        tuple(keys),
        lambda children: unflatten(metadata, children),
    )


def unopened(item: Any) -> Any:
    """Return the user's object that an item of an :class:`ObjectTree` stands for."""
    return item.value if isinstance(item, OpenedContainer) else item


def child(path: str, name: str) -> str:
    """Return the path of a child: names joined by "/", as in JSON pointers (RFC 6901)."""
    escaped = name.replace("~", "~0").replace("/", "~1")
    return f"{path}/{escaped}" if path else escaped


def is_object(value: Any) -> bool:
    """Return whether a value is restored in place as a whole, unlike plain data and containers."""
    return (
        isinstance(value, Variable | np.ndarray)
        or generators.is_generator(value)
        or (isinstance(value, HasState) and not isinstance(value, type))
    )


def _workers_of(value: Any) -> Workers:
    """Return the workers of a variable, or of a strategy, which is known by its placement."""
    owner = value.owner if isinstance(value, Variable) else getattr(value, "placement", None)
    return owner.workers if isinstance(owner, Placement) else _SINGLE


class ObjectTree:
    """The user's objects by name, after a walk that visits each of them once.

    Attributes
    ----------
    objects : dict of str to object
        The dict of the user.
    items : dict of str to object
        The same with opened containers, at every depth. A tree of plain data is one leaf.
    variables : dict of str to Variable
        By path; a shared variable at each of its paths.
    workers : Workers
        Those that variables and strategies belong to; without any, a single worker.
    """

    def __init__(self, objects: dict[str, Any]) -> None:
        self.objects = objects
        self.items: dict[str, Any] = {}
        self.variables: dict[str, Variable] = {}
        self.workers: Workers = _SINGLE
        # By id. The containers keep what they hold, so that no other object gets its id.
        self._containers: dict[int, OpenedContainer] = {}
        self._heights: dict[int, int] = {}
        self._ancestors: dict[int, str] = {}  # the paths of the containers being visited, by id
        failure: Exception | None = None
        for name, value in objects.items():
            try:
                self.items[name] = self._opened(value, child("", name), 0)
            except Exception as error:  # raised when the workers are known
                failure = error if failure is None else failure
        if failure is not None:
            self.workers.announce(failure)
            raise failure
        for name, item in self.items.items():
            self._find_variables(item, child("", name))

    def is_plain(self, value: Any) -> bool:
        """Return whether a value is plain data."""
        return json_codec.is_plain(value, self._heights)

    def _opened(self, value: Any, path: str, depth: int) -> Any:
        """Return a leaf itself; open a container and all its children."""
        if id(value) in self._ancestors:
            raise CheckpointError(
                f"{path}: it is the {type(value).__name__} at {self._ancestors[id(value)]} again, "
                f"which contains itself; keep it out of the checkpoint"
            )
        if id(value) in self._containers:
            return self._containers[id(value)]
        if self.workers.size == 1:
            self.workers = _workers_of(value)
        is_leaf = is_object(value) or self.is_plain(value)
        container = None if is_leaf else open_container(value, path)
        if container is None:
            return value
        if depth > json_codec.MAX_DEPTH:
            raise CheckpointError(
                f"{path}: nested deeper than {json_codec.MAX_DEPTH} levels, or contains itself"
            )
        self._ancestors[id(value)] = path
        children = {
            name: self._opened(each, child(path, name), depth + 1)
            for name, each in container.children.items()
        }
        del self._ancestors[id(value)]
        inner = [each for each in children.values() if isinstance(each, OpenedContainer)]
        num_containers = 1 + sum(each.num_containers for each in inner)
        if depth == 0 and num_containers > _MAX_OCCURRENCES:
            raise CheckpointError(
                f"{path}: containers in it occur at more than {_MAX_OCCURRENCES} places; refer to "
                f"a container of variables or arrays from one place only"
            )
        opened = container._replace(children=children, num_containers=num_containers)
        self._containers[id(value)] = opened
        return opened

    def _find_variables(self, item: Any, path: str) -> None:
        if isinstance(item, Variable):
            self.variables[path] = item
        elif isinstance(item, OpenedContainer):
            for name, each in item.children.items():
                self._find_variables(each, child(path, name))
