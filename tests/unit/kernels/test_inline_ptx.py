"""Inline PTX of the CUDA kernels: interpreted, it gives the bits of CPU kernels and of twins."""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np
import pytest
from numba import types
from ptx_interpreter import Machine, Value

from dvkernels import kernels
from dvkernels.kernels import arithmetic, update_rules
from dvkernels.kernels.cpu import optimizers
from dvkernels.kernels.cuda.engine import (
    catalogue,
    elements,
    intrinsics,
    launch_table,
    optimizer_rules,
    simulator,
    table_layout,
)
from dvkernels.reduce_op import ReduceOp

pytestmark = pytest.mark.skipif(simulator.IS_ON, reason="the simulator executes no PTX")
VECTORS = 2000
OPS = {
    arithmetic.ADD: ReduceOp.SUM,
    arithmetic.MIN: ReduceOp.MIN,
    arithmetic.MAX: ReduceOp.MAX,
    arithmetic.MUL: ReduceOp.PROD,
}
SHIPPED = dict.fromkeys(kernel.name for kernel in catalogue.shipped())


def pairs():
    """Yield every operation and type code that a kernel ships for."""
    for operation, name in catalogue._OPERATIONS.items():
        for code in range(14):
            if f"{name} {arithmetic.dtype_of(code)}" in SHIPPED:
                yield pytest.param(operation, code, id=f"{name} {arithmetic.dtype_of(code)}")


