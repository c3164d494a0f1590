"""Variables are written by their methods only, and masked arrays are refused."""

from __future__ import annotations

import operator
from decimal import Decimal
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from kinds import devices, only_cpu

import dvkernels as dv

INTEGERS = ("ilshift", "irshift", "iand", "ior", "ixor")
IN_PLACE = (
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", *INTEGERS,
)  # fmt: skip


@pytest.fixture
def strategy():
    with dv.MirroredStrategy(devices(2)) as strategy:
        yield strategy


def made(strategy, content, **modes):
    with strategy.scope():
        return dv.Variable(content, **modes)


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("where", ["attribute", "item", "local in a replica"])
def test_in_place_operators_raise_and_do_not_rebind_the_name(strategy, name, where):
    dtype = "i8" if name in INTEGERS else "f8"
    variable = made(strategy, np.arange(3, dtype=dtype), aggregation="sum")
    change = getattr(operator, name)

    class Owner:
        held = variable

    held = {"it": variable}

    def on_attribute():
        Owner.held = change(Owner.held, 2)

    def on_item():
        held["it"] = change(held["it"], 2)

    act = {"attribute": on_attribute, "item": on_item}.get(
        where, lambda: strategy.run(lambda: change(variable, 2))
    )
    with pytest.raises(TypeError, match=r"v\.assign\(.*v\.assign_add\(.*v\.assign_sub\("):
        act()
    assert Owner.held is variable
    assert held["it"] is variable
    for copy in variable.values:
        np.testing.assert_array_equal(np.asarray(copy.tolist()), np.arange(3))


@only_cpu
@pytest.mark.parametrize("function", [divmod, operator.lshift, operator.rshift])
def test_plain_operators_on_either_side(strategy, function):
    variable, numbers = made(strategy, np.arange(1, 4)), np.arange(1, 4)
    np.testing.assert_array_equal(function(variable, 2), function(numbers, 2))
    np.testing.assert_array_equal(function(7, variable), function(7, numbers))
    np.testing.assert_array_equal(function(variable, variable), function(numbers, numbers))


@only_cpu
@pytest.mark.parametrize(
    "write",
    [
        lambda v: np.add(v, 1, out=v),
        lambda v: np.add(v.numpy(), 1, v),
        lambda v: np.modf(v, v, v),
        lambda v: np.add.at(v, [0], 1),
        lambda v: np.add.reduce(np.ones((2, 3)), out=v),
        lambda v: np.sum(np.ones((2, 3)), axis=0, out=v),
        lambda v: np.clip(v, 0, 1, out=v),
        lambda v: np.concatenate([np.ones(3)], out=v),
        lambda v: np.copyto(v, 1.0),
        lambda v: np.copyto(dst=v, src=np.ones(3)),
        lambda v: np.put(v, [0], 1),
        lambda v: np.putmask(v, [True] * 3, 1),
        lambda v: np.place(v, [True] * 3, [1]),
        lambda v: np.put_along_axis(v, np.array([0]), 1, 0),
        lambda v: operator.setitem(v, 0, 1),
        lambda v: operator.setitem(v, ..., np.ones(3)),
        lambda v: operator.setitem(v, v > 0, np.ones(3)),
    ],
)
def test_numpy_does_not_write_into_a_variable(strategy, write):
    variable = made(strategy, np.array([3.0, 4.0, 5.0]))
    with pytest.raises(TypeError, match=r"v\.assign\("):
        write(variable)
    assert all(copy.tolist() == [3.0, 4.0, 5.0] for copy in variable.values)


@only_cpu
def test_numpy_reads_a_variable_as_its_value(strategy):
    variable, array = made(strategy, np.array([3.0, 4.0])), np.array([3.0, 4.0])
    into = np.zeros(2)
    np.copyto(into, variable)
    assert into.tolist() == [3.0, 4.0]
    for function in (
        np.mean,
        lambda x: np.concatenate([x, x]),
        lambda x: np.where(x > 3, x, 0),
        lambda x: np.einsum("i,i", x, x),
        lambda x: np.sum(x, out=np.zeros(())),
        np.linalg.norm,
    ):
        np.testing.assert_array_equal(function(variable), function(array))


MASKED = np.ma.array([1.0, -9999.0, 3.0], mask=[False, True, False])
WRITES = {
    "assign": lambda v, x: v.assign(x),
    "assign_add": lambda v, x: v.assign_add(x),
    "scatter_update": lambda v, x: v.scatter_update([0, 1, 2], x),
    "scatter_add at masked indices": lambda v, x: v.scatter_add(
        np.ma.array([0, 1, 2], mask=[0, 1, 0]), np.ones(3)
    ),
}


