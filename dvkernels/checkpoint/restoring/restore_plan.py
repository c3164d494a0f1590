"""Plan of a restore: the saved tensor or data for each object, made before any object changes.

Every mismatch is found here; only damage of the tensors' bytes is found later.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import operator
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from dvkernels.checkpoint import generators, objects
from dvkernels.checkpoint.format import json_codec
from dvkernels.checkpoint.format.manifest import Manifest, TensorEntry
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
from dvkernels.checkpoint.objects import (
    STEPS,
    HasSlots,
    HasState,
    ObjectTree,
    OpenedContainer,
    child,
    unopened,
)
from dvkernels.devices import array_memory
from dvkernels.devices.array_spec import HostArray, Spec
from dvkernels.errors import CheckpointError
from dvkernels.user_errors import brief
from dvkernels.variables.modes import VariableAggregation, VariableSynchronization
from dvkernels.variables.saved_variable import assign_first_copy
from dvkernels.variables.variable import Variable, copies_of

__all__: list[str] = []


class Change(NamedTuple):
    """Reversible change of one object: getter and setter of its state, and the new state."""

    path: str
    get: Callable[[], Any]
    set: Callable[[Any], Any]
    new: Any


@dataclass
class RestorePlan:
    """Actions of a restore, in this order: changes, loads, finish."""

    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    # New arrays, by tensor, that become part of states: read before any object changes.
    staged: dict[str, HostArray] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    # The target arrays of each tensor, all contiguous and in host memory.
    loads: dict[str, list[HostArray]] = field(default_factory=dict)
    # Called after the loads; they change arrays only, and may be repeated with the loads.
    finish: list[Callable[[], object]] = field(default_factory=list)
    # The objects by name after the restore: the same mutable ones, and new immutable ones.
    values: dict[str, Any] = field(default_factory=dict)


def plan_restore(tree: ObjectTree, manifest: Manifest) -> RestorePlan:
    """Plan the restore of a program's objects from a checkpoint, without changing any."""
    return _RestorePlanner(tree, manifest).plan