def arrays(dtype, count, seed=0):
    """Return arrays of random bits, and of the values where arithmetic is delicate."""
    rng = np.random.default_rng(seed)
    size = VECTORS * 16 // dtype.itemsize
    made = [np.frombuffer(rng.bytes(size * dtype.itemsize), dtype).copy() for _ in range(count)]
    real = np.dtype(dtype.char.lower()) if dtype.kind == "c" else dtype
    if real.kind not in "iub":
        info = ml_dtypes.finfo(real)
        tiny = float(info.smallest_subnormal)
        special = [
            0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, float(info.max), float(info.tiny), tiny,
            3 * tiny, 1 + float(info.eps), 1 + float(info.eps) / 2, -float(info.max), 1.5, 3.0,
        ]  # fmt: skip
    else:
        info = np.iinfo(real)
        special = [0, 1, 2, 3, 127, 128 % info.max, info.min, info.max, info.max - 1]
    with np.errstate(all="ignore"):
        numbers = np.array(special).astype(real)
    # Each of them meets each; half of the rest has magnitudes at which sums round.
    for k, array in enumerate(made):
        flat = array.view(real)
        grid = np.repeat(numbers, len(numbers)) if k % 2 else np.tile(numbers, len(numbers))
        flat[: len(grid)] = grid
        if real.kind not in "iub":
            flat[len(flat) // 2 :] = rng.normal(0, 1, len(flat) - len(flat) // 2).astype(real)
    return made


def assert_same(got, expected):
    """Compare bits; a NaN equals any NaN."""
    real = got.dtype if got.dtype.kind != "c" else np.dtype(got.dtype.char.lower())
    got, expected = got.view(real), expected.view(real)
    both_nan = np.zeros(got.shape, bool)
    if real.kind not in "iub":
        both_nan = np.isnan(got) & np.isnan(expected)
    bits = f"u{real.itemsize}"
    wrong = np.flatnonzero((got.view(bits) != expected.view(bits)) & ~both_nan)
    assert not len(wrong), f"{len(wrong)}, such as {got[wrong[0]]!r}, not {expected[wrong[0]]!r}"


class Vectors:
    """All vectors, or elements, of arrays: one for each thread of a machine."""

    def __init__(self, code, is_whole, *arrays):
        self.code, self.is_whole, self.machine = code, is_whole, Machine(arrays)
        self.nbytes = 16 if is_whole else arrays[0].itemsize

    def at(self, array):
        starts = np.arange(0, array.nbytes, self.nbytes) + array.ctypes.data
        return Value(types.int64, [starts.view("u8")])

    def load(self, array):
        return self.machine.call(elements.load, self.at(array), self.code, self.is_whole)

    def store(self, value, array):
        self.machine.call(elements.store, self.at(array), value, self.code, self.is_whole)


def number(value):
    return Value(types.int64, [np.array([value]).view("u8")])


@pytest.mark.parametrize("is_whole", [True, False], ids=["vectors", "elements"])
@pytest.mark.parametrize(("operation", "code"), [*pairs()])
def test_interpreted_ptx_gives_the_bits_of_the_cpu_and_of_the_twin(operation, code, is_whole):
    dtype = arithmetic.dtype_of(code)
    left, right = arrays(dtype, 2)
    result, twin = np.empty_like(left), np.empty_like(left)
    vectors = Vectors(code, is_whole, left, right, result)
    combine = elements.combiner(operation, code, is_whole)
    value = vectors.machine.call(combine, vectors.load(left), vectors.load(right))
    vectors.store(value, result)
    assert_same(result, kernels.reduce([left, right], OPS[operation]))
    working = [side.astype(elements.working_dtype(dtype)) for side in (left, right)]
    with np.errstate(all="ignore"):
        twin[:] = combine.simulated(*working).astype(dtype)
    if dtype.kind != "c" or operation != arithmetic.MUL:  # NumPy fuses some of these products
        assert_same(result, twin)


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize(
    "dtype", [np.dtype(t) for t in ("f2", ml_dtypes.bfloat16, "f4", "f8")], ids=str
)
def test_interpreted_means_are_those_of_the_cpu(dtype, count, monkeypatch):
    code = arithmetic.type_code(dtype)
    sources = arrays(dtype, count)
    result = np.empty_like(sources[0])
    vectors = Vectors(code, True, *sources, result)
    combine = functools.partial(vectors.machine.call, elements.combiner(arithmetic.ADD, code))
    total = functools.reduce(combine, map(vectors.load, sources))
    used = []

    def divided(name, function, value, divisor):
        used.append(name)
        return vectors.machine.call(function, value, number(divisor))

    for name in ("quotient", "exact_quotient"):
        bound = functools.partial(divided, name, getattr(elements, name))
        monkeypatch.setattr(elements, name, bound)
    assert elements.divide.py_func(total, 1, code) is total
    vectors.store(elements.divide.py_func(total, count, code), result)
    assert used == ["quotient" if count == 3 else "exact_quotient"]
    assert_same(result, kernels.reduce(sources, "mean"))


def test_integers_have_no_mean():
    value = Value(elements.vector_type(0, True), [np.zeros(1, "u4")] * 4)
    assert Machine().call(elements.quotient, value, number(3)) is value


@pytest.mark.parametrize("rule", range(5))
@pytest.mark.parametrize("dtype", [np.dtype("f4"), np.dtype("f8")], ids=str)
def test_interpreted_optimizers_are_those_of_the_cpu(dtype, rule):
    code = arithmetic.type_code(dtype)
    gradient, *states = arrays(dtype, 4)
    states[2] = np.abs(states[2])
    twins, results = [one.copy() for one in states], [one.copy() for one in states]
    rates = {"learning_rate": 0.1, "weight_decay": 0.01}
    parameters, first, second = ([[one]] for one in results)
    if rule == update_rules.ADAM:
        optimizers.adam([[gradient]], parameters, first, second, step=3, **rates)
        made = update_rules.adam_coefficients(parameters, 3, 0.1, 0.9, 0.999, 1e-8, 0.01, False)
    elif rule == update_rules.ADAGRAD:
        first[0][0][:] = twins[1][:] = states[1][:] = np.abs(states[1])
        made = [(0.1, 1e-10, 0.01)]
        optimizers.take_step("adagrad", (rule, made), [[gradient]], [parameters, first], "sum")
    else:
        nesterov, momentum = rule == update_rules.NESTEROV, 0.9 * (rule != update_rules.PLAIN)
        velocities = None if rule == update_rules.PLAIN else first
        optimizers.sgd(
            [[gradient]], parameters, velocities, momentum=momentum, nesterov=nesterov, **rates
        )
        made = update_rules.sgd_coefficients(parameters, 0.1, momentum, 0.01)
    coefficients = np.zeros(update_rules.NUM_COEFFICIENTS)
    coefficients[: len(made[0])] = made[0]
    simulated = optimizer_rules.apply.simulated(coefficients.ctypes.data, gradient, *twins, rule)
    vectors = Vectors(code, True, gradient, *states, coefficients)
    loaded = map(vectors.load, (gradient, *states))
    address = number(coefficients.ctypes.data)
    new = vectors.machine.call(optimizer_rules.apply, address, *loaded, rule)
    per_vector = len(new.registers) // 3
    for k, (state, result, twin) in enumerate(zip(states, results, simulated, strict=True)):
        registers = new.registers[k * per_vector : (k + 1) * per_vector]
        vectors.store(Value(elements.vector_type(code, True), registers), state)
        assert_same(state, result)
        assert_same(state, np.asarray(twin))


def test_the_words_of_a_launch_are_copied_to_shared_memory_once():
    words = np.arange(1, table_layout.NUM_WORDS + 1)
    words[0] = 0
    machine = Machine(thread=[0])
    for thread in range(table_layout.THREADS):
        machine.thread = np.array([thread], "u4")
        given = Value(
            types.UniTuple(types.int64, len(words)),
            [words[k : k + 1].view("u8") for k in range(len(words))],
        )
        table = machine.call(launch_table.stage, given).registers[0][0]
    (shared,) = machine.shared.values()
    assert shared.tolist() == words[1:].tolist()
    assert table == shared.ctypes.data
    assert machine.barriers == table_layout.THREADS
    words[0] = 4096  # a table in device memory
    assert machine.call(launch_table.stage, given).registers[0][0] == 4096
    assert machine.barriers == table_layout.THREADS


def test_records_flags_and_divisions():
    memory = np.arange(7, 107)
    machine = Machine([memory])
    at = number(memory.ctypes.data)
    read = machine.call(launch_table.item, at).registers
    assert [int(word[0]) for word in read] == [*launch_table.item.simulated(memory.ctypes.data)]
    for load in (intrinsics.read_word, intrinsics.acquire, intrinsics.load_relaxed):
        assert machine.call(load, at).registers[0][0] == load.simulated(memory.ctypes.data)
    for store, value in ((intrinsics.release, 5), (intrinsics.store_relaxed, -6)):
        machine.call(store, at, number(value))
        assert memory[0] == value
    dividend, divisor = (Value(types.uint32, [np.array([k], "u4")]) for k in (0xFFFFFFFF, 10))
    quotient = machine.call(intrinsics.short_quotient, dividend, divisor).registers[0]
    assert quotient == intrinsics.short_quotient.simulated(0xFFFFFFFF, 10)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("fma.rn.f32 $0, $1, $1, $1;", "no PTX instruction"),
        ("min.s32 $0, $1, $1;", "no PTX instruction"),
        ("add.f32 $0, $1, $1;", "rounding"),
        ("cvt.rz.f32.s64 $0, $1;", "rz"),
        ("mov.b64 $0, $1;", "no b64"),
        ("ld.global.v4.b32 $0, [$1];", r"\$0"),
    ],
)
def test_the_interpreter_refuses_what_it_does_not_know(text, error):
    with pytest.raises((NotImplementedError, AssertionError, TypeError), match=error):
        Machine().execute(text, [np.dtype("f4")], [np.zeros(1, "u4")])
