"""Programs over strategies and variables as plain data, and a seeded generator of them.

A program is a dictionary that JSON can hold::

    {"strategy": "mirrored" | "one_device" | "central_storage", "replicas": n,
     "variable": {"initial": array, "synchronization": ..., "aggregation": ...},
     "operations": [{"op": name, "context": "replica" | "cross", ...}, ...]}

``"scope": false`` in the variable creates it outside every scope.

Its answer is a list of outcomes, one for the creation of the variable and one for each operation,
up to the first error: ``{"result": tree, "copies": [array, ...]}`` or ``{"error": class name}``. A
write has no result; its effect is in the copies.

=============== =================== ===========================================================
op              context             fields
=============== =================== ===========================================================
assign[_add|sub] both               value
scatter_*       both                indices (an array), updates (an array), each a value
read            both
all_reduce      replica             reduce_op, value
all_gather      replica             axis, value
merge_call      replica             fn (reduce, assign_reduced, identity, read, run), value,
                                    reduce_op
create_inside   replica             value, that of the variable which run creates and reads
enter_scope     replica
return          replica             value, what the function of ``run`` returns
step            replica             operations, all of them inside one ``run``
reduce          cross               reduce_op, axis, value
gather          cross               axis, value
update          cross               verb, value, group
local_results   cross               value
reduce_to       cross               reduce_op, value; the destination is the variable
broadcast_to    cross               value; the destination is the variable
values          cross               value, as distribute_values_from_function makes it
run_again       cross               value, which an inner run returns
batches         cross               elements, batch, drop_remainder
own_batches     cross               the same of distribute_datasets_from_function, where a batch
                                    of None leaves the elements single
=============== =================== ===========================================================

Operations of cross-replica context may be called in a replica too, to compare the errors.

A value is ``{"form": "array", "parts": [array, ...]}`` (a fresh array on each replica, in
cross-replica context a PerReplica of them), ``{"form": "plain", "part": array}``, ``{"form":
"literal", "number": x}``, ``{"form": "variable"}``, ``{"form": "none"}``, ``{"form": "nest",
"items": {name: value}}``, or ``{"form": "each", "values": [value, ...]}``, one for each replica.
An array is a line: ``"float32 2x2 1.0 2.0 3.0 4.0"``, ``"int32 - 7"`` (no axes).
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

SEED = 20260
GENERATED = 600

WRITES = ("assign", "assign_add", "assign_sub")
SCATTERS = tuple(f"scatter_{verb}" for verb in ("add", "sub", "mul", "div", "min", "max", "update"))


def encoded(array: Any) -> str:
    array = np.asarray(array)
    shape = "x".join(map(str, array.shape)) or "-"
    return " ".join([array.dtype.name, shape, *map(repr, array.reshape(-1).tolist())])


def decoded(line: str) -> np.ndarray:
    dtype, axes, *data = line.split(" ")
    shape = [] if axes == "-" else [int(length) for length in axes.split("x")]
    number = int if "int" in dtype else float
    return np.array([number(word) for word in data], dtype).reshape(shape)


def digest(program: dict[str, Any]) -> str:
    """Return the digest of a program, by which recorded answers are matched to it."""
    text = json.dumps(program, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def all_programs() -> dict[str, dict[str, Any]]:
    programs = {digest(program): program for program in written()}
    for number in range(GENERATED):
        program = _Generator(number).program()
        programs[digest(program)] = program
    return programs


# -- values ----------------------------------------------------------------------------------------


def array(*data: Any, dtype: str = "float32") -> dict[str, Any]:
    """Return a value with one array per replica."""
    return {"form": "array", "parts": [encoded(np.array(part, dtype)) for part in data]}


def plain(data: Any, dtype: str = "float32") -> dict[str, Any]:
    return {"form": "plain", "part": encoded(np.array(data, dtype))}


def literal(number: float) -> dict[str, Any]:
    return {"form": "literal", "number": number}


VARIABLE = {"form": "variable"}
NONE = {"form": "none"}


def nest(**items: Any) -> dict[str, Any]:
    return {"form": "nest", "items": items}


def replica(op: str, **fields: Any) -> dict[str, Any]:
    return {"op": op, "context": "replica", **fields}


def cross(op: str, **fields: Any) -> dict[str, Any]:
    return {"op": op, "context": "cross", **fields}


def program(
    replicas: int,
    initial: Any,
    modes: str,
    *operations: Any,
    strategy: str = "mirrored",
    dtype: str = "float32",
) -> dict[str, Any]:
    synchronization, aggregation = modes.split()
    return {
        "strategy": strategy,
        "replicas": replicas,
        "variable": {
            "initial": encoded(np.array(initial, dtype)),
            "synchronization": synchronization,
            "aggregation": aggregation,
        },
        "operations": list(operations),
    }


def each(*values: Any) -> dict[str, Any]:
    return {"form": "each", "values": list(values)}


# -- programs written by hand ----------------------------------------------------------------------


def written() -> Iterator[dict[str, Any]]:
    """Yield programs where the libraries may differ, and those of the documented tables."""
    one_two, same = array(1.0, 2.0), array(5.0, 5.0)
    # Every aggregation and every write, in a replica.
    for how in ("none", "sum", "mean", "only_first_replica"):
        for verb in WRITES:
            yield program(2, 1.0, f"on_write {how}", replica(verb, value=one_two))
            yield program(2, 1.0, f"on_read {how}", replica(verb, value=one_two))
            yield program(2, 1.0, f"on_write {how}", cross(verb, value=plain(6.0)), cross("read"))
            yield program(2, 1.0, f"on_read {how}", cross(verb, value=plain(6.0)), cross("read"))
        yield program(2, 1.0, f"on_write {how}", replica("assign", value=same))
        yield program(2, 1.0, f"on_write {how}", cross("assign", value=one_two))
        yield program(2, 1.0, f"on_read {how}", cross("assign", value=one_two))
        # Literals: a value passed in replica context is that replica's contribution.
        for number in (5.0, 0.0):
            yield program(2, 1.0, f"on_write {how}", replica("assign", value=literal(number)))
            yield program(2, 1.0, f"on_write {how}", cross("assign", value=literal(number)))
        for verb in SCATTERS:
            scatter = {"indices": array([0], [1], dtype="int32"), "updates": array([2.0], [3.0])}
            yield program(2, [4.0, 8.0], f"on_write {how}", replica(verb, **scatter))
            yield program(
                2,
                [4.0, 8.0],
                f"on_write {how}",
                cross(verb, indices=plain([0], "int32"), updates=plain([2.0])),
            )
        yield program(2, [4.0, 8.0], f"on_read {how}", replica("scatter_add", **scatter))
        for op in ("sum", "mean"):
            for modes in (f"on_write {how}", f"on_read {how}"):
                yield program(
                    2,
                    0.0,
                    modes,
                    cross("assign", value=plain(3.0)),
                    replica("all_reduce", reduce_op=op, value=VARIABLE),
                    cross("reduce", reduce_op=op, axis=None, value=VARIABLE),
                )
    yield program(2, 1.0, "on_write sum", cross("assign_add", value=literal(0.0)))
    yield program(2, 1.0, "on_write sum", replica("assign", value=VARIABLE))
    yield program(2, 1.0, "on_write mean", replica("assign", value=VARIABLE))
    # Duplicates, lengths that differ, and integer quotients.
    for how in ("sum", "mean", "only_first_replica"):
        yield program(
            2,
            [4.0, 8.0, 2.0],
            f"on_write {how}",
            replica(
                "scatter_add",
                indices=array([0, 0], [2], dtype="int32"),
                updates=array([1.0, 2.0], [4.0]),
            ),
        )
    for data in ([7, -7], [8, 6]):
        quotient = {"indices": plain([0, 1], "int32"), "updates": plain([2, 2], "int32")}
        yield program(2, data, "on_write sum", cross("scatter_div", **quotient), dtype="int32")
    # Integers.
    for size in (2, 3):
        yield program(
            size,
            0,
            "on_read sum",
            cross("assign", value=plain(7, "int32")),
            cross("read"),
            dtype="int32",
        )
    yield program(2, 0, "on_write mean", dtype="int32")
    yield program(2, 0, "on_read mean", dtype="int32")
    yield program(1, 0, "on_write mean", strategy="one_device", dtype="int32")
    yield program(2, 0, "on_write mean", strategy="central_storage", dtype="int32")
    integers = array(1, 2, dtype="int32")
    for op in ("sum", "mean"):
        yield program(2, 0.0, "on_write sum", replica("all_reduce", reduce_op=op, value=integers))
        yield program(
            2, 0.0, "on_write sum", cross("reduce", reduce_op=op, axis=None, value=integers)
        )
    # Results of run.
    for size in (1, 2):
        for value in (
            literal(3),
            NONE,
            array(*range(size)),
            nest(a=array(*range(size)), b=literal(3), c=NONE),
        ):
            yield program(size, 0.0, "on_write sum", replica("return", value=value))
    yield program(
        1, 0.0, "on_write sum", replica("return", value=literal(3)), strategy="one_device"
    )
    # Reduce and gather: plain values, pytrees, axes, empty parts, scalars.
    rows, uneven, empty = array([1.0, 2.0], [3.0, 5.0]), array([0.0, 1.0, 2.0, 3.0], [4.0, 5.0]), []
    some = array([1.0, 3.0], empty)
    for op in ("sum", "mean"):
        for value, axis in (
            (plain(1.0), None),
            (plain([1.0, 2.0]), 0),
            (rows, 0),
            (rows, -1),
            (rows, None),
            (uneven, 0),
            (some, 0),
            (array([[1.0, 2.0]], [[3.0, 4.0]]), [0, 1]),
            (array([[1.0, 2.0]], [[3.0, 4.0]]), 1),
            (array([1, 2], [3, 5], dtype="int32"), 0),
            (nest(a=one_two, b=same), None),
            (nest(a=rows, b=uneven), 0),
            (rows, 5),
            (uneven, None),
            (VARIABLE, 0),
        ):
            yield program(
                2,
                [1.0, 2.0],
                "on_write sum",
                cross("reduce", reduce_op=op, axis=axis, value=value),
            )
    for value, axis in (
        (rows, 0),
        (uneven, 0),
        (uneven, -1),
        (some, 0),
        (array([[1.0, 2.0]], [[3.0, 4.0]]), 1),
        (array([[1.0], [2.0]], [[3.0, 4.0]]), 1),
        (one_two, 0),
        (integers, 0),
        (plain([1.0, 2.0]), 0),
        (nest(a=rows, b=uneven), 0),
        (VARIABLE, 0),
    ):
        yield program(2, [1.0, 2.0], "on_write sum", cross("gather", axis=axis, value=value))
        if value["form"] == "array":
            yield program(
                2, [1.0, 2.0], "on_write sum", replica("all_gather", axis=axis, value=value)
            )
    yield program(
        2, 0.0, "on_write sum", replica("all_reduce", reduce_op="sum", value=literal(5.0))
    )
    yield program(2, 0.0, "on_write sum", replica("all_reduce", reduce_op="sum", value=uneven))
    # merge_call, update, local_results.
    for strategy in ("mirrored", "central_storage"):
        for fn in ("reduce", "assign_reduced", "identity", "read"):
            call = replica("merge_call", fn=fn, reduce_op="sum", value=one_two)
            yield program(2, 1.0, "on_write sum", call, cross("read"), strategy=strategy)
        for value in (one_two, plain(5.0)):
            for modes in ("on_write sum", "on_read sum"):
                for group in (True, False):
                    call = cross("update", verb="assign_add", value=value, group=group)
                    yield program(2, 1.0, modes, call, cross("read"), strategy=strategy)
        for value in (one_two, plain(5.0), VARIABLE, nest(a=one_two, b=plain(3.0)), NONE):
            call = cross("local_results", value=value)
            yield program(2, 1.0, "on_write sum", call, strategy=strategy)
        call = cross("reduce_to", reduce_op="mean", value=one_two)
        yield program(2, 1.0, "on_write sum", call, strategy=strategy)
        yield program(
            2, 1.0, "on_write sum", cross("broadcast_to", value=plain(4.0)), strategy=strategy
        )
    # Synchronization that is not ON_WRITE, where there is one copy, or one that may drift.
    for strategy, size in (("mirrored", 2), ("one_device", 1), ("central_storage", 2)):
        for modes in ("none none", "none sum", "on_read sum", "on_read none"):
            calls = (
                replica("assign", value=array(*[3.0] * size)),
                replica("read"),
                cross("assign", value=plain(2.0)),
                cross("read"),
            )
            yield program(size, 1.0, modes, *calls, strategy=strategy)
    # Other reductions, and no reduction.
    for op in ("min", "max", "prod", "median"):
        yield program(2, 1.0, "on_write sum", cross("reduce", reduce_op=op, axis=None, value=rows))
        yield program(2, 1.0, "on_write sum", replica("all_reduce", reduce_op=op, value=rows))
    # Values that do not fit the variable.
    for modes in ("on_write sum", "on_write mean", "on_write only_first_replica", "on_read sum"):
        for verb in WRITES:
            for call, value in ((replica, rows), (cross, plain([1.0, 2.0]))):
                yield program(2, [0.0] * 3, modes, call(verb, value=value))
            for call, value in ((replica, integers), (cross, plain(1, "int32"))):
                yield program(2, 0.0, modes, call(verb, value=value))
    for verb in SCATTERS:
        far = {"indices": array([0], [5], dtype="int32"), "updates": array([2.0], [3.0])}
        wide = {"indices": array([0], [1], dtype="int32"), "updates": array([2.0, 1.0], [3.0, 1.0])}
        for fields in (far, wide):
            yield program(2, [4.0, 8.0], "on_write sum", replica(verb, **fields))
            yield program(2, [4.0, 8.0], "on_write only_first_replica", replica(verb, **fields))
        outside = {"indices": plain([-1], "int32"), "updates": plain([2.0])}
        yield program(2, [4.0, 8.0], "on_write none", cross(verb, **outside))
    # Calls in the wrong context.
    for call in (
        replica("reduce", reduce_op="sum", axis=None, value=one_two),
        replica("gather", axis=0, value=rows),
        replica("values", value=one_two),
        replica("run_again", value=one_two),
        replica("batches", elements=4, batch=2, drop_remainder=False),
        replica("enter_scope"),
    ):
        yield program(2, 1.0, "on_write sum", call)
    # More of run and merge_call.
    for size in (1, 2):
        given = array(*[k + 1.0 for k in range(size)])
        for call in (
            cross("values", value=given),
            cross("run_again", value=given),
            replica("merge_call", fn="run", reduce_op="sum", value=given),
            replica("return", value=VARIABLE),
            replica("create_inside", value=given),
        ):
            yield program(size, 1.0, "on_write sum", call)
    for value in (
        each(NONE, plain(1.0)),
        each(nest(a=plain(1.0)), nest(b=plain(1.0))),
        each(nest(a=plain(1.0)), plain(1.0)),
        each(nest(a=plain(1.0)), nest(a=NONE)),
    ):
        yield program(2, 1.0, "on_write sum", replica("return", value=value))
    # A variable that no scope created.
    for call in (
        replica("read"),
        replica("assign_add", value=one_two),
        cross("assign_add", value=plain(1.0)),
        cross("read"),
    ):
        made = program(2, 1.0, "on_write sum", call)
        made["variable"]["scope"] = False
        yield made
    # Splitting of batches.
    for size in (1, 2, 3, 4):
        for elements, batch, drop in (
            (8, 4, False),
            (9, 4, False),
            (10, 4, True),
            (7, 7, False),
            (8, 5, False),
            (3, 2, False),
            (12, 12, False),
        ):
            call = cross("batches", elements=elements, batch=batch, drop_remainder=drop)
            yield program(size, 0.0, "on_write sum", call)
        for elements, batch, drop in (
            (7, 2, False),
            (9, 2, False),
            (12, 2, False),
            (12, 2, True),
            (7, 2, True),
            (12, None, False),
            (7, None, False),
        ):
            call = cross("own_batches", elements=elements, batch=batch, drop_remainder=drop)
            yield program(size, 0.0, "on_write sum", call)


# -- the generator ---------------------------------------------------------------------------------

_STRATEGIES = (
    (("mirrored", 2), 30),
    (("mirrored", 3), 18),
    (("mirrored", 4), 12),
    (("mirrored", 1), 12),
    (("one_device", 1), 12),
    (("central_storage", 2), 16),
)
# TensorFlow refuses NONE variables on several replicas, and dvkernels all but ON_WRITE in central
# storage: these programs end with the creation of the variable, so a few of them are enough.
_SYNCHRONIZATIONS = {
    "mirrored": (("on_write", 60), ("on_read", 38), ("none", 2)),
    "one_device": (("on_write", 40), ("on_read", 30), ("none", 30)),
    "central_storage": (("on_write", 94), ("on_read", 3), ("none", 3)),
}
_AGGREGATIONS = (("none", 1), ("sum", 1), ("mean", 1), ("only_first_replica", 1))
_SHAPES: tuple[tuple[int, ...], ...] = ((), (3,), (2, 2))
_OPERATIONS = (
    ("write", 34),
    ("scatter", 16),
    ("read", 8),
    ("all_reduce", 8),
    ("all_gather", 5),
    ("merge_call", 7),
    ("step", 6),
    ("reduce", 7),
    ("gather", 4),
    ("update", 5),
    ("local_results", 3),
    ("reduce_to", 2),
    ("broadcast_to", 2),
    ("batches", 2),
)


class _Generator:
    """Generator of one random program; uses only ``random()``, whose sequence never changes."""

    def __init__(self, number: int) -> None:
        self._random = random.Random(SEED * 100_000 + number).random

    def program(self) -> dict[str, Any]:
        self.strategy, self.replicas = self._weighted(_STRATEGIES)
        self.synchronization = self._weighted(_SYNCHRONIZATIONS[self.strategy])
        self.aggregation = self._weighted(_AGGREGATIONS)
        self.dtype = "float32" if self.aggregation == "mean" else self._pick(("float32", "int32"))
        self.shape = self._pick(_SHAPES)
        count = 1 + self._below(6)
        return {
            "strategy": self.strategy,
            "replicas": self.replicas,
            "variable": {
                "initial": self._array(self.shape, self.dtype),
                "synchronization": self.synchronization,
                "aggregation": self.aggregation,
            },
            "operations": [self._operation(last=k == count - 1) for k in range(count)],
        }

    # -- drawing -------------------------------------------------------------------------------

    def _below(self, bound: int) -> int:
        return int(self._random() * bound)

    def _pick(self, options: Any) -> Any:
        return options[self._below(len(options))]

    def _weighted(self, options: Any) -> Any:
        left = self._random() * sum(weight for _, weight in options)
        for option, weight in options:
            left -= weight
            if left < 0:
                return option
        return options[-1][0]

    def _likely(self, probability: float) -> bool:
        return self._random() < probability

    def _array(self, shape: tuple[int, ...], dtype: str, plus: int = 0) -> str:
        quarter = 0.25 if dtype == "float32" else 1
        data = [(self._below(33) - 16 + plus) * quarter for _ in range(math.prod(shape))]
        return encoded(np.array(data, dtype).reshape(shape))

    # -- values --------------------------------------------------------------------------------

    def _parts(self, shapes: list[tuple[int, ...]], dtype: str) -> dict[str, Any]:
        """Return multiples of the replica id plus a constant, or equal parts."""
        step = 0 if self._likely(0.2) else 1 + self._below(7)
        if step == 0 and len(set(shapes)) == 1:
            parts = [self._array(shapes[0], dtype)] * len(shapes)
        else:
            parts = [self._array(shape, dtype, step * k) for k, shape in enumerate(shapes)]
        return {"form": "array", "parts": parts}

    def _value(self, context: str) -> dict[str, Any]:
        """Return a value that fits the variable."""
        if self._likely(0.03):
            number = self._below(9)
            return literal(float(number) if self.dtype == "float32" else number)
        if context == "replica" or self._likely(0.1):
            return self._parts([self.shape] * self.replicas, self.dtype)
        return {"form": "plain", "part": self._array(self.shape, self.dtype)}

    def _distributed(self, *, uneven: bool = False, scalars: bool = True) -> dict[str, Any]:
        """Return a value for a collective: any shape and dtype."""
        dtype = self._pick(("float32", "float32", "int32"))
        shape = self._pick(_SHAPES if scalars else _SHAPES[1:])
        shapes = [shape] * self.replicas
        if uneven and shape and self._likely(0.5):
            shapes = [(1 + self._below(3), *shape[1:]) for _ in shapes]
        return self._parts(shapes, dtype)

    def _nested(self, value: dict[str, Any], probability: float) -> dict[str, Any]:
        if self._likely(probability):
            return nest(a=value, b=self._distributed())
        return value

    # -- operations ----------------------------------------------------------------------------

    def _operation(self, *, last: bool) -> dict[str, Any]:
        while True:
            drawn = getattr(self, f"_draw_{self._weighted(_OPERATIONS)}")()
            if drawn is not None and (last or not self._ends(drawn)):
                return drawn

    def _ends(self, drawn: dict[str, Any]) -> bool:
        """Return whether one of the libraries is likely to raise, which ends the program."""
        op, context, value = drawn["op"], drawn["context"], drawn.get("value", {})
        write = op in WRITES or op in SCATTERS
        several = self.replicas > 1
        if op == "step":
            return any(self._ends(inner) for inner in drawn["operations"])
        if op in SCATTERS and self.synchronization == "on_read":
            return True
        if op.endswith(("min", "max", "update")) and op in SCATTERS:
            return self.aggregation in ("sum", "mean")
        if write and self.synchronization == "on_write":
            if context == "replica" and several:
                return self.aggregation == "none" or value.get("form") == "literal"
            return context == "cross" and value.get("form") == "array"
        if self.synchronization == "on_read" and context == "cross":
            if self.aggregation == "none":
                return op in (*WRITES, "read")
            if write:
                adds = self.aggregation == "sum" and op != "assign"
                return adds or value.get("form") == "array"
        if op in ("reduce", "all_reduce") and drawn["reduce_op"] == "mean":
            return "int32" in str(value)
        return False

    def _draw_write(self) -> dict[str, Any]:
        context = self._pick(("replica", "replica", "cross"))
        op = self._pick(WRITES)
        return {"op": op, "context": context, "value": self._value(context)}

    def _draw_scatter(self) -> dict[str, Any] | None:
        if not self.shape:
            return None
        op, context = self._pick(SCATTERS), self._pick(("replica", "replica", "cross"))
        lengths = [1 + self._below(2) for _ in range(self.replicas)]
        if context == "cross":
            lengths = lengths[:1]
        indices, updates = [], []
        for number in lengths:
            # The order of duplicates in scatter_update is unspecified in TensorFlow.
            first = self._below(self.shape[0])
            rows = [(first + k) % self.shape[0] for k in range(number)]
            if op != "scatter_update" and self._likely(0.3):
                rows = [first] * number
            indices.append(encoded(np.array(rows, "int32")))
            drawn = decoded(self._array((number, *self.shape[1:]), self.dtype))
            if op in ("scatter_mul", "scatter_div"):
                drawn.flat = [self._pick((1, 2, 4, -2)) for _ in range(drawn.size)]
            updates.append(encoded(drawn))
        if context == "cross":
            fields = {
                "indices": {"form": "plain", "part": indices[0]},
                "updates": {"form": "plain", "part": updates[0]},
            }
        else:
            fields = {
                "indices": {"form": "array", "parts": indices},
                "updates": {"form": "array", "parts": updates},
            }
        return {"op": op, "context": context, **fields}

    def _draw_read(self) -> dict[str, Any]:
        return {"op": "read", "context": self._pick(("replica", "cross"))}

    def _draw_all_reduce(self) -> dict[str, Any]:
        value = VARIABLE if self._likely(0.1) else self._nested(self._distributed(), 0.2)
        return replica("all_reduce", reduce_op=self._pick(("sum", "mean")), value=value)

    def _draw_all_gather(self) -> dict[str, Any]:
        value = self._distributed(uneven=True, scalars=self._likely(0.05))
        shapes = {decoded(part).shape for part in value["parts"]}
        rank, uneven = max(1, *map(len, shapes), 0), len(shapes) > 1
        return replica("all_gather", axis=0 if uneven else self._below(rank), value=value)

    def _draw_merge_call(self) -> dict[str, Any]:
        fn = self._pick(("reduce", "assign_reduced", "identity", "read"))
        value = self._parts([self.shape] * self.replicas, self.dtype)
        op = "sum" if self.dtype == "int32" else self._pick(("sum", "mean"))
        return replica("merge_call", fn=fn, reduce_op=op, value=value)

    def _draw_step(self) -> dict[str, Any]:
        """Several operations within one run."""
        inner: list[dict[str, Any]] = []
        while len(inner) < 2 + self._below(2):
            op = self._pick(("write", "write", "scatter", "read", "all_reduce", "merge_call"))
            drawn = getattr(self, f"_draw_{op}")()
            if drawn is None or drawn["context"] != "replica" or self._known_to_differ(drawn):
                continue
            if not self._ends(drawn):
                inner.append(drawn)
            elif self.synchronization == "on_write" and self.aggregation == "none":
                inner.append(replica("read"))
        return replica("step", operations=inner)

    def _known_to_differ(self, drawn: dict[str, Any]) -> bool:
        """Tell what is left out of steps, because a step is compared as a whole."""
        op = drawn["op"]
        if op in SCATTERS and self.strategy == "central_storage":
            return True
        if drawn.get("fn") == "assign_reduced" and self.synchronization == "on_read":
            return self.aggregation in ("none", "sum")
        return op == "scatter_div" and self.dtype == "int32"

    def _draw_reduce(self) -> dict[str, Any]:
        op = self._pick(("sum", "mean"))
        if self._likely(0.1):
            return cross("reduce", reduce_op=op, axis=None, value=VARIABLE)
        if self._likely(0.5):
            value = self._nested(self._distributed(), 0.2)
            return cross("reduce", reduce_op=op, axis=None, value=value)
        value = self._distributed(uneven=True, scalars=False)
        return cross("reduce", reduce_op=op, axis=0, value=value)

    def _draw_gather(self) -> dict[str, Any]:
        drawn = self._draw_all_gather()
        return {**drawn, "op": "gather", "context": "cross"}

    def _draw_update(self) -> dict[str, Any]:
        value = {"form": "plain", "part": self._array(self.shape, self.dtype)}
        verb, group = self._pick(WRITES), self._likely(0.5)
        return cross("update", verb=verb, value=value, group=group)

    def _draw_local_results(self) -> dict[str, Any]:
        value = self._pick((VARIABLE, self._distributed(), self._nested(self._distributed(), 1)))
        return cross("local_results", value=value)

    def _draw_reduce_to(self) -> dict[str, Any]:
        value = self._parts([self.shape] * self.replicas, "float32")
        return cross("reduce_to", reduce_op=self._pick(("sum", "mean")), value=value)

    def _draw_broadcast_to(self) -> dict[str, Any]:
        return cross("broadcast_to", value={"form": "plain", "part": self._array((3,), "float32")})

    def _draw_batches(self) -> dict[str, Any]:
        batch = 1 + self._below(9)
        return cross(
            "batches",
            elements=1 + self._below(20),
            batch=batch,
            drop_remainder=self._likely(0.3),
        )
