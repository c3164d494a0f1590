"""SPMD programs: a step compiled by JAX, its inputs and outputs, and its calls.

The function is evaluated once abstractly, which finds the variables that it reads and writes. It is
then traced with exactly these as inputs, and the written ones donated. A variable is one global
array, whose copies may differ: every device sees its own.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, starmap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dvkernels import context, pytree, user_errors
from dvkernels.communicators.jax import lowering, shard_map
from dvkernels.devices.array_spec import spec
from dvkernels.errors import ContextError
from dvkernels.kernels import update_rules
from dvkernels.optimizers import functional_step
from dvkernels.optimizers.functional_step import StepNumbers
from dvkernels.profiler import tracing
from dvkernels.strategies import step_arguments
from dvkernels.strategies.step_arguments import TRACED, StepArguments
from dvkernels.strategies.traced_replica import TracedReplica
from dvkernels.values import regroup
from dvkernels.values.distributed import PerReplica, with_global_array
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
_LEAKED = (
    "strategy.jit: a value was kept, or a variable written, inside a function that JAX traces by "
    "itself (jax.jit, grad, cond, scan); return the value from that function, and assign it outside"
)
_MOST_PROGRAMS = 64  # of one step: the oldest is compiled anew, should it be needed again
_MOST_LAUNCHED = 2  # programs of several processes that may run ahead of Python


class _Box:
    """Place of one result of a program, which is stored as the content of a variable is."""

    __slots__ = ("content",)
    content: Any


class SpmdProgram:
    """Compiled step for arguments of one structure, and the variables that it reads and writes."""

    def __init__(
        self, step: Any, strategy: Any, placement: Placement, given: StepArguments
    ) -> None:
        self._step = step
        self._strategy = strategy
        self._placement = placement
        self._given = given  # of the first call: the constants of the program
        self._results: list[Any] = []  # the leaves of the result; a traced one is ``TRACED``
        self._structure: pytree.Structure | None = None
        self._has_run = False
        self._calls_python = False  # whether it has effects, or callbacks, which can fail
        self._is_joint = placement.workers.size > 1  # a program of several processes
        self._launched: deque[Any] = deque(maxlen=_MOST_LAUNCHED)
        self._known_extras: tuple[Any, Any] = (None, None)
        self._discover()
        self._given = given._replace(traced=())
        self._compiled = jax.jit(self._spmd(self._body), donate_argnums=(0,))
        self._undonated = jax.jit(self._spmd(self._body))  # JAX finds NaN by running it again

    def _spmd(self, body: Any) -> Any:
        return lowering.spmd(body, self._placement.mesh)

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
        self._written: list[ImmutableCopies] = [*trace.written.values()]
        self._kept: list[ImmutableCopies] = [
            copies for key, copies in trace.used.items() if key not in trace.written
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
        # No longer weakly typed, should it be an argument of the next step: as its parts are.
        traced = [
            leaf.astype(leaf.dtype) if getattr(leaf, "weak_type", False) else leaf
            for leaf in leaves
            if isinstance(leaf, jax.Array)
        ]
        self._results = [TRACED if isinstance(leaf, jax.Array) else leaf for leaf in leaves]
        if trace.written.keys() != {*map(id, self._written)}:
            raise ContextError(_LEAKED)
        done = (jnp.zeros(()),) if self._is_joint else ()  # an output that is never donated
        return (*(trace.value_of(copies) for copies in self._written), *traced, *done)

    def numbers_now(self) -> StepNumbers | None:
        """Return the numbers of the optimizers' step; None if it must be compiled anew."""
        return functional_step.numbers_now(self._gradient_uses)

    def run(self, given: StepArguments, numbers: StepNumbers) -> Any:
        """Run the program, and rebind the variables that it writes to their new contents."""
        if not self._is_joint:
            return self._regrouped(self._run(given, numbers))
        workers = self._placement.workers
        with shard_map.losses_of(workers):
            if len(self._launched) == _MOST_LAUNCHED:
                shard_map.await_program(self._launched[0][:1], workers)
            results = self._run(given, numbers)
        return self._regrouped(results)

    def _run(self, given: StepArguments, numbers: StepNumbers) -> Sequence[Any]:
        changed = tuple(copies.whole for copies in self._written)
        kept = tuple(copies.whole for copies in self._kept)
        extras = self._extras(numbers.rows)
        if not self._has_run:
            with tracing.span("trace", "compile"):
                traced = self._compiled.trace(changed, kept, extras, given.traced)
                self._calls_python = bool(traced.jaxpr.effects) or _has_callback(traced.jaxpr)
                traced.lower()
            if self._is_joint:
                self._agree(given)
        # Python code, of JAX in the first call, may fail or be interrupted: it would lose what it
        # donated.
        checks_numbers = jax.config.jax_debug_nans or jax.config.jax_debug_infs
        runs_python = self._calls_python or checks_numbers
        if runs_python or not self._has_run:
            changed = tuple(map(jnp.copy, changed))
        boxes = [_Box() for each in self._results if each is TRACED]
        if self._is_joint:
            boxes.append(_Box())
        compiled = self._undonated if checks_numbers else self._compiled
        call = starmap(compiled, [(changed, kept, extras, given.traced)])
        targets: list[Any] = [*self._written, *boxes]
        if runs_python:
            done = shard_map.launch(lambda: [*next(call)])
            shard_map.await_program(done, self._placement.workers)
            rebind(targets, done)
        elif tracing.active is None:
            self._launch(targets, call)
        else:
            name, category = ("program",) * 2 if self._has_run else ("compile",) * 2
            with tracing.span(name, category):
                self._launch(targets, call)
                contents = [target.content for target in targets]
                shard_map.await_program(contents, self._placement.workers)
        if runs_python or not self._has_run:
            for copies in self._written:
                copies.forget_other_form()
        self._has_run = True
        functional_step.count_steps(self._gradient_uses, numbers.most)
        results = [box.content for box in boxes]
        if self._is_joint:
            # JAX 0.6.1 waits, where nobody could end it, when an array is freed that a program has
            # yet to take: so the donated ones are kept until the program has ended.
            self._launched.append((results.pop(), () if checks_numbers else changed))
        return results

    def _launch(self, targets: list[Any], call: Iterator[Sequence[Any]]) -> None:
        """Call the program and store its results, in one expression that no interrupt enters."""
        if not targets:
            shard_map.launch(functools.partial(next, call))
            return
        try:
            shard_map.launch(functools.partial(rebind, targets, chain.from_iterable(call)))
        except BaseException as error:
            lost = [copies.name for copies in self._written if copies.replace_deleted()]
            if lost:
                user_errors.annotate(
                    error,
                    f"strategy.jit: the program failed after it had taken the memory of the "
                    f"variables {', '.join(map(repr, lost))}: they hold NaN, or 0, until they are "
                    f"assigned, or restored from a checkpoint",
                )
            raise

    def _agree(self, given: StepArguments) -> None:
        """Wait until all workers have traced this step, with the same arguments and variables."""
        variables = [
            (copies.name, *spec(copies.arrays[0])) for copies in (*self._written, *self._kept)
        ]
        terms = [str(term) for term in (given.key[2], variables, len(self._results))]
        self._placement.workers.agree((), "run of a compiled step", *terms)

    def _extras(self, rows: Sequence[update_rules.Coefficients]) -> Any:
        """Return the coefficients of the optimizers and the number of the step, on all devices."""
        number = self._strategy.generators.num_done % 2**32 if self._uses_step else 0
        known, extras = self._known_extras
        if known != (rows, number):
            mesh = self._placement.mesh
            places = step_arguments.places_of_one(mesh, self._placement.jax_local_devices)
            new = [functional_step.padded(rows), np.uint32(number)]
            put = [jax.device_put(new, place) for place in places]
            columns = zip(*put, strict=True)
            extras = tuple(step_arguments.whole_of([*each], mesh) for each in columns)
            self._known_extras = (rows, number), extras
        return extras

    def _regrouped(self, traced: Sequence[Any]) -> Any:
        """Return the result of ``run``: a PerReplica for each array."""
        placement, devices = self._placement, self._placement.replica_devices
        arrays = iter(traced)
        assert self._structure is not None

        def joined(leaf: Any) -> Any:
            if leaf is None or regroup.is_variable(leaf):
                return leaf
            if leaf is not TRACED:
                return PerReplica([leaf] * len(devices), devices=devices, owner=placement)
            whole = next(arrays)
            parts = shard_map.taken_apart(whole)
            value: PerReplica[Any] = PerReplica(parts, devices=devices, owner=placement)
            return with_global_array(value, whole)

        return pytree.unflatten(self._structure, [joined(leaf) for leaf in self._results])


def _has_callback(program: Any) -> bool:
    """Return whether a program, or one inside it, calls Python."""
    for equation in getattr(program, "jaxpr", program).eqns:
        if "callback" in equation.primitive.name:
            return True
        for value in equation.params.values():
            inner = value if isinstance(value, (list, tuple)) else (value,)
            if any(hasattr(each, "eqns") and _has_callback(each) for each in inner):
                return True
    return False


def run(
    step: Any,
    strategy: Any,
    placement: Placement,
    programs: dict[Any, SpmdProgram],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Run a compiled step; compile it where no program fits the arguments."""
    given = step_arguments.of(args, kwargs, placement)
    config = jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision
    key = (given.key, strategy.generators.seed, config)
    program = programs.get(key)
    numbers = None if program is None else program.numbers_now()
    if program is None or numbers is None:
        try:
            program = SpmdProgram(step, strategy, placement, given)
            numbers = program.numbers_now()
            assert numbers is not None
            result = program.run(given, numbers)
        except jax.errors.UnexpectedTracerError as error:
            user_errors.annotate(error, _LEAKED)
            raise
        programs[key] = program
        if len(programs) > _MOST_PROGRAMS:
            programs.pop(next(iter(programs)), None)
        return result
    return program.run(given, numbers)
