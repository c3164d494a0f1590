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
from dvkernels.checkpoint.format.manifest import Manifest
from dvkernels.checkpoint.format.nodes import (
    ArrayNode,
    DataNode,
    GeneratorNode,
    NestNode,
    Node,
    StateNode,
    VariableNode,
)
from dvkernels.checkpoint.generators import RandomGenerator
from dvkernels.checkpoint.objects import (
    STEPS,
    HasSlots,
    HasState,
    ObjectTree,
    child,
    unopened,
)
from dvkernels.checkpoint.restoring.tensor_loads import TensorLoads
from dvkernels.devices.array_spec import HostArray
from dvkernels.errors import CheckpointError
from dvkernels.user_errors import brief
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
    """Actions of a restore, in this order: changes, loads."""

    loads: TensorLoads
    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    # The objects by name after the restore: the same mutable ones, and new immutable ones.
    values: dict[str, Any] = field(default_factory=dict)


def plan_restore(tree: ObjectTree, manifest: Manifest) -> RestorePlan:
    """Plan the restore of a program's objects from a checkpoint, without changing any."""
    return _RestorePlanner(tree, manifest).plan


class _RestorePlanner:
    def __init__(self, tree: ObjectTree, manifest: Manifest) -> None:
        self._tree = tree
        self._loads = TensorLoads(manifest.tensors)
        self._with_slots: list[tuple[HasSlots, StateNode, str]] = []
        self.plan = RestorePlan(self._loads)
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
        result = target = unopened(item)
        match node:
            case VariableNode() | ArrayNode() if isinstance(target, Variable | np.ndarray):
                names = node.tensors if isinstance(node, VariableNode) else (node.tensor,)
                self._loads.fill(target, names, path)
            case GeneratorNode() if generators.is_generator(target):
                self._generator(target, node, path)
            case StateNode() if objects.is_object(target) and isinstance(target, HasState):
                self._state(target, node, path)
            case DataNode() if self._tree.is_plain(target):
                result = self._data(target, node.value, path)
            case NestNode() | DataNode() if not objects.is_object(target):
                return self._nest(item, node, path)
            case _:
                raise _mismatch(target, node, path)
        self.plan.matched.append(path)
        return result

    def _slots(self, optimizer: HasSlots, node: StateNode, path: str) -> None:
        """Plan the restore of an optimizer's slots; missing slots are created."""
        slots_path = child(path, "slots")
        names = tuple(optimizer.slot_names)
        slotted = {id(variable): variable for variable in optimizer.slotted}
        for variable_path, saved in node.slots.items():
            here = f"{slots_path}/{variable_path}"
            variable = self._tree.variables.get(variable_path)
            if variable is None or not self._loads.fills(variable):
                self.plan.unexpected.append(here)
                continue
            if saved.keys() - {STEPS} != set(names):
                raise CheckpointError(
                    f"{here}: expected the slots {', '.join(names) or '(none)'}; the checkpoint "
                    f"holds {', '.join(saved) or '(none)'}; create the optimizer with the "
                    f"arguments that it had"
                )
            for name, slot in zip(names, optimizer.slots(variable), strict=True):
                self._loads.fill(slot, (saved[name],), f"{here}/{name}")
            steps = optimizer.steps(variable)
            if STEPS in saved:
                self._loads.fill(steps, (saved[STEPS],), f"{here}/{STEPS}")
            else:  # an older checkpoint, with one step count for all variables of an optimizer
                self._loads.finish.append(
                    functools.partial(_fill_with_iterations, steps, optimizer)
                )
            elsewhere = variable.owner.optimizer_states
            if elsewhere is not None:
                set_steps = functools.partial(elsewhere.set_steps, optimizer, variable, steps)
                self._loads.finish.append(set_steps)
            slotted.pop(id(variable), None)
        known = {id(variable) for variable in self._tree.variables.values()}
        for variable in slotted.values():
            if self._loads.fills(variable):
                # A variable that had no slots when it was saved restarts with zeros.
                elsewhere = variable.owner.optimizer_states
                if elsewhere is not None:
                    load = functools.partial(elsewhere.load, optimizer, variable, {}, 0)
                    self._loads.finish.append(load)
                    continue
                slots = [each for slot in optimizer.slots(variable) for each in copies_of(slot)]
                arrays = [*slots, optimizer.steps(variable)]
                self._loads.finish += [functools.partial(array.fill, 0) for array in arrays]
            elif id(variable) not in known:
                self.plan.missing.append(
                    f"{slots_path} of variable {variable.name!r}, which is not among the objects"
                )

    def _generator(self, target: RandomGenerator, node: GeneratorNode, path: str) -> None:
        if node.type != generators.kind(target):
            raise CheckpointError(
                f"{path}: expected the state of a {generators.kind(target)}; the checkpoint holds "
                f"that of a {node.type:.80}; create a generator of that kind"
            )
        state = json_codec.decode(node.value, path, self._loads.stage)
        generators.check(target, state, path)
        self._change(
            path,
            lambda: copy.deepcopy(generators.state(target)),
            lambda given: generators.set_state(target, given),
            state,
        )

    def _state(self, target: HasState, node: StateNode, path: str) -> None:
        state = json_codec.decode(node.value, path, self._loads.stage)
        get, set_ = target.state_dict, target.load_state_dict
        if isinstance(target, HasSlots):
            get, set_ = target.progress, target.set_progress
            self._with_slots.append((target, node, path))
        self._change(path, lambda: copy.deepcopy(get()), set_, state)
        if node.slots and not isinstance(target, HasSlots):
            raise CheckpointError(
                f"{path}: the checkpoint holds an optimizer's slots; the {type(target).__name__} "
                f"here has none"
            )

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

    def _nest(self, item: Any, node: NestNode | DataNode, path: str) -> Any:
        """Plan to replace the children of a container that are new objects."""
        target, saved = unopened(item), _items(node)
        # Plain data is a leaf of the tree, but a container may have been saved.
        container = objects.open_container(target, path) if item is target else item
        if saved is None or container is None:
            raise _mismatch(target, node, path)
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


def _replace(target: dict[Any, Any], saved: dict[Any, Any]) -> None:
    target.clear()
    target.update(saved)


def _fill_with_iterations(steps: HostArray, optimizer: HasSlots) -> None:
    steps.fill(optimizer.iterations)


def _mismatch(target: Any, node: Node, path: str) -> CheckpointError:
    expected = f"a saved object that matches {brief(target)}, a {type(target).__name__}"
    if isinstance(target, Variable):
        expected = f"the variable {target.name!r}"
    match node:
        case GeneratorNode() | StateNode() | NestNode():
            found = f"a {node.type:.80} ({node.kind})"
        case DataNode():
            found = brief(node.value)
        case _:
            found = f"a {node.kind}"
    return CheckpointError(
        f"{path}: expected {expected}; the checkpoint holds {found}; leave it out, or restore into "
        f"an object of the saved kind"
    )
