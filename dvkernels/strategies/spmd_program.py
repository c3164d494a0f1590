"""SPMD programs: a step compiled by JAX, its inputs and outputs, and its calls.

The function is evaluated once abstractly, which finds the variables that it reads and writes. It is
then traced with exactly these as inputs, and the written ones donated. A variable is one global
array, whose copies may differ: every device sees its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, starmap
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dvkernels import context, pytree, user_errors
from dvkernels.communicators.jax import lowering, shard_map
from dvkernels.devices import interop, jax_devices
from dvkernels.devices.array_spec import spec
from dvkernels.errors import BufferMismatchError
from dvkernels.kernels import update_rules
from dvkernels.optimizers import functional_step
from dvkernels.strategies.traced_replica import TracedReplica
from dvkernels.values import regroup
from dvkernels.values.distributed import Mirrored, PerReplica
from dvkernels.values.placement import Placement
from dvkernels.variables.copies import rebind
from dvkernels.variables.immutable_copies import ImmutableCopies
from dvkernels.variables.traced_state import TracedState

__all__: list[str] = []

_NOTE = (
    "strategy.jit: a compiled step is traced once for all replicas and values, so no branch, "
    "float() or NumPy function of Python can depend on a replica id or a traced value; use "
    "jax.lax.cond or jax.numpy.where, or run the function itself, uncompiled: "
    "strategy.run(fn, args)"
)
_NUMBERS = (bool, int, float, complex, np.generic)


class _Box:
    """Place of one result of a program, which is stored as the content of a variable is."""

    __slots__ = ("content",)
    content: Any


class StepArguments(NamedTuple):
    """Flattened arguments of a call: what is traced, and what is a constant of the program."""

    key: Any
    structure: pytree.Structure
    traced: tuple[Any, ...]  # global arrays
    constants: tuple[Any, ...]  # one for each leaf; a traced leaf has ``_TRACED``

    def rebuilt(self, traced: Sequence[Any]) -> Any:
        """Return the arguments of the function, given the traced arrays."""
        values = iter(traced)
        leaves = [next(values) if each is _TRACED else each for each in self.constants]
        return pytree.unflatten(self.structure, leaves)


_TRACED = object()


def arguments_of(
    args: Sequence[Any], kwargs: Mapping[str, Any], placement: Placement
) -> StepArguments:
    """Return the arguments of a call; parts of different shapes raise."""
    leaves, structure = pytree.flatten((tuple(args), dict(kwargs)))
    devices = placement.replica_devices
    constants, traced, pending, places, keys = [], [], [], [], []
    everywhere = jax_devices.replicated(devices)
    for leaf in leaves:
        if isinstance(leaf, PerReplica):
            regroup.check_fits(leaf, placement, "run: ")
            values = leaf.values
            if not all(_is_array(value) for value in values):
                values = _equal_constants(values)
                constants.append(values)
                keys.append(_constant_key(values))
                continue
            _check_even(values)
            pending.extend(values)
            places.extend(map(jax_devices.own, devices))
            traced.append(len(devices))
        else:
            value = leaf.values[0] if isinstance(leaf, Mirrored) else leaf
            if not _is_array(value):
                constants.append(value)
                keys.append(_constant_key(value))
                continue
            pending.append(value)
            places.append(everywhere)
            traced.append(1)
        constants.append(_TRACED)
        keys.append(_TRACED)
    placed = iter(_placed(pending, places))
    whole = []
    for count in traced:
        each = [next(placed) for _ in range(count)]
        is_whole = count == 1 and len(devices) > 1
        whole.append(each[0] if is_whole else shard_map.assembled(each, devices))
    shapes = tuple(
        (array.shape, array.dtype, getattr(array, "weak_type", False)) for array in whole
    )
    return StepArguments(
        (structure, tuple(keys), shapes), structure, tuple(whole), tuple(constants)
    )


def _placed(values: list[Any], places: list[Any]) -> list[Any]:
    """Return values on their devices; what lies there already costs no transfer."""
    for k, value in enumerate(values):
        if not isinstance(value, (np.ndarray, jax.Array, *_NUMBERS)):  # of another library
            values[k] = interop.view("run of a compiled step", value, "an argument")
    moved = [
        k
        for k, (value, place) in enumerate(zip(values, places, strict=True))
        if not (isinstance(value, jax.Array) and value.committed and value.device == place)
    ]
    if moved:
        new = jax.device_put([values[k] for k in moved], [places[k] for k in moved])
        for k, array in zip(moved, new, strict=True):
            values[k] = array
    return values


def _is_array(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biufcV"
    return isinstance(value, (jax.Array, *_NUMBERS)) or interop.is_foreign(value)


def _check_even(values: Sequence[Any]) -> None:
    specs = [spec(value) if hasattr(value, "shape") else type(value) for value in values]
    for replica, each in enumerate(specs):
        if each != specs[0]:
            raise BufferMismatchError(
                f"run of a compiled step: the parts of a PerReplica have one shape and dtype; "
                f"replica 0 has {specs[0]}, replica {replica} has {each}; drop the remainder "
                f"(drop_remainder=True), or pad the batches with InputOptions(pad=True), which "
                f"gives each row a weight, or run the function itself, uncompiled"
            )


def _equal_constants(values: Sequence[Any]) -> Any:
    first = values[0]
    for replica, value in enumerate(values):
        if value is not first and (type(value) is not type(first) or value != first):
            raise BufferMismatchError(
                f"run of a compiled step: what is no array is a constant of the program, and "
                f"replica {replica} has {user_errors.brief(value)}, replica 0 "
                f"{user_errors.brief(first)}; pass arrays, or run the function itself, uncompiled"
            )
    return first


def _constant_key(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return type(value), id(value)
    return type(value), value


class SpmdProgram:
    """Compiled step for arguments of one structure, and the variables that it reads and writes."""

    def __init__(
        self, step: Any, strategy: Any, placement: Placement, given: StepArguments
    ) -> None:
        self._step = step
        self._strategy = strategy
        self._placement = placement
        self._given = given  # of the first call: the constants of the program
        self._results: list[Any] = []  # the leaves of the result; a traced one is ``_TRACED``
        self._structure: pytree.Structure | None = None
        self._has_run = False
        self._known_extras: tuple[Any, Any] = (None, None)
        self._discover()
        self._compiled = jax.jit(self._spmd(self._body), donate_argnums=(0,))

    def _spmd(self, body: Any) -> Any:
        return lowering.spmd(body, jax_devices.mesh(self._placement.replica_devices))

    def _discover(self) -> None:
        """Evaluate the function abstractly, to find the variables that it uses."""
        found: list[TracedState] = []

        def body(given: tuple[Any, ...], zero: Any) -> Any:
            trace = TracedState(None, None, zero.astype(jnp.uint32), zero)
            found.append(trace)
            self._call(trace, given)
            return zero

        jax.eval_shape(self._spmd(body), self._given.traced, jnp.zeros((), jnp.float32))
        (trace,) = found
        self._written: list[ImmutableCopies] = [*trace.written.values()]  # type: ignore[list-item]
        self._kept: list[ImmutableCopies] = [
            copies
            for key, copies in trace.used.items()
            if key not in trace.written  # type: ignore[misc]
        ]
        self._gradient_uses = trace.gradient_uses
        self._uses_step = trace.uses_step

    def _call(self, trace: TracedState, given: Sequence[Any]) -> Any:
        """Call the function once, in the context of a traced replica."""
        replica = TracedReplica(self._placement, self._strategy, trace)
        args, kwargs = self._given.rebuilt(given)
        token = context.enter(context.Frame(self._placement, self._strategy, replica))
        try:
            return self._step.fn(*args, **kwargs)
        except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
            user_errors.annotate(error, _NOTE)
            raise
        finally:
            context.leave(token)

    def _body(self, changed: Any, kept: Any, extras: Any, given: Any) -> tuple[Any, ...]:
        """Return the new contents of the written variables, and the results: what JAX compiles."""
        self._step.count_trace()
        values = {id(c): v for c, v in zip(self._written, changed, strict=True)}
        values |= {id(c): v for c, v in zip(self._kept, kept, strict=True)}
        rows, step = extras
        trace = TracedState(values, rows, step, None)
        leaves, self._structure = pytree.flatten(self._call(trace, given))
        traced = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
        self._results = [_TRACED if isinstance(leaf, jax.Array) else leaf for leaf in leaves]
        return (*(trace.value_of(copies) for copies in self._written), *traced)

    def coefficients_now(self) -> list[update_rules.Coefficients] | None:
        """Return the coefficients of the optimizers; None if the step must be compiled anew."""
        return functional_step.coefficients_now(self._gradient_uses)

    def run(self, given: StepArguments, rows: Sequence[update_rules.Coefficients]) -> Any:
        """Run the program, and rebind the variables that it writes to their new contents."""
        changed = tuple(copies.whole for copies in self._written)
        if not self._has_run:
            # The first call runs Python code of JAX, where an interrupt would lose what it donated.
            changed = tuple(map(jnp.copy, changed))
        kept = tuple(copies.whole for copies in self._kept)
        extras = self._extras(rows)
        boxes: list[_Box] = []
        if not self._has_run:
            self._compiled.lower(changed, kept, extras, given.traced)
        boxes = [_Box() for each in self._results if each is _TRACED]
        call = starmap(self._compiled, [(changed, kept, extras, given.traced)])
        targets: list[Any] = [*self._written, *boxes]
        with shard_map.launching:
            if targets:
                rebind(targets, chain.from_iterable(call))
            else:
                next(call)
        self._has_run = True
        functional_step.count_steps(self._gradient_uses)
        return self._regrouped([box.content for box in boxes])

    def _extras(self, rows: Sequence[update_rules.Coefficients]) -> tuple[Any, Any]:
        """Return the coefficients of the optimizers and the number of the step, on all devices."""
        number = self._strategy.generators.num_done % 2**32 if self._uses_step else 0
        known, extras = self._known_extras
        if known != (rows, number):
            everywhere = jax_devices.replicated(self._placement.replica_devices)
            new = functional_step.padded(rows), np.uint32(number)
            extras = jax.device_put(new, (everywhere, everywhere))
            self._known_extras = (rows, number), extras
        return extras

    def _regrouped(self, traced: Sequence[Any]) -> Any:
        """Return the result of ``run``: a PerReplica for each array."""
        placement, devices = self._placement, self._placement.replica_devices
        arrays = map(shard_map.taken_apart, traced)
        assert self._structure is not None
        if self._results == [None]:
            return None

        def joined(leaf: Any) -> Any:
            if leaf is None or regroup.is_variable(leaf):
                return leaf
            parts = next(arrays) if leaf is _TRACED else [leaf] * len(devices)
            return PerReplica(parts, devices=devices, owner=placement)

        return pytree.unflatten(self._structure, [joined(leaf) for leaf in self._results])


def run(
    step: Any,
    strategy: Any,
    placement: Placement,
    programs: dict[Any, SpmdProgram],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Run a compiled step; compile it where no program fits the arguments."""
    given = arguments_of(args, kwargs, placement)
    key = (given.key, strategy.generators.seed, jax.config.jax_enable_x64)
    program = programs.get(key)
    rows = None if program is None else program.coefficients_now()
    if program is None or rows is None:
        program = SpmdProgram(step, strategy, placement, given)
        rows = program.coefficients_now()
        assert rows is not None
        result = program.run(given, rows)
        programs[key] = program
        return result
    return program.run(given, rows)
