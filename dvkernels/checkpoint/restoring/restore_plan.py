"""Which saved tensors and data go where in the objects of a program: a plan, before any is touched.

Everything that can be wrong is found here, but for what only the bytes show.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
from dvkernels.checkpoint.objects import STEPS, HasSlots, HasState, child
from dvkernels.devices import array_memory
from dvkernels.devices.buffers import Spec
from dvkernels.errors import CheckpointError
from dvkernels.user_errors import shown
from dvkernels.variables.modes import VariableAggregation, VariableSynchronization
from dvkernels.variables.variable import Variable, assign_first_copy, copies_of

__all__: list[str] = []


@dataclass
class Change:
    """An object that takes something over, and can be given back what it has."""

    path: str
    get: Callable[[], Any]
    set: Callable[[Any], Any]
    new: Any


@dataclass
class RestorePlan:
    """What a restore does, in this order: changes, loads, finishing touches."""

    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    # Arrays of our own that states are made of: read before anything is touched.
    staged: dict[str, Any] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    # The arrays that each tensor fills, in full.
    loads: dict[str, list[Any]] = field(default_factory=dict)
    # What is left to do when the loads are done, to arrays only; may be done again after them.
    finish: list[Callable[[], None]] = field(default_factory=list)
    # What stands at the top after the restore: the same objects, and new immutable ones.
    values: dict[str, Any] = field(default_factory=dict)


def match(own: Mapping[str, Any], manifest: Manifest) -> RestorePlan:
    """Return how to restore objects from a checkpoint; nothing is touched."""
    return _RestorePlanner(own, manifest).plan


class _RestorePlanner:
    def __init__(self, own: Mapping[str, Any], manifest: Manifest) -> None:
        self._manifest = manifest
        self._variables = objects.variables_of(own)
        self._filled_from: dict[int, tuple[str, ...]] = {}
        self._with_slots: list[tuple[HasSlots, StateNode, str]] = []
        self.plan = plan = RestorePlan()
        plan.values = self._children(own, manifest.objects, "")
        # When it is known which variables are restored.
        for optimizer, node, path in self._with_slots:
            self._slots(optimizer, node, path)

    def _children(
        self, own: Mapping[str, Any], saved: Mapping[str, Node], path: str
    ) -> dict[str, Any]:
        """Match what has the same name; return what each child is after the restore."""
        self.plan.unexpected += [child(path, name) for name in saved if name not in own]
        results: dict[str, Any] = {}
        for name, value in own.items():
            here = child(path, name)
            if name in saved:
                results[name] = self._match(value, saved[name], here)
            else:
                self.plan.missing.append(here)
                results[name] = value
        return results

    def _match(self, own: Any, node: Node, path: str) -> Any:
        """Plan how to restore one object; return what it is afterwards."""
        match node:
            case VariableNode() | ArrayNode() if isinstance(own, Variable | np.ndarray):
                names = node.tensors if isinstance(node, VariableNode) else (node.tensor,)
                self._fill(own, names, path)
                self.plan.matched.append(path)
                return own
            case GeneratorNode() if generators.is_generator(own):
                self._generator(own, node, path)
                return own
            case StateNode() if objects.is_object(own) and isinstance(own, HasState):
                self._state(own, node, path)
                return own
            case DataNode() if json_codec.is_plain(own):
                self.plan.matched.append(path)
                return self._data(own, node.value, path)
            case NestNode() | DataNode() if not objects.is_object(own):
                saved = _items(node)
                inner = objects.opened(own, path)
                if saved is not None and inner is not None:
                    return self._nest(own, inner, saved, path)
        raise CheckpointError(
            f"{path}: expected {_described(own)}; the checkpoint holds {_described_node(node)}; "
            f"leave it out, or restore into an object of the kind that was saved"
        )

    # -- tensors --------------------------------------------------------------------------------

    def _fill(self, own: Any, names: tuple[str, ...], path: str) -> None:
        """Plan which copies get which tensors."""
        is_variable = isinstance(own, Variable)
        label = f"{path}: variable {own.name!r}" if is_variable else path
        entries = [self._manifest.tensors[name] for name in names]
        for entry in entries:
            _check_spec(label, own, entry)
        before = self._filled_from.get(id(own))
        if before is not None:
            if before == names or self._alike([*before, *names]):
                return
            raise CheckpointError(
                f"{label} stands at two paths here, and two different tensors are saved for them, "
                f"{before[0]!r} and {names[0]!r}; restore into separate objects"
            )
        self._filled_from[id(own)] = names
        targets = list(copies_of(own)) if is_variable else [own]
        if len(names) == 1:
            self._load(names[0], targets)
            if is_variable and _is_shared_out(own):
                self.plan.finish.append(lambda: assign_first_copy(own))
        elif _has_own_copies(own) and len(names) == own.owner.num_replicas:
            first = own.owner.first_replica  # of this process
            for name, target in zip(names[first:], targets, strict=False):
                self._load(name, [target])
        elif self._alike(names):
            self._load(names[0], targets)
        else:
            count = own.owner.num_replicas if is_variable else 1
            raise CheckpointError(
                f"{label}: {len(names)} copies that differ were saved, one for each replica; here "
                f"there are {count} "
                f"{'copies' if _has_own_copies(own) else 'that must be equal'}; restore on "
                f"{len(names)} replicas, or bring the copies together (v.sync()) before saving"
            )

    def _alike(self, names: list[str] | tuple[str, ...]) -> bool:
        return len({self._manifest.tensors[name].checksums for name in names}) == 1

    def _load(self, name: str, targets: list[Any]) -> None:
        held = array_memory.holding(targets[0])
        if not all(map(held.is_writable, targets)):
            raise CheckpointError(
                f"{name}: the array to restore into is read-only; make it writable"
            )
        is_host = held is array_memory.HOST
        direct = [target for target in targets if is_host and target.flags.c_contiguous]
        if len(direct) < len(targets):  # they lie on a GPU, or not in one piece
            between = np.empty(targets[0].shape, targets[0].dtype)
            self.plan.finish.append(_copying(targets, between))
            direct = [between]
        self.plan.loads.setdefault(name, []).extend(direct)

    def _slots(self, optimizer: HasSlots, node: StateNode, path: str) -> None:
        """Plan the slots of an optimizer: they are made where there are none yet."""
        slots_path = child(path, "slots")
        names = tuple(optimizer.slot_names)
        slotted = {id(variable): variable for variable in optimizer.slotted}
        for of, saved in node.slots.items():
            variable = self._variables.get(of)
            if variable is None or id(variable) not in self._filled_from:
                self.plan.unexpected.append(f"{slots_path}/{of}")
                continue
            if saved.keys() - {STEPS} != set(names):
                raise CheckpointError(
                    f"{slots_path}/{of}: expected the slots {', '.join(names) or '(none)'}; the "
                    f"checkpoint holds {', '.join(saved) or '(none)'}; make the optimizer as it was"
                )
            for name, slot in zip(names, optimizer.slots(variable), strict=True):
                self._fill(slot, (saved[name],), f"{slots_path}/{of}/{name}")
            steps = optimizer.steps(variable)
            if STEPS in saved:
                self._fill(steps, (saved[STEPS],), f"{slots_path}/{of}/{STEPS}")
            else:  # written when all variables of an optimizer had one count
                self.plan.finish.append(_setting(steps, optimizer))
            slotted.pop(id(variable), None)
        known = {id(variable) for variable in self._variables.values()}
        for variable in slotted.values():
            if id(variable) in self._filled_from:
                # It had none when it was saved, and none means zeros.
                slots = [each for slot in optimizer.slots(variable) for each in copies_of(slot)]
                self.plan.finish.append(_zeroing([*slots, optimizer.steps(variable)]))
            elif id(variable) not in known:
                self.plan.missing.append(
                    f"{slots_path} of variable {variable.name!r}, which is not among the objects"
                )

    # -- states ---------------------------------------------------------------------------------

    def _generator(self, own: Any, node: GeneratorNode, path: str) -> None:
        if node.type != generators.kind(own):
            raise CheckpointError(
                f"{path}: expected the state of a {generators.kind(own)}; the checkpoint holds "
                f"that of a {node.type:.80}; make the generator as it was"
            )
        state = json_codec.decode(node.value, path, self._stage)
        generators.check(own, state, path)
        self.plan.changes.append(
            Change(
                path,
                lambda: copy.deepcopy(generators.state(own)),
                lambda given: generators.set_state(own, given),
                state,
            )
        )
        self.plan.matched.append(path)

    def _state(self, own: HasState, node: StateNode, path: str) -> None:
        state = json_codec.decode(node.value, path, self._stage)
        get, set_ = own.state_dict, own.load_state_dict
        if isinstance(own, HasSlots):
            get, set_ = own.progress, own.set_progress
            self._with_slots.append((own, node, path))
        self._change(path, lambda: copy.deepcopy(get()), set_, state)
        self.plan.matched.append(path)
        if node.slots and not isinstance(own, HasSlots):
            raise CheckpointError(
                f"{path}: the checkpoint holds an optimizer's slots; the {type(own).__name__} "
                f"here has none"
            )

    def _stage(self, name: str) -> Any:
        """Return an array of our own that will hold a tensor."""
        entry = self._manifest.tensors[name]
        if name not in self.plan.staged:
            try:
                self.plan.staged[name] = np.empty(entry.shape, DTYPES[entry.dtype])
            except (MemoryError, ValueError) as error:
                raise CheckpointError(f"{name}: {error}") from error
        return self.plan.staged[name]

    # -- data and containers --------------------------------------------------------------------

    def _data(self, own: Any, saved: Any, path: str) -> Any:
        """Plan to make a list or dict what was saved, in place; return anything else."""
        if type(own) is list and type(saved) is list:
            self._change(
                path, lambda: [*own], lambda given: own.__setitem__(slice(None), given), saved
            )
        elif type(own) is dict and type(saved) is dict:
            self._change(path, lambda: {**own}, lambda given: _replace(own, given), saved)
        elif type(own) in (list, dict):
            raise CheckpointError(
                f"{path}: expected a {type(own).__name__}; the checkpoint holds {shown(saved)}, a "
                f"{type(saved).__name__}"
            )
        else:
            return saved
        return own

    def _nest(self, own: Any, inner: objects.Opened, saved: dict[str, Node], path: str) -> Any:
        values = list(self._children(inner.children, saved, path).values())
        before = dict(zip(inner.keys, inner.children.values(), strict=True))
        new = {
            key: value
            for key, value in zip(inner.keys, values, strict=True)
            if value is not before[key]
        }
        if not new:
            return own
        store = _storing(own)
        if store is None:
            return inner.rebuild(values)

        def put(given: dict[Any, Any]) -> None:
            for key, value in given.items():
                store(own, key, value)

        self._change(path, lambda: {key: before[key] for key in new}, put, new)
        return own

    def _change(
        self, path: str, get: Callable[[], Any], set_: Callable[[Any], Any], new: Any
    ) -> None:
        self.plan.changes.append(Change(path, get, set_, new))


def _storing(own: Any) -> Callable[[Any, Any, Any], None] | None:
    """Return what puts a child into a container; None if it cannot be changed."""
    if isinstance(own, dict | list | deque):
        return operator.setitem
    if dataclasses.is_dataclass(own) and not getattr(own, "__dataclass_params__").frozen:  # noqa: B009
        return setattr
    return None


def _items(node: NestNode | DataNode) -> dict[str, Node] | None:
    """Return the children of a saved container, None if it is none."""
    if isinstance(node, NestNode):
        return node.items
    if isinstance(node.value, dict):
        return {str(key): DataNode(value) for key, value in node.value.items()}
    if isinstance(node.value, list | tuple):
        return {str(place): DataNode(value) for place, value in enumerate(node.value)}
    return None


def _check_spec(label: str, own: Any, entry: TensorEntry) -> None:
    dtype = DTYPES[entry.dtype]
    if own.shape != entry.shape or own.dtype != dtype:
        raise CheckpointError(
            f"{label}: expected {Spec(own.shape, own.dtype)}; the checkpoint holds "
            f"{Spec(entry.shape, dtype)}; restore into an object of that shape and dtype, or leave "
            f"it out"
        )


def _has_own_copies(own: Any) -> bool:
    return isinstance(own, Variable) and own.synchronization is not VariableSynchronization.ON_WRITE


def _is_shared_out(variable: Variable) -> bool:
    """Say whether one value is dealt out to the copies, so that together they make it."""
    return (
        variable.synchronization is VariableSynchronization.ON_READ
        and variable.aggregation is VariableAggregation.SUM
    )


def _copying(targets: Sequence[Any], source: Any) -> Callable[[], None]:
    return lambda: array_memory.holding(targets[0]).overwrite(targets, [source] * len(targets))


def _replace(own: dict[Any, Any], saved: dict[Any, Any]) -> None:
    own.clear()
    own.update(saved)


def _zeroing(arrays: Sequence[Any]) -> Callable[[], None]:
    def fill() -> None:
        for array in arrays:
            array.fill(0)

    return fill


def _setting(steps: Any, optimizer: HasSlots) -> Callable[[], None]:
    return lambda: steps.fill(optimizer.iterations)


def _described(own: Any) -> str:
    if isinstance(own, Variable):
        return f"the variable {own.name!r}"
    return f"what fits {shown(own)}, a {type(own).__name__}"


def _described_node(node: Node) -> str:
    if isinstance(node, GeneratorNode | StateNode | NestNode):
        return f"a {node.type:.80} ({node.kind})"
    return shown(node.value) if isinstance(node, DataNode) else f"a {node.kind}"