class _RestorePlanner:
    def __init__(self, tree: ObjectTree, manifest: Manifest) -> None:
        self._tree = tree
        self._manifest = manifest
        self._filled_from: dict[int, tuple[str, ...]] = {}
        self._with_slots: list[tuple[HasSlots, StateNode, str]] = []
        self.plan = RestorePlan()
        self.plan.values = self._children(tree.items, manifest.objects, "")
        # Last, when all variables have been matched.
        for optimizer, node, path in self._with_slots:
            self._slots(optimizer, node, path)

    def _children(
        self, items: Mapping[str, Any], saved: Mapping[str, Node], path: str
    ) -> dict[str, Any]:
        """Match the children that have the same name; return each child after the restore."""
        self.plan.unexpected += [child(path, name) for name in saved if name not in items]
        results: dict[str, Any] = {}
        for name, item in items.items():
            here = child(path, name)
            if name in saved:
                results[name] = self._match(item, saved[name], here)
            else:
                self.plan.missing.append(here)
                results[name] = unopened(item)
        return results

    def _match(self, item: Any, node: Node, path: str) -> Any:
        """Plan the restore of one object; return the object after the restore."""
        target = unopened(item)
        match node:
            case VariableNode() | ArrayNode() if isinstance(target, Variable | np.ndarray):
                names = node.tensors if isinstance(node, VariableNode) else (node.tensor,)
                self._fill(target, names, path)
                self.plan.matched.append(path)
                return target
            case GeneratorNode() if generators.is_generator(target):
                self._generator(target, node, path)
                return target
            case StateNode() if objects.is_object(target) and isinstance(target, HasState):
                self._state(target, node, path)
                return target
            case DataNode() if self._tree.is_plain(target):
                self.plan.matched.append(path)
                return self._data(target, node.value, path)
            case NestNode() | DataNode() if not objects.is_object(target):
                saved = _items(node)
                # Plain data is a leaf of the tree, but a container may have been saved.
                container = objects.open_container(target, path) if item is target else item
                if saved is not None and container is not None:
                    return self._nest(container, saved, path)
        raise CheckpointError(
            f"{path}: expected {_described(target)}; the checkpoint holds {_described_node(node)}; "
            f"leave it out, or restore into an object of the saved kind"
        )

    # -- tensors --------------------------------------------------------------------------------

    def _fill(self, target: Any, names: tuple[str, ...], path: str) -> None:
        """Plan which tensor is loaded into each copy of a variable, or into an array."""
        is_variable = isinstance(target, Variable)
        label = f"{path}: variable {target.name!r}" if is_variable else path
        entries = [self._manifest.tensors[name] for name in names]
        for entry in entries:
            _check_spec(label, target, entry)
        previous = self._filled_from.get(id(target))
        if previous is not None:
            if previous == names or self._are_equal([*previous, *names]):
                return
            raise CheckpointError(
                f"{label} has two paths here, and two different tensors are saved for them, "
                f"{previous[0]!r} and {names[0]!r}; restore into separate objects"
            )
        self._filled_from[id(target)] = names
        copies = list(copies_of(target)) if is_variable else [target]
        if len(names) == 1:
            self._load(names[0], copies)
            if is_variable and _is_shared_out(target):
                self.plan.finish.append(functools.partial(assign_first_copy, target))
        elif _has_own_copies(target) and len(names) == target.owner.num_replicas:
            first = target.owner.first_replica  # of this process
            for name, array in zip(names[first:], copies, strict=False):
                self._load(name, [array])
        elif self._are_equal(names):
            self._load(names[0], copies)
        else:
            count = target.owner.num_replicas if is_variable else 1
            raise CheckpointError(
                f"{label}: {len(names)} copies that differ were saved, one per replica; here "
                f"there are {count} "
                f"{'copies' if _has_own_copies(target) else 'that must be equal'}; restore on "
                f"{len(names)} replicas, or make the copies equal (v.sync()) before saving"
            )

    def _are_equal(self, names: list[str] | tuple[str, ...]) -> bool:
        return len({self._manifest.tensors[name].checksums for name in names}) == 1

    def _load(self, name: str, targets: list[Any]) -> None:
        memory = array_memory.holding(targets[0])
        if not all(map(memory.is_writable, targets)):
            raise CheckpointError(
                f"{name}: the array to restore into is read-only; make it writable"
            )
        is_host = memory is array_memory.HOST
        direct = [target for target in targets if is_host and target.flags.c_contiguous]
        if len(direct) < len(targets):  # on a GPU, or not contiguous
            staging = np.empty(targets[0].shape, targets[0].dtype)
            sources = [staging] * len(targets)
            self.plan.finish.append(functools.partial(memory.overwrite, targets, sources))
            direct = [staging]
        self.plan.loads.setdefault(name, []).extend(direct)

    def _slots(self, optimizer: HasSlots, node: StateNode, path: str) -> None:
        """Plan the restore of an optimizer's slots; missing slots are created."""
        slots_path = child(path, "slots")
        names = tuple(optimizer.slot_names)
        slotted = {id(variable): variable for variable in optimizer.slotted}
        for variable_path, saved in node.slots.items():
            here = f"{slots_path}/{variable_path}"
            variable = self._tree.variables.get(variable_path)
            if variable is None or id(variable) not in self._filled_from:
                self.plan.unexpected.append(here)
                continue
            if saved.keys() - {STEPS} != set(names):
                raise CheckpointError(
                    f"{here}: expected the slots {', '.join(names) or '(none)'}; the checkpoint "
                    f"holds {', '.join(saved) or '(none)'}; create the optimizer with the "
                    f"arguments that it had"
                )
            for name, slot in zip(names, optimizer.slots(variable), strict=True):
                self._fill(slot, (saved[name],), f"{here}/{name}")
            steps = optimizer.steps(variable)
            if STEPS in saved:
                self._fill(steps, (saved[STEPS],), f"{here}/{STEPS}")
            else:  # an older checkpoint, with one step count for all variables of an optimizer
                self.plan.finish.append(functools.partial(_fill_with_iterations, steps, optimizer))
            slotted.pop(id(variable), None)
        known = {id(variable) for variable in self._tree.variables.values()}
        for variable in slotted.values():
            if id(variable) in self._filled_from:
                # A variable that had no slots when it was saved restarts with zeros.
                slots = [each for slot in optimizer.slots(variable) for each in copies_of(slot)]
                arrays = [*slots, optimizer.steps(variable)]
                self.plan.finish += [functools.partial(array.fill, 0) for array in arrays]
            elif id(variable) not in known:
                self.plan.missing.append(
                    f"{slots_path} of variable {variable.name!r}, which is not among the objects"
                )

    # -- states ---------------------------------------------------------------------------------

    def _generator(self, target: Any, node: GeneratorNode, path: str) -> None:
        if node.type != generators.kind(target):
            raise CheckpointError(
                f"{path}: expected the state of a {generators.kind(target)}; the checkpoint holds "
                f"that of a {node.type:.80}; create a generator of that kind"
            )
        state = json_codec.decode(node.value, path, self._stage)
        generators.check(target, state, path)
        self._change(
            path,
            lambda: copy.deepcopy(generators.state(target)),
            lambda given: generators.set_state(target, given),
            state,
        )
        self.plan.matched.append(path)

    def _state(self, target: HasState, node: StateNode, path: str) -> None:
        state = json_codec.decode(node.value, path, self._stage)
        get, set_ = target.state_dict, target.load_state_dict
        if isinstance(target, HasSlots):
            get, set_ = target.progress, target.set_progress
            self._with_slots.append((target, node, path))
        self._change(path, lambda: copy.deepcopy(get()), set_, state)
        self.plan.matched.append(path)
        if node.slots and not isinstance(target, HasSlots):
            raise CheckpointError(
                f"{path}: the checkpoint holds an optimizer's slots; the {type(target).__name__} "
                f"here has none"
            )

    def _stage(self, name: str) -> HostArray:
        """Return a new array into which a tensor will be read."""
        entry = self._manifest.tensors[name]
        if name not in self.plan.staged:
            try:
                self.plan.staged[name] = np.empty(entry.shape, DTYPES[entry.dtype])
            except (MemoryError, ValueError) as error:
                raise CheckpointError(f"{name}: {error}") from error
        return self.plan.staged[name]

    # -- data and containers --------------------------------------------------------------------

    def _data(self, target: Any, saved: Any, path: str) -> Any:
        """Plan to change a list or dict in place; return other saved data as it is."""
        if type(target) is list and type(saved) is list:
            self._change(
                path, lambda: [*target], lambda given: target.__setitem__(slice(None), given), saved
            )
        elif type(target) is dict and type(saved) is dict:
            self._change(path, lambda: {**target}, lambda given: _replace(target, given), saved)
        elif type(target) in (list, dict):
            raise CheckpointError(
                f"{path}: expected a {type(target).__name__}; the checkpoint holds "
                f"{brief(saved)}, a {type(saved).__name__}"
            )
        else:
            return saved
        return target

    def _nest(self, container: OpenedContainer, saved: dict[str, Node], path: str) -> Any:
        """Plan to replace the children of a container that are new objects."""
        target = container.value
        values = list(self._children(container.children, saved, path).values())
        previous = map(unopened, container.children.values())
        new, old = {}, {}
        for key, value, before in zip(container.keys, values, previous, strict=True):
            if value is not before:
                new[key], old[key] = value, before
        if not new:
            return target
        set_child = _child_setter(target)
        if set_child is None:
            return container.rebuild(values)

        def set_children(given: dict[Any, Any]) -> None:
            for key, value in given.items():
                set_child(target, key, value)

        self._change(path, lambda: old, set_children, new)
        return target

    def _change(
        self, path: str, get: Callable[[], Any], set_: Callable[[Any], Any], new: Any
    ) -> None:
        self.plan.changes.append(Change(path, get, set_, new))


