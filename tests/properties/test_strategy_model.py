"""Random programs over strategies and variables, against the tables of modes in plain NumPy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from kinds import examples

import dvkernels as dv

REDUCED: dict[str, Callable[[list[Any]], Any]] = {
    "sum": lambda parts: sum(parts[1:], start=parts[0]),
    "mean": lambda parts: sum(parts[1:], start=parts[0]) / len(parts),
    "min": lambda parts: np.minimum.reduce(parts),
    "max": lambda parts: np.maximum.reduce(parts),
    "only_first_replica": lambda parts: parts[0],
}
WRITTEN: dict[str, Callable[[Any, Any], Any]] = {
    "assign": lambda old, new: new,
    "assign_add": np.add,
    "assign_sub": np.subtract,
}
SCATTERED = {
    "scatter_add": np.add.at,
    "scatter_sub": np.subtract.at,
    "scatter_mul": np.multiply.at,
    "scatter_min": np.minimum.at,
    "scatter_max": np.maximum.at,
}
SCATTERS = (*SCATTERED, "scatter_div", "scatter_update")
SHAPES = ((), (3,), (2, 2), (0, 2))
DTYPES = ("float32", "float64", "int32")
MODES = ("on_write", "on_read", "none", "auto")
AGGREGATIONS = ("none", "sum", "mean", "only_first_replica")


def numbers(seed: int, replica: int, shape: tuple[int, ...], dtype: Any) -> Any:
    """Give what this replica contributes, the same in the model and in the product."""
    return np.random.default_rng((seed, replica)).integers(-4, 5, shape).astype(dtype)


def updates(seed: int, replica: int, shape: tuple[int, ...], dtype: Any, unique: bool) -> Any:
    """Give indices (as many as this replica likes) and positive updates."""
    random = np.random.default_rng((seed, replica, 1))
    count = int(random.integers(0, shape[0] + 1 if unique else 5)) if shape[0] else 0
    indices = random.permutation(shape[0])[:count] if unique else random.integers(0, 9, count)
    return indices % max(shape[0], 1), random.integers(1, 4, (count, *shape[1:])).astype(dtype)


class Twin:
    """A variable and what its copies must hold."""

    def __init__(self, make: Callable[[], dv.Variable], mode: str, aggregation: str, first: Any):
        self.mode = "on_write" if mode == "auto" else mode
        self.aggregation = aggregation
        self.shape, self.dtype = first.shape, first.dtype
        self.wide = np.dtype("i8" if self.dtype.kind == "i" else "f8")
        self.variable = make()
        self.copies = [first.astype(self.wide) for _ in self.variable.values]
        self.scale = 8.0

    def own(self, replica: int) -> Any:
        return self.copies[replica if len(self.copies) > 1 else 0]

    def narrow(self, value: Any) -> Any:
        value = np.asarray(value)
        self.scale = max([self.scale, *np.abs(value).ravel().tolist()])
        return value.astype(self.dtype).astype(self.wide) if self.wide == "i8" else value

    def set(self, copies: list[Any]) -> None:
        self.copies = [self.narrow(copy) for copy in copies]

    def every(self, method: str, value: Any) -> None:
        self.set([WRITTEN[method](copy, value) for copy in self.copies])

    def agrees(self, actual: Any, expected: Any) -> bool:
        if self.wide == "i8":
            return bool(np.array_equal(actual, expected))
        allowed = 64 * np.finfo(self.dtype).eps * self.scale
        return actual.shape == expected.shape and bool(np.all(np.abs(actual - expected) <= allowed))

    def check(self, *allowed: list[Any]) -> None:
        """Compare with each of the states allowed for each copy, then go on from what is there."""
        actual = self.variable.values
        assert len(actual) == len(self.copies)
        for at, copy in enumerate(actual):
            assert (copy.dtype, copy.shape) == (self.dtype, self.shape)
            states = [state[at] for state in allowed]
            assert any(self.agrees(copy, state) for state in states), (self, at, copy, states)
            if self.mode == "on_write":
                assert copy.tobytes() == actual[0].tobytes(), (self, actual)
        self.copies = [copy.astype(self.wide) for copy in actual]
        self.scale = 8.0
        self.set(self.copies)

    def __repr__(self) -> str:
        return f"{self.mode}/{self.aggregation} {self.dtype}{list(self.shape)}"


def refuses_replicas(twin: Twin, size: int) -> bool:
    return twin.mode == "on_write" and twin.aggregation == "none" and size > 1


@dataclasses.dataclass(frozen=True)
class Step:
    """One thing that every replica does, and what it means for the model."""

    variable: int
    seed: int
    name: str

    def meets(self, twin: Twin) -> bool:
        return twin.mode == "on_write"

    def refused(self, twin: Twin, size: int) -> bool:
        return False

    def act(self, twin: Twin, context: dv.ReplicaContext) -> Any:
        raise NotImplementedError

    def model(self, twin: Twin, size: int) -> list[Any]:
        raise NotImplementedError


class Write(Step):
    def refused(self, twin: Twin, size: int) -> bool:
        return refuses_replicas(twin, size)

    def act(self, twin: Twin, context: dv.ReplicaContext) -> Any:
        value = numbers(self.seed, context.replica_id_in_sync_group, twin.shape, twin.dtype)
        if twin.shape == () and self.seed % 2:
            value = value.item()  # a Python number takes the variable's dtype
        return getattr(twin.variable, self.name)(value)

    def model(self, twin: Twin, size: int) -> list[Any]:
        given = [numbers(self.seed, at, twin.shape, twin.wide) for at in range(size)]
        twin.scale = max(twin.scale, 8.0 * size)
        if twin.mode == "on_write":
            combine = REDUCED["sum" if twin.aggregation == "none" else twin.aggregation]
            twin.every(self.name, combine(given))
        else:
            new = zip(twin.copies, given, strict=True)
            twin.set([WRITTEN[self.name](copy, value) for copy, value in new])
        return [None] * size


class Scatter(Step):
    def refused(self, twin: Twin, size: int) -> bool:
        ordered = self.name in ("scatter_min", "scatter_max", "scatter_update")
        summed = twin.mode == "on_write" and twin.aggregation in ("sum", "mean")
        return twin.mode == "on_read" or refuses_replicas(twin, size) or (ordered and summed)

    def given(self, twin: Twin, replica: int, dtype: Any) -> Any:
        unique = self.name == "scatter_update"  # which of several wins is not said
        return updates(self.seed, replica, twin.shape, dtype, unique)

    def act(self, twin: Twin, context: dv.ReplicaContext) -> Any:
        given = self.given(twin, context.replica_id_in_sync_group, twin.dtype)
        return getattr(twin.variable, self.name)(*given)

    def scattered(self, twin: Twin, copy: Any, indices: Any, values: Any) -> Any:
        copy = copy.copy()
        if self.name == "scatter_update":
            copy[indices] = values
        elif self.name != "scatter_div":
            SCATTERED[self.name](copy, indices, values)
        else:
            for index, value in zip(indices, values, strict=True):
                copy[index] = copy[index] // value if twin.wide == "i8" else copy[index] / value
        return twin.narrow(copy)

    def model(self, twin: Twin, size: int) -> list[Any]:
        given = [self.given(twin, at, twin.wide) for at in range(size)]
        if twin.mode == "on_write":
            if twin.aggregation == "only_first_replica":
                given = given[:1]
            share = size if twin.aggregation == "mean" else 1
            for indices, values in given:
                values = values / share if share > 1 else values
                twin.set([self.scattered(twin, copy, indices, values) for copy in twin.copies])
        else:
            new = zip(twin.copies, given, strict=True)
            twin.set([self.scattered(twin, copy, *own) for copy, own in new])
        return [None] * size


class Read(Step):
    def meets(self, twin: Twin) -> bool:
        return False

    def act(self, twin: Twin, context: dv.ReplicaContext) -> Any:
        return twin.variable.numpy()

    def model(self, twin: Twin, size: int) -> list[Any]:
        return [twin.own(at) for at in range(size)]


class Sync(Step):
    def meets(self, twin: Twin) -> bool:
        return True

    def act(self, twin: Twin, context: dv.ReplicaContext) -> Any:
        return twin.variable.sync(self.name) if twin.mode == "none" else context.barrier()

    def model(self, twin: Twin, size: int) -> list[Any]:
        if twin.mode == "none":
            twin.set([REDUCED[self.name](twin.copies)] * len(twin.copies))
        return [None] * size


class Collective(Step):
    def meets(self, twin: Twin) -> bool:
        return True

    def act(self, twin: Twin, context: dv.ReplicaContext) -> Any:
        value = numbers(self.seed, context.replica_id_in_sync_group, (7, 2), twin.dtype)
        kept = value.copy()
        if self.name == "all_gather":
            result = context.all_gather(value, axis=-1)
        elif self.name == "broadcast":
            result = context.broadcast(value, root=context.num_replicas_in_sync - 1)
        elif self.name == "reduce_scatter":
            result = context.reduce_scatter("sum", value)
        elif self.name == "inplace":
            result = context.all_reduce("sum", value, out=value)
            kept = value
        elif self.name == "background":
            other = np.ones(3)
            handles = [context.all_reduce_async("sum", given) for given in (other, [value, other])]
            result = handles[1].wait()[0]
            assert np.all(handles[0].wait() == context.num_replicas_in_sync)
        elif self.name == "nest":
            nest = {"a": value, "b": (np.ones(3), [np.ones(5, "i4")])}
            result = context.all_reduce("sum", nest)["a"]
        elif self.name == "shared":
            result = context.all_reduce("sum", value, shared=True)
            assert not result.flags.writeable
        else:
            result = context.all_reduce(self.name, value)
        assert np.array_equal(value, kept)
        return result.copy()

    def model(self, twin: Twin, size: int) -> list[Any]:
        given = [numbers(self.seed, at, (7, 2), twin.wide) for at in range(size)]
        if self.name == "all_gather":
            return [np.concatenate(given, axis=-1)] * size
        if self.name == "broadcast":
            return [given[-1]] * size
        total = REDUCED[self.name if self.name in ("min", "max") else "sum"](given)
        return np.array_split(total, size) if self.name == "reduce_scatter" else [total] * size


class Merge(Step):
    """Reduce, assign and run once more, all of it in cross-replica context."""

    def meets(self, twin: Twin) -> bool:
        return True

    def refused(self, twin: Twin, size: int) -> bool:
        return self.name == "nested" and refuses_replicas(twin, size)

    def assigns(self, twin: Twin) -> bool:
        # How SUM is shared out has a rule of its own.
        return not (twin.mode == "on_read" and twin.aggregation == "sum")

    def act(self, twin: Twin, context: dv.ReplicaContext) -> Any:
        value = numbers(self.seed, context.replica_id_in_sync_group, twin.shape, twin.dtype)

        def merged(strategy: dv.Strategy, given: Any) -> Any:
            total = strategy.reduce("sum", given)
            if self.assigns(twin) and not self.refused(twin, strategy.num_replicas_in_sync):
                twin.variable.assign(total)
            if self.name == "nested":
                again = Write(self.variable, self.seed, "assign_add")
                strategy.run(lambda: again.act(twin, dv.get_replica_context()))
            return given if self.name == "dealt" else total

        return np.array(context.merge_call(merged, (value,)))

    def model(self, twin: Twin, size: int) -> list[Any]:
        given = [numbers(self.seed, at, twin.shape, twin.wide) for at in range(size)]
        total = REDUCED["sum"](given)
        if self.assigns(twin):
            twin.every("assign", total)
        if self.name == "nested":
            Write(self.variable, self.seed, "assign_add").model(twin, size)
        return given if self.name == "dealt" else [total] * size


def steps(kind: type[Step], *names: str) -> st.SearchStrategy[Step]:
    return st.builds(kind, st.integers(0, 7), st.integers(0, 99), st.sampled_from(names))


PROGRAMS = st.lists(
    st.one_of(
        steps(Write, *WRITTEN),
        steps(Read, "read"),
        steps(Collective, "sum", "min", "max", "inplace", "all_gather", "broadcast"),
        steps(Collective, "reduce_scatter", "background", "nest", "shared"),
        steps(Merge, "dealt", "total", "nested"),
        steps(Sync, "min", "max"),
        steps(Scatter, *SCATTERS),
    ),
    min_size=1,
    max_size=5,
)


class Boom(Exception):
    pass


@dataclasses.dataclass(frozen=True)
class Fault:
    """What goes wrong at which step in which replicas, and whether the others catch it."""

    kind: str
    at: int
    replicas: frozenset[int]
    caught: bool


FAULTS = st.none() | st.builds(
    Fault,
    st.sampled_from(["raises", "raises", "mismatch", "shape", "returns"]),
    st.integers(0, 5),
    st.frozensets(st.integers(0, 4), min_size=1, max_size=2),
    st.booleans(),
)


class Machine(RuleBasedStateMachine):
    @initialize(
        size=st.integers(1, 5),
        central=st.booleans(),
        algorithm=st.sampled_from(["auto", "direct", "ring"]),
        bucket=st.sampled_from([None, 1, 100]),
        aggregations=st.permutations(AGGREGATIONS),
        dtype=st.sampled_from(DTYPES),
        debug=st.booleans(),
    )
    def start(
        self,
        size: int,
        central: bool,
        algorithm: str,
        bucket: int | None,
        aggregations: list[str],
        dtype: str,
        debug: bool,
    ) -> None:
        dv.debug(debug)  # which changes nothing where nothing is wrong
        self.size = size
        self.central = central
        self.twins: list[Twin] = []
        devices = [f"cpu:{at}" for at in range(size)]
        if central:
            self.strategy = dv.CentralStorageStrategy(devices, "cpu:0")
        else:
            self.strategy = dv.MirroredStrategy(
                devices, cross_device_ops=algorithm, bytes_per_bucket=bucket
            )
        for at, (mode, aggregation) in enumerate(zip(MODES, aggregations, strict=True)):
            self.create(mode, aggregation, dtype, (3,), at, False)

    def teardown(self) -> None:
        dv.debug(False)
        if hasattr(self, "strategy"):
            self.strategy.close()

    @invariant()
    def every_copy_is_as_the_model_says(self) -> None:
        for twin in getattr(self, "twins", []):
            twin.check(twin.copies)

    @rule(
        mode=st.sampled_from(MODES),
        aggregation=st.sampled_from(AGGREGATIONS),
        dtype=st.sampled_from(DTYPES),
        shape=st.sampled_from(SHAPES),
        seed=st.integers(0, 99),
        inside=st.booleans(),
    )
    def create(
        self, mode: str, aggregation: str, dtype: str, shape: Any, seed: int, inside: bool
    ) -> None:
        first = numbers(seed, 0, shape, dtype)

        def make() -> dv.Variable:
            with self.strategy.scope():
                return dv.Variable(
                    lambda: first, synchronization=mode.upper(), aggregation=aggregation
                )

        def make_inside() -> dv.Variable:
            made: list[Any] = []

            def create() -> None:
                made.append(
                    dv.Variable(lambda: first, synchronization=mode, aggregation=aggregation)
                )

            self.strategy.run(create)
            assert len(made) == self.size
            assert all(one is made[0] for one in made)
            return made[0]

        of_integers = aggregation == "mean" and first.dtype.kind == "i"
        homeless = self.central and mode in ("on_read", "none")
        try:
            twin = Twin(make_inside if inside else make, mode, aggregation, first)
        except ValueError:
            assert of_integers or homeless, (mode, aggregation, dtype)
            return
        assert not of_integers
        assert not homeless
        assert len(twin.copies) == (1 if self.central else self.size)
        self.twins.append(twin)

    def across(self, act: Callable[[], Any], inside: bool) -> Any:
        """Outside every scope a variable acts as in its strategy's cross-replica context."""
        if not inside:
            return act()
        with self.strategy.scope():
            return act()

    @precondition(lambda self: self.twins)
    @rule(
        at=st.integers(0, 7),
        method=st.sampled_from(sorted(WRITTEN)),
        seed=st.integers(0, 99),
        dealt=st.booleans(),
        inside=st.booleans(),
    )
    def write_across(self, at: int, method: str, seed: int, dealt: bool, inside: bool) -> None:
        twin = self.twins[at % len(self.twins)]
        own = [numbers(seed, replica, twin.shape, twin.dtype) for replica in range(self.size)]
        shared = twin.mode == "on_read" and twin.aggregation == "sum"
        if shared and dealt:
            method = "assign"
        refused = (dealt and twin.mode == "on_write") or (shared and method != "assign")
        value = dv.PerReplica(own) if dealt else own[0]
        try:
            written = self.across(lambda: getattr(twin.variable, method)(value), inside)
        except ValueError:
            assert refused, twin
            return
        assert not refused, twin
        assert written is None
        twin.scale = max(twin.scale, 16.0)
        if dealt:
            twin.set(
                [WRITTEN[method](copy, one) for copy, one in zip(twin.copies, own, strict=True)]
            )
        elif shared:
            copies = [copy.astype(twin.wide) for copy in twin.variable.values]
            assert twin.agrees(REDUCED["sum"](copies), own[0])
            if twin.wide == "f8":
                twin.set([own[0] / self.size] * self.size)
            else:
                twin.set(copies)
        else:
            twin.every(method, own[0].astype(twin.wide))

    @precondition(lambda self: self.twins)
    @rule(at=st.integers(0, 7), inside=st.booleans())
    def read_across(self, at: int, inside: bool) -> None:
        twin = self.twins[at % len(self.twins)]
        try:
            value = self.across(twin.variable.read_value, inside)
        except ValueError:
            assert twin.mode == "on_read"
            assert twin.aggregation == "none"
            return
        if twin.mode == "none":
            assert isinstance(value, dv.PerReplica)
            for one, copy in zip(value.values, twin.copies, strict=True):
                assert twin.agrees(one, copy)
            return
        assert (value.dtype, value.shape) == (twin.dtype, twin.shape)
        expected = twin.copies[0]
        if twin.mode == "on_read":
            assert twin.aggregation != "none"
            expected = twin.narrow(REDUCED[twin.aggregation](twin.copies))
        assert twin.agrees(value, expected)

    @precondition(lambda self: self.twins)
    @rule(at=st.integers(0, 7), inside=st.booleans())
    def reduce_and_gather_a_variable(self, at: int, inside: bool) -> None:
        twin = self.twins[at % len(self.twins)]
        own = [twin.own(replica) for replica in range(self.size)]
        total = self.across(lambda: self.strategy.reduce("sum", twin.variable), inside)
        assert twin.agrees(total, twin.narrow(REDUCED["sum"](own)))
        gathered = self.across(lambda: self.strategy.gather(twin.variable), inside)
        expected = np.stack(own) if twin.shape == () else np.concatenate(own)
        assert twin.agrees(gathered, expected)

    @precondition(lambda self: any(twin.mode == "none" for twin in self.twins))
    @rule(op=st.sampled_from(["min", "max", "sum"]), together=st.booleans(), inside=st.booleans())
    def sync(self, op: str, together: bool, inside: bool) -> None:
        loose = [twin for twin in self.twins if twin.mode == "none"]
        if together:
            self.across(lambda: dv.sync([twin.variable for twin in loose], op), inside)
        else:
            for twin in loose:
                self.across(lambda twin=twin: twin.variable.sync(op), inside)
        for twin in loose:
            twin.set([REDUCED[op](twin.copies)] * len(twin.copies))
            assert len({copy.tobytes() for copy in twin.variable.values}) == 1

    @precondition(lambda self: self.twins)
    @rule(program=PROGRAMS, fault=FAULTS)
    def run(self, program: list[Step], fault: Fault | None) -> None:
        size, twins = self.size, self.twins
        program = [
            step
            for step in program
            if not (isinstance(step, Scatter) and twins[step.variable % len(twins)].shape == ())
        ]
        chosen = [twins[step.variable % len(twins)] for step in program]
        meets = [step.meets(twin) for step, twin in zip(program, chosen, strict=True)]
        states = [[twin.copies for twin in twins]]
        expected = []
        refused_at = None
        for at, (step, twin) in enumerate(zip(program, chosen, strict=True)):
            if step.refused(twin, size):
                refused_at, fault = at, None
                break
            expected.append((twin, step.model(twin, size)))
            states.append([twin.copies for twin in twins])
        fault = self.possible(fault, meets)
        seen: list[list[Any]] = [[] for _ in range(size)]
        booms = [Boom(replica) for replica in range(size)]
        struck: list[int] = []
        later: list[BaseException | None] = []

        def wrong(replica: int, context: dv.ReplicaContext) -> None:
            assert fault is not None
            if fault.kind == "raises":
                struck.append(replica)
                raise booms[replica]
            if fault.kind == "mismatch":  # something that no step of a program calls
                context.all_reduce("prod", np.ones((1, 2, 3), "f4"))
            if fault.kind == "shape":
                context.all_gather(np.ones((1, 2, 3), "c8"))

        def act(replica: int, context: dv.ReplicaContext) -> None:
            for at, (step, twin) in enumerate(zip(program, chosen, strict=True)):
                if fault and at == fault.at and replica in fault.replicas:
                    return wrong(replica, context)
                seen[replica].append(step.act(twin, context))
            if fault and fault.at == len(program) and replica in fault.replicas:
                wrong(replica, context)

        def body() -> None:
            context = dv.get_replica_context()
            replica = context.replica_id_in_sync_group
            try:
                act(replica, context)
            except Exception as error:
                if fault is None or not fault.caught or error is booms[replica]:
                    raise
                try:
                    context.barrier()
                except Exception as again:
                    later.append(again)
                else:
                    later.append(None)

        raised: BaseException | None = None
        try:
            self.strategy.run(body)
        except Exception as error:
            raised = error

        if refused_at is None and fault is None:
            if raised is not None:
                raise raised
            for replica in range(size):
                for result, (twin, values) in zip(seen[replica], expected, strict=True):
                    self.same(twin, result, values[replica])
            return
        assert None not in later, "a collective after a caught failure must raise"
        if fault is None:
            assert isinstance(raised, ValueError), raised
            low = high = refused_at
        else:
            if fault.kind == "raises":
                # Who still was on the way out of the last meeting is ended there by the others.
                first, *others = sorted(struck)
                assert raised is booms[first], (raised, struck)
                notes = " ".join(getattr(raised, "__notes__", []))
                assert all(f"replica {other}" in notes for other in others)
            else:
                assert isinstance(raised, dv.errors.CollectiveMismatchError), raised
                assert all(f"replica {one}" in str(raised) for one in fault.replicas), raised
            low = high = fault.at
        while low and not meets[low - 1]:
            low -= 1
        if fault is not None:
            while high < len(program) and not meets[high]:
                high += 1
        for at, twin in enumerate(twins):
            # What all write together is as the last meeting left it; a replica's own copy may be
            # at any of its steps between the last meeting and the next.
            last = low if twin.mode == "on_write" else high
            twin.check(*(state[at] for state in states[low : last + 1]))

    def possible(self, fault: Fault | None, meets: list[bool]) -> Fault | None:
        """Fit a fault to this program, or drop one that would be none."""
        if fault is None:
            return None
        replicas = frozenset(replica % self.size for replica in fault.replicas)
        at = min(fault.at, len(meets))
        if fault.kind != "raises":
            if len(replicas) == self.size or True not in meets[at:]:
                return None
            at = meets.index(True, at)
        return dataclasses.replace(fault, at=at, replicas=replicas)

    @staticmethod
    def same(twin: Twin, result: Any, expected: Any) -> None:
        if expected is None:
            assert result is None
        else:
            twin.scale = max([twin.scale, *np.abs(expected).ravel().tolist()])
            assert result.dtype == twin.dtype
            assert twin.agrees(result, twin.narrow(expected)), (twin, result, expected)


@pytest.mark.hypothesis  # which the plugin adds to the tests of @given only
def test_strategies_do_as_the_tables_of_modes_say() -> None:
    run_state_machine_as_test(
        Machine,
        # No shrinking: it may outlast the time that a test has, and then nothing is reported.
        settings=settings(
            max_examples=examples(600),
            stateful_step_count=15,
            deadline=None,
            phases=(Phase.explicit, Phase.reuse, Phase.generate),
        ),
    )
