"""Intended differences between dvkernels and TensorFlow, each with a name.

docs/explanation/differences.md documents most of them for users.

An entry explains a case only where our answer is the one of the contract, which most predicates
compute with NumPy. So the table cannot hide a wrong answer behind a peculiarity of TensorFlow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from comparison import Case, close, same
from oracle_programs import SCATTERS, VARIABLE, WRITES, decoded


class Difference(NamedTuple):
    name: str
    sentence: str  # of the contract, on which the difference rests
    explains: Callable[[Case], bool]


DIFFERENCES: list[Difference] = []


def difference(sentence: str) -> Callable[[Callable[[Case], bool]], Callable[[Case], bool]]:
    """Register a predicate in the table, under its own name."""

    def enter(predicate: Callable[[Case], bool]) -> Callable[[Case], bool]:
        DIFFERENCES.append(Difference(predicate.__name__, sentence, predicate))
        return predicate

    return enter


# -- helpers of the predicates ---------------------------------------------------------------------


def raised(outcome: dict[str, Any], name: str) -> bool:
    """Return whether this error was raised: theirs by class, ours by class or base class."""
    error = outcome.get("error", ())
    return name == error or (isinstance(error, list) and name in error)


def fails(outcome: dict[str, Any]) -> bool:
    return "error" in outcome


def writes(case: Case) -> bool:
    return case.operation["op"] in WRITES or case.operation["op"] in SCATTERS


def value(case: Case) -> dict[str, Any]:
    return case.operation.get("value", {})


def form(case: Case) -> str | None:
    return value(case).get("form")


def several(case: Case) -> bool:
    return case.program["replicas"] > 1


def in_replica(case: Case) -> bool:
    return case.operation["context"] == "replica"


def parts(case: Case, given: dict[str, Any]) -> list[np.ndarray]:
    """Return the array that each replica contributes."""
    count = case.program["replicas"]
    if given["form"] == "array":
        return [decoded(part) for part in given["parts"]]
    if given["form"] == "plain":
        return [decoded(given["part"])] * count
    if given["form"] == "variable":
        copies = [decoded(copy) for copy in case.before]
        return copies if len(copies) == count else copies * count
    assert given["form"] == "literal"
    like = decoded(case.program["variable"]["initial"]).dtype
    return [np.array(given["number"], like)] * count


def leaves(given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if given.get("form") == "nest":
        yield from given["items"].values()
    elif given:
        yield given


def has_integers(case: Case) -> bool:
    given = [leaf for leaf in leaves(value(case)) if leaf["form"] != "none"]
    return any(parts(case, leaf)[0].dtype.kind == "i" for leaf in given)


def singly(case: Case) -> list[Case]:
    """Return one case per operation of a step, with our result of it; else the case itself."""
    inner = case.operation.get("operations")
    if inner is None or fails(case.ours):
        return [case._replace(operation=one) for one in inner or [case.operation]]
    return [
        case._replace(operation=one, ours={**case.ours, "result": result})
        for one, result in zip(inner, case.ours["result"]["list"], strict=True)
    ]


def reduced(op: str, arrays: list[np.ndarray]) -> np.ndarray:
    total = np.asarray(np.sum(arrays, axis=0, dtype=arrays[0].dtype))
    return total if op == "sum" else np.asarray(total / total.dtype.type(len(arrays)))


def aggregate(how: str, arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if how == "only_first_replica" else reduced(how, arrays)


WRITTEN: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "assign": lambda _, new: new,
    "assign_add": np.add,
    "assign_sub": np.subtract,
}


def copies_are(case: Case, expected: list[np.ndarray]) -> bool:
    ours = [decoded(copy) for copy in case.ours.get("copies", [])]
    return len(ours) == len(expected) and all(map(close, expected, ours))


def result_is(case: Case, expected: Any) -> bool:
    """Return whether our result is this pytree of arrays."""

    def equal(one: Any, other: Any) -> bool:
        if isinstance(one, np.ndarray):
            return isinstance(other, str) and close(one, decoded(other))
        if isinstance(one, dict):
            return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
        if isinstance(one, list):
            return len(one) == len(other) and all(map(equal, one, other))
        return one is other

    return not fails(case.ours) and equal(expected, case.ours["result"])


def on_every_replica(case: Case, array: np.ndarray) -> dict[str, Any]:
    return {"per_replica": [array] * case.program["replicas"]}


def written_across(case: Case) -> np.ndarray | None:
    """Return the array that is written in cross-replica context or in merge_call, if any."""
    operation = case.operation
    if operation["op"] == "merge_call" and operation["fn"] == "assign_reduced":
        return reduced(operation["reduce_op"], parts(case, value(case)))
    if operation["op"] in WRITES and not in_replica(case) and form(case) != "array":
        return parts(case, value(case))[0]
    return None


# -- wrapping of results ---------------------------------------------------------------------------


def same_but_wrapped(theirs: Any, ours: Any) -> bool:
    """Return whether TensorFlow only unwrapped components that are all equal."""
    if isinstance(ours, dict) and "per_replica" in ours and not isinstance(theirs, dict):
        return all(same(theirs, part) for part in ours["per_replica"])
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return theirs.keys() == ours.keys() and all(
            same_but_wrapped(theirs[key], ours[key]) for key in ours
        )
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(same_but_wrapped, theirs, ours))
    return same(theirs, ours)


@difference(
    "run always returns PerReplica leaves (also for n = 1, also when all replicas "
    "return the same object)"
)
def run_always_wraps(case: Case) -> bool:
    runs = in_replica(case) or case.operation["op"] == "run_again"
    if fails(case.theirs) or fails(case.ours) or not runs:
        return False
    return same(case.theirs["copies"], case.ours["copies"]) and same_but_wrapped(
        case.theirs["result"], case.ours["result"]
    )


@difference("next() gives PerReplica (TensorFlow gives raw elements to one replica)")
def one_replica_iterates_over_per_replicas(case: Case) -> bool:
    return (
        case.operation["op"] in ("batches", "own_batches")
        and not several(case)
        and not fails(case.ours)
        and same_but_wrapped(case.theirs["result"], case.ours["result"])
    )


@difference(
    "reduce_to, batch_reduce_to, broadcast_to give Mirrored; update with group=True "
    "returns Mirrored (TensorFlow does not wrap what one copy gave)"
)
def mirrored_of_one_copy(case: Case) -> bool:
    return (
        case.operation["op"] in ("update", "reduce_to", "broadcast_to")
        and not fails(case.theirs)
        and not fails(case.ours)
        and same(case.theirs["copies"], case.ours["copies"])
        and same({"mirrored": [case.theirs["result"]]}, case.ours["result"])
    )


@difference(
    "local_results gives a tuple, one per local replica; in local_results a plain value "
    "stands for each replica"
)
def local_results_speaks_of_every_replica(case: Case) -> bool:
    if case.operation["op"] != "local_results" or fails(case.theirs) or fails(case.ours):
        return False
    theirs, ours = case.theirs["result"]["list"], case.ours["result"]["list"]
    return len(theirs) == 1 and same(theirs * case.program["replicas"], ours)


# -- creation of variables -------------------------------------------------------------------------


@difference("Synchronization NONE works in every strategy")
def none_synchronization_works(case: Case) -> bool:
    synchronization, aggregation = case.modes
    initial = decoded(case.program["variable"]["initial"])
    return (
        case.operation["op"] == "create"
        and case.program["strategy"] == "mirrored"
        and synchronization == "none"
        and raised(case.theirs, "ValueError")
        and not (aggregation == "mean" and initial.dtype.kind == "i")
        and copies_are(case, [initial] * case.program["replicas"])
    )


@difference("CentralStorageStrategy: ON_READ and NONE raise ValueError at creation")
def central_storage_is_on_write(case: Case) -> bool:
    return (
        case.operation["op"] == "create"
        and case.program["strategy"] == "central_storage"
        and case.modes[0] != "on_write"
        and not fails(case.theirs)
        and raised(case.ours, "ValueError")
    )


@difference("MEAN on an integer variable raises ValueError at creation")
def mean_of_an_integer_variable(case: Case) -> bool:
    return (
        case.operation["op"] == "create"
        and case.modes[1] == "mean"
        and decoded(case.program["variable"]["initial"]).dtype.kind == "i"
        and not fails(case.theirs)
        and raised(case.ours, "ValueError")
    )


# -- writes ----------------------------------------------------------------------------------------


@difference(
    "ON_WRITE with aggregation NONE raises ValueError when written in replica "
    "context; copies of a mirrored variable never drift apart by an assignment"
)
def on_write_needs_an_aggregation(case: Case) -> bool:
    return (
        case.modes == ("on_write", "none")
        and several(case)
        and in_replica(case)
        and any(map(writes, singly(case)))
        and raised(case.ours, "SynchronizationError")
    )


@difference(
    "A cross-replica assign(PerReplica) to an ON_WRITE variable raises ValueError that names reduce"
)
def on_write_takes_no_per_replica(case: Case) -> bool:
    return (
        case.operation["op"] in WRITES
        and not in_replica(case)
        and case.modes[0] == "on_write"
        and form(case) == "array"
        and raised(case.ours, "SynchronizationError")
    )


@difference("update: a PerReplica among the arguments raises ValueError for an ON_WRITE variable")
def update_of_on_write_takes_no_per_replica(case: Case) -> bool:
    return (
        case.operation["op"] == "update"
        and case.modes[0] == "on_write"
        and form(case) == "array"
        and raised(case.ours, "SynchronizationError")
    )


@difference(
    "A PerReplica written in cross-replica context to an ON_READ or NONE variable sets each copy"
)
def per_replica_sets_each_copy(case: Case) -> bool:
    if case.operation["op"] not in WRITES or in_replica(case) or form(case) != "array":
        return False
    if case.modes[0] == "on_write":
        return False
    write = WRITTEN[case.operation["op"]]
    old = [decoded(copy) for copy in case.before]
    return copies_are(case, list(map(write, old, parts(case, value(case)))))


@difference(
    "A value passed in replica context is that replica's contribution, whatever "
    "object it is: SUM of the literal 5.0 over n replicas is 5n, also 0.0; a variable is what its "
    "own copy holds"
)
def any_object_is_a_contribution(case: Case) -> bool:
    if not in_replica(case) or form(case) not in ("literal", "variable") or fails(case.ours):
        return False
    given = parts(case, value(case))
    if case.operation["op"] == "all_reduce":
        op = case.operation["reduce_op"]
        if form(case) == "literal":
            # Without a variable a number has the dtype that NumPy gives it.
            given = [np.asarray(value(case)["number"])] * len(given)
        return result_is(case, on_every_replica(case, reduced(op, given)))
    if case.operation["op"] not in WRITES or case.modes[0] != "on_write":
        return False
    old = decoded(case.before[0])
    new = WRITTEN[case.operation["op"]](old, aggregate(case.modes[1], given))
    return copies_are(case, [np.asarray(new, old.dtype)] * len(case.before))


@difference(
    "SOR NONE: assign works then raises on implicit read-back (a trap): "
    "MEAN, ONLY_FIRST_REPLICA: every copy gets it"
)
def on_read_without_aggregation_is_written(case: Case) -> bool:
    if case.modes != ("on_read", "none"):
        return False
    given = written_across(case)
    if given is None:
        return False
    write = WRITTEN.get(case.operation["op"], WRITTEN["assign"])
    return raised(case.theirs, "ValueError") and copies_are(
        case, [np.asarray(write(decoded(copy), given), given.dtype) for copy in case.before]
    )


@difference(
    "SUM of an ON_READ integer variable that n does not divide keeps its total "
    "(7 over 2 copies reads back 7)"
)
def integer_total_is_kept(case: Case) -> bool:
    if case.modes != ("on_read", "sum") or fails(case.ours):
        return False
    given = written_across(case)
    if case.operation["op"] not in ("assign", "merge_call") or given is None:
        return False
    ours = [decoded(copy) for copy in case.ours["copies"]]
    return (
        given.dtype.kind == "i"
        and np.array_equal(np.sum(ours, axis=0), given)
        and int(np.max(np.ptp(ours, axis=0))) <= 1
    )


@difference(
    "the table of modes holds for every strategy (TensorFlow's OneDeviceStrategy makes a "
    "plain variable, whose modes are only stored)"
)
def one_device_keeps_the_modes(case: Case) -> bool:
    if case.program["strategy"] != "one_device" or fails(case.theirs):
        return False
    (synchronization, aggregation), op = case.modes, case.operation["op"]
    if synchronization == "none":
        return op == "read" and result_is(case, on_every_replica(case, decoded(case.before[0])))
    undefined = op in SCATTERS or (op == "read" and not in_replica(case) and aggregation == "none")
    return synchronization == "on_read" and undefined and raised(case.ours, "SynchronizationError")


# -- scatter ---------------------------------------------------------------------------------------


@difference("On ON_READ variables scatter raises ValueError (not NotImplementedError)")
def scatter_on_read(case: Case) -> bool:
    return (
        case.operation["op"] in SCATTERS
        and case.modes[0] == "on_read"
        and raised(case.theirs, "NotImplementedError")
        and raised(case.ours, "SynchronizationError")
    )


@difference(
    "Scatter: min max update under SUM or MEAN raise ValueError (TensorFlow: NotImplementedError, "
    "or nothing where there is one copy)"
)
def scatter_that_does_not_add(case: Case) -> bool:
    return (
        case.operation["op"] in ("scatter_min", "scatter_max", "scatter_update")
        and case.modes[0] == "on_write"
        and case.modes[1] in ("sum", "mean")
        and (raised(case.theirs, "NotImplementedError") or case.program["strategy"] != "mirrored")
        and raised(case.ours, "SynchronizationError")
    )


SCATTERED: dict[str, Callable[[np.ndarray, int, np.ndarray], Any]] = {
    "scatter_add": lambda copy, row, new: copy[row] + new,
    "scatter_sub": lambda copy, row, new: copy[row] - new,
    "scatter_mul": lambda copy, row, new: copy[row] * new,
    "scatter_div": lambda copy, row, new: (
        copy[row] // new if copy.dtype.kind == "i" else copy[row] / new
    ),
    "scatter_min": lambda copy, row, new: np.minimum(copy[row], new),
    "scatter_max": lambda copy, row, new: np.maximum(copy[row], new),
    "scatter_update": lambda copy, row, new: new,
}


def scattered(case: Case) -> list[np.ndarray]:
    """Return the copies after a scatter to an ON_WRITE or NONE variable, update by update."""
    op, how = case.operation["op"], case.modes[1]
    given = list(
        zip(
            parts(case, case.operation["indices"]),
            parts(case, case.operation["updates"]),
            strict=True,
        )
    )
    divisor = 1
    if not in_replica(case) or how == "only_first_replica":
        given = given[:1]
    elif how == "mean":
        divisor = len(given)
    copy = decoded(case.before[0])
    for indices, updates in given:
        for row, new in zip(indices, updates, strict=True):
            copy[row] = SCATTERED[op](copy, row, new / divisor if divisor > 1 else new)
    return [copy] * len(case.before)


@difference("integer div floors (TensorFlow's truncates)")
def integer_quotient_floors(case: Case) -> bool:
    return (
        case.operation["op"] == "scatter_div"
        and decoded(case.program["variable"]["initial"]).dtype.kind == "i"
        and not fails(case.theirs)
        and copies_are(case, scattered(case))
    )


@difference(
    "Scatter in replica context under ON_WRITE: MEAN the same divided by N, "
    "ONLY_FIRST_REPLICA those of replica 0 (TensorFlow's central storage applies all as they are)"
)
def central_storage_aggregates_a_scatter(case: Case) -> bool:
    return (
        case.operation["op"] in SCATTERS
        and in_replica(case)
        and case.program["strategy"] == "central_storage"
        and case.modes[1] != "none"
        and not fails(case.theirs)
        and copies_are(case, scattered(case))
    )


# -- collectives and reductions --------------------------------------------------------------------


@difference("MEAN of integers raises (TensorFlow silently gives float64)")
def mean_of_integers(case: Case) -> bool:
    return raised(case.ours, "UnsupportedDTypeError") and any(
        one.operation.get("reduce_op") == "mean" and has_integers(one) for one in singly(case)
    )


@difference("reduce, gather take nests with any axis, negative axes and lists of axes")
def nests_and_axes(case: Case) -> bool:
    operation = case.operation
    if operation["op"] not in ("reduce", "gather", "all_reduce", "all_gather"):
        return False
    if form(case) == "variable" or any(leaf["form"] != "array" for leaf in leaves(value(case))):
        return False
    nested, axis = form(case) == "nest", operation.get("axis")
    if not nested and not isinstance(axis, list) and not (isinstance(axis, int) and axis < 0):
        return False

    def one(leaf: dict[str, Any]) -> Any:
        arrays = parts(case, leaf)
        if operation["op"].endswith("gather"):
            return np.concatenate(arrays, axis=axis)
        if axis is None:
            return reduced(operation["reduce_op"], arrays)
        axes = tuple(axis) if isinstance(axis, list) else axis
        total = np.sum([np.sum(array, axis=axes) for array in arrays], axis=0)
        count = sum(array.size for array in arrays) / max(np.size(total), 1)
        return np.asarray(total if operation["reduce_op"] == "sum" else total / count, "float32")

    def wrapped(array: np.ndarray) -> Any:
        return on_every_replica(case, array) if in_replica(case) else array

    if not nested:
        return result_is(case, wrapped(one(value(case))))
    items = value(case)["items"]
    return result_is(case, {"dict": {name: wrapped(one(leaf)) for name, leaf in items.items()}})


@difference(
    "sums and products of small integers along an axis are as wide as NumPy's (TensorFlow's wrap)"
)
def totals_along_an_axis_are_wide(case: Case) -> bool:
    operation = case.operation
    if operation["op"] != "reduce" or operation.get("axis") is None or form(case) != "array":
        return False
    arrays, axis = parts(case, value(case)), operation["axis"]
    axes = tuple(axis) if isinstance(axis, list) else axis
    total = np.sum([np.sum(array, axis=axes) for array in arrays], axis=0)
    return total.dtype != arrays[0].dtype and result_is(case, np.asarray(total))


@difference(
    "value may be any nest (TensorFlow refuses many with integers: Inputs to batch_reduce_to must "
    "be either all on the host or all on the compute devices)"
)
def nests_with_integers(case: Case) -> bool:
    return raised(case.theirs, "ValueError") and any(
        one.operation["op"] == "all_reduce"
        and form(one) == "nest"
        and has_integers(one)
        and nests_and_axes(one)
        for one in singly(case)
    )


@difference("scalars can be gathered (they are stacked)")
def scalars_are_stacked(case: Case) -> bool:
    if not case.operation["op"].endswith("gather") or form(case) != "array":
        return False
    arrays = parts(case, value(case))
    if any(array.ndim for array in arrays):
        return False
    stacked = np.stack(arrays)
    return result_is(case, on_every_replica(case, stacked) if in_replica(case) else stacked)


@difference("A plain value in reduce or gather raises ValueError")
def plain_values_are_refused(case: Case) -> bool:
    return (
        case.operation["op"] in ("reduce", "gather")
        and form(case) == "plain"
        and not fails(case.theirs)
        and raised(case.ours, "ValueError")
    )


@difference("In reduce or gather a variable counts as one value per replica")
def a_variable_is_one_value_per_replica(case: Case) -> bool:
    if case.operation["op"] not in ("reduce", "gather") or form(case) != "variable":
        return False
    arrays, axis = parts(case, VARIABLE), case.operation["axis"]
    if case.operation["op"] == "gather":
        return result_is(case, np.concatenate(arrays, axis=axis))
    if axis is not None:
        arrays = [np.asarray(reduced("sum", list(np.moveaxis(a, axis, 0)))) for a in arrays]
        if case.operation["reduce_op"] == "mean":
            return False
    return result_is(case, reduced(case.operation["reduce_op"], arrays))


@difference("Batches are split evenly (8 over 3 is 3, 3, 2; TensorFlow's ceil chunks are a trap)")
def batches_are_split_evenly(case: Case) -> bool:
    operation = case.operation
    if operation["op"] != "batches" or not several(case) or fails(case.ours):
        return False
    split = [np.array_split(batch, case.program["replicas"]) for batch in batched(operation)]
    return result_is(case, {"list": [{"per_replica": parts} for parts in split]})


def batched(operation: dict[str, Any]) -> list[np.ndarray]:
    size, elements = operation["batch"], np.arange(operation["elements"])
    batches = [elements[start : start + size] for start in range(0, len(elements), size)]
    if operation["drop_remainder"] and batches and len(batches[-1]) < size:
        batches.pop()
    return batches


@difference(
    "No step is dropped silently: missing parts of the last step are empty batches (TensorFlow "
    "drops the step where the shapes are static)"
)
def no_step_is_dropped(case: Case) -> bool:
    operation, count = case.operation, case.program["replicas"]
    if operation["op"] != "own_batches" or operation["batch"] is None or fails(case.theirs):
        return False
    batches = batched(operation)
    batches += [np.arange(0)] * (-len(batches) % count)
    steps = [batches[start : start + count] for start in range(0, len(batches), count)]
    return result_is(case, {"list": [{"per_replica": step} for step in steps]})


@difference(
    "Unbatched elements that do not fill a step raise DatasetError (TensorFlow drops them silently)"
)
def no_element_is_dropped(case: Case) -> bool:
    operation = case.operation
    return (
        operation["op"] == "own_batches"
        and operation["batch"] is None
        and operation["elements"] % case.program["replicas"] != 0
        and not fails(case.theirs)
        and raised(case.ours, "DatasetError")
    )


@difference("MIN, MAX, PROD exist")
def more_reductions(case: Case) -> bool:
    if case.operation["op"] not in ("reduce", "all_reduce") or not fails(case.theirs):
        return False
    op = {"min": np.min, "max": np.max, "prod": np.prod}.get(case.operation["reduce_op"])
    if op is None:
        return False
    expected = op(parts(case, value(case)), axis=0)
    return result_is(case, on_every_replica(case, expected) if in_replica(case) else expected)


# -- errors ----------------------------------------------------------------------------------------


@difference(
    "All derive from DvKernelsError and from the fitting builtin: BufferMismatchError "
    "(ValueError) (TensorFlow: InvalidArgumentError, which is none)"
)
def errors_are_builtins(case: Case) -> bool:
    return raised(case.theirs, "InvalidArgumentError") and raised(case.ours, "BufferMismatchError")


@difference(
    "Replicas that disagree (another collective, shape, dtype, op) never hang: the step "
    "ends with CollectiveMismatchError"
)
def disagreement_has_its_own_error(case: Case) -> bool:
    return (
        case.operation["op"] in ("all_reduce", "all_gather")
        and raised(case.theirs, "InvalidArgumentError")
        and raised(case.ours, "CollectiveMismatchError")
    )


@difference(
    "Indices out of range raise IndexError (TensorFlow: InvalidArgumentError, or nothing where "
    "replica 0 alone counts)"
)
def indices_are_checked(case: Case) -> bool:
    if case.operation["op"] not in SCATTERS or not raised(case.ours, "IndexError"):
        return False
    rows = len(decoded(case.before[0]))
    indices = np.concatenate(parts(case, case.operation["indices"]))
    return bool(np.any((indices < 0) | (indices >= rows)))


@difference("Every write checks shape and dtype; arrays must match the variable's dtype")
def every_write_is_checked(case: Case) -> bool:
    if case.operation["op"] not in WRITES or not raised(case.ours, "BufferMismatchError"):
        return False
    given, old = parts(case, value(case))[0], decoded(case.before[0])
    return (given.shape, given.dtype) != (old.shape, old.dtype)


@difference(
    "A structure that differs between replicas raises ValueError that shows both (TensorFlow: a "
    "bare AssertionError)"
)
def structures_must_be_the_same(case: Case) -> bool:
    return (
        case.operation["op"] == "return"
        and form(case) == "each"
        and raised(case.theirs, "AssertionError")
        and raised(case.ours, "ValueError")
    )


@difference(
    "distribute_dataset, distribute_values_from_function or next(iterator) in replica context "
    "raise ContextError"
)
def input_belongs_across_replicas(case: Case) -> bool:
    return (
        case.operation["op"] in ("batches", "values")
        and in_replica(case)
        and raised(case.ours, "ContextError")
    )


@difference(
    "A variable that no scope created may be read in run, but writing it there raises ContextError"
)
def no_replica_writes_an_unscoped_variable(case: Case) -> bool:
    return (
        writes(case)
        and in_replica(case)
        and not case.program["variable"].get("scope", True)
        and not fails(case.theirs)
        and raised(case.ours, "ContextError")
    )