def _child_setter(target: Any) -> Callable[[Any, Any, Any], None] | None:
    """Return a function that sets a child of a container; None for an immutable container."""
    if isinstance(target, dict | list | deque):
        return operator.setitem
    if dataclasses.is_dataclass(target) and not getattr(target, "__dataclass_params__").frozen:  # noqa: B009
        return setattr
    return None


def _items(node: NestNode | DataNode) -> dict[str, Node] | None:
    """Return the children of a saved container; None for other nodes."""
    if isinstance(node, NestNode):
        return node.items
    if isinstance(node.value, dict):
        return {str(key): DataNode(value) for key, value in node.value.items()}
    if isinstance(node.value, list | tuple):
        return {str(index): DataNode(value) for index, value in enumerate(node.value)}
    return None


def _check_spec(label: str, target: Any, entry: TensorEntry) -> None:
    dtype = DTYPES[entry.dtype]
    if target.shape != entry.shape or target.dtype != dtype:
        raise CheckpointError(
            f"{label}: expected {Spec(target.shape, target.dtype)}; the checkpoint holds "
            f"{Spec(entry.shape, dtype)}; restore into an object of that shape and dtype, or leave "
            f"it out"
        )


def _has_own_copies(target: Any) -> bool:
    return (
        isinstance(target, Variable)
        and target.synchronization is not VariableSynchronization.ON_WRITE
    )


def _is_shared_out(variable: Variable) -> bool:
    """Return whether a value is shared out over the copies, which are then summed when read."""
    return (
        variable.synchronization is VariableSynchronization.ON_READ
        and variable.aggregation is VariableAggregation.SUM
    )


def _replace(target: dict[Any, Any], saved: dict[Any, Any]) -> None:
    target.clear()
    target.update(saved)


def _fill_with_iterations(steps: HostArray, optimizer: HasSlots) -> None:
    steps.fill(optimizer.iterations)


def _described(target: Any) -> str:
    if isinstance(target, Variable):
        return f"the variable {target.name!r}"
    return f"a saved object that matches {brief(target)}, a {type(target).__name__}"


def _described_node(node: Node) -> str:
    if isinstance(node, GeneratorNode | StateNode | NestNode):
        return f"a {node.type:.80} ({node.kind})"
    return brief(node.value) if isinstance(node, DataNode) else f"a {node.kind}"