@only_cpu
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("mode", ["on_write", "none"])
@pytest.mark.parametrize("kind", ["array", "list of numbers", "captured"])
def test_a_mask_is_refused_by_every_write(strategy, write, mode, kind):
    variable = made(strategy, np.zeros(3), synchronization=mode, aggregation="only_first_replica")
    value = {"array": MASKED, "list of numbers": [*MASKED], "captured": dv.PerReplica([MASKED] * 2)}
    with pytest.raises(dv.errors.NotABufferError, match=r"variable_\d+.*mask would be ignored"):
        strategy.run(lambda: WRITES[write](variable, value[kind]))
    if kind != "captured" or mode == "none":
        with pytest.raises(dv.errors.NotABufferError, match=r"variable_\d+.*mask would be ignored"):
            WRITES[write](variable, value[kind])
    assert not any(copy.any() for copy in variable.values)


@only_cpu
@pytest.mark.parametrize("kind", [lambda: MASKED, lambda: [MASKED, MASKED], lambda: (*MASKED,)])
def test_a_mask_is_refused_at_creation(strategy, kind):
    for initial in (kind(), kind):
        with pytest.raises(dv.errors.NotABufferError, match="mask would be ignored"):
            made(strategy, initial)


@only_cpu
@pytest.mark.parametrize(
    "use",
    [
        lambda s, v, m: s.reduce("sum", dv.PerReplica([m, m])),
        lambda s, v, m: s.reduce("sum", dv.PerReplica([m, m]), axis=0),
        lambda s, v, m: s.gather(s.distribute_values_from_function(lambda _: m)),
        lambda s, v, m: s.broadcast_to(m, "cpu:0"),
        lambda s, v, m: dv.PerReplica([m, m]).copy_to("cpu:0"),
        lambda s, v, m: s.update(v, lambda copy, x: copy.assign(x), (m,)),
        lambda s, v, m: dv.optimizers.SGD(0.1).apply_gradients([(m, v)]),
        lambda s, v, m: s.run(lambda: dv.get_replica_context().all_gather(m)),
        lambda s, v, m: s.run(lambda: dv.get_replica_context().all_reduce("sum", m.data, out=m)),
        lambda s, v, m: s.run(
            lambda: dv.get_replica_context().all_reduce("mean", 1.0, weight=np.ma.masked)
        ),
        lambda s, v, m: dv.kernels.all_reduce([m, m]),
        lambda s, v, m: dv.kernels.all_reduce([m.data, m.data], out=[m, m]),
    ],
)
def test_a_mask_is_refused_wherever_an_array_is_taken(strategy, use):
    variable = made(strategy, np.zeros(3))
    with pytest.raises(dv.errors.NotABufferError, match="mask would be ignored"):
        use(strategy, variable, MASKED.copy())
    assert not any(copy.any() for copy in variable.values)


@only_cpu
@pytest.mark.parametrize(
    ("initial", "dtype"),
    [
        ([1.5, 2.0], "i4"),
        ([np.nan], "i8"),
        ([np.inf], "i8"),
        ([300], "u1"),
        (np.array([-1]), "u8"),
        ([2], "?"),
        ([1 + 2j], "f8"),
        ([1 + 0j], "i8"),
        ([1.0], "M8[s]"),
        ([1.0], "U3"),
    ],
)
def test_a_dtype_that_cannot_hold_the_initial_value_is_refused(strategy, initial, dtype):
    with pytest.raises(
        (dv.errors.BufferMismatchError, dv.errors.NotABufferError), match=r"dtype|hold"
    ):
        made(strategy, initial, dtype=dtype)


@only_cpu
@pytest.mark.parametrize(
    ("initial", "dtype", "expected"),
    [
        ([1.0, 2.0], "i4", "i4"),
        ([1, 0], "?", "?"),
        ([1], "f2", "f2"),
        ([0.25], "f4", "f4"),
        ([1], "c8", "c8"),
        (np.array([1.0, 2.0], ">f8"), None, "f8"),
        (np.array([1, 2], ">i4"), None, "i4"),
        ([1.0], ">f4", "f4"),
        ([1.0], ml_dtypes.bfloat16, ml_dtypes.bfloat16),
        (np.array([1.0], ml_dtypes.bfloat16), "f4", "f4"),
    ],
)
def test_a_cast_dtype_has_native_byte_order(strategy, initial, dtype, expected):
    variable = made(strategy, initial, dtype=dtype, aggregation="sum")
    assert variable.dtype == np.dtype(expected)
    assert variable.dtype.isnative
    np.testing.assert_array_equal(variable.numpy().astype(complex), np.array(initial, complex))


@pytest.mark.parametrize("wrong", ["no", 0, []])
def test_trainable_is_a_truth_value(wrong):
    with pytest.raises(TypeError, match="trainable"):
        dv.Variable(1.0, trainable=wrong)


@pytest.mark.parametrize("number", [Decimal("1.5"), Fraction(1, 2), {}, [None]])
def test_a_value_that_is_not_a_number_is_refused(strategy, number):
    variable = made(strategy, 1.0, synchronization="none")
    with pytest.raises(dv.errors.NotABufferError, match="is not a number or an array of numbers"):
        variable.assign(number)
