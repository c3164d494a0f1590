"""Rows of a variable: gathers and scatters of every mode, their indices, and their errors."""

from __future__ import annotations

import fork_server
import ml_dtypes
import numpy as np
import pytest
from kinds import only_cpu

import dvkernels as dv

pytestmark = only_cpu
WIDE = 3000  # rows of a request that several cores share
RNG = np.random.default_rng(0)


@pytest.fixture
def two():
    with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        yield strategy


def made(strategy, content, synchronization="on_write", aggregation="sum"):
    with strategy.scope():
        return dv.Variable(
            content, synchronization=synchronization, aggregation=aggregation, name="table"
        )


def replica():
    return dv.get_replica_context().replica_id_in_sync_group


@pytest.mark.parametrize("count", [5, WIDE])
@pytest.mark.parametrize("dtype", ["f2", ml_dtypes.bfloat16, "f4", "c16", "i8"], ids=str)
def test_a_scatter_of_all_replicas_has_the_bits_of_one_after_another(two, dtype, count):
    table = RNG.integers(-9, 9, (200, 16)).astype(dtype)
    indices = RNG.integers(0, 200, (2, count))
    updates = (RNG.integers(-99, 99, (2, count, 16)) / 8).astype(dtype)
    variable = made(two, table)
    two.run(lambda: variable.scatter_add(indices[replica()], updates[replica()]))
    expected = table.astype("f4" if np.dtype(dtype).itemsize == 2 else dtype)
    np.add.at(expected, indices.reshape(-1), updates.reshape(-1, 16).astype(expected.dtype))
    for copy in variable.values:
        assert copy.tobytes() == expected.astype(dtype).tobytes()


def test_the_mean_of_the_replicas_is_divided_before_it_is_added(two):
    variable = made(two, np.ones((3, 2), "f4"), aggregation="mean")
    two.run(lambda: variable.scatter_sub([replica(), 2], np.full((2, 2), 3.0, "f4")))
    np.testing.assert_array_equal(variable.values, [[[-0.5] * 2, [-0.5] * 2, [-2.0] * 2]] * 2)


def test_copies_of_their_own_get_rows_of_their_own(two):
    variable = made(two, np.zeros((4, 2)), "none", "none")
    rows = dv.PerReplica([np.array([0, 0]), np.array([3])])
    variable.scatter_add(rows, dv.PerReplica([np.ones((2, 2)), np.full((1, 2), 5.0)]))
    np.testing.assert_array_equal(
        [copy[:, 0] for copy in variable.values], [[2, 0, 0, 0], [0, 0, 0, 5]]
    )
    out = dv.PerReplica([np.empty((1, 2)), np.empty((1, 2))])
    assert variable.gather_rows([3], out=out) is out
    np.testing.assert_array_equal(out.values, [[[0.0, 0.0]], [[5.0, 5.0]]])
    with pytest.raises(ValueError, match="PerReplica"):
        variable.gather_rows([3], out=np.empty((1, 2)))


@pytest.mark.parametrize("count", [6, WIDE])
@pytest.mark.parametrize("dtype", ["u1", "i2", "u4", ">i8", "u8"])
def test_indices_of_any_integer_dtype_shape_and_stride(two, dtype, count):
    variable = made(two, RNG.normal(size=(100, 16)))
    table = variable.numpy()
    indices = RNG.integers(0, 100, (2, count)).astype(dtype).T[::-1]
    np.testing.assert_array_equal(variable.gather_rows(indices), table[indices])
    updates = RNG.normal(size=(2, count, 32))[..., ::2].transpose(1, 0, 2)
    variable.scatter_add(indices, updates)
    np.add.at(table, indices, updates)
    np.testing.assert_array_equal(variable.numpy(), table)
    variable.scatter_mul(indices[:0], updates[:0])
    variable.scatter_mul(indices, 0.0)
    assert not variable.numpy()[np.unique(indices)].any()


@pytest.mark.parametrize("count", [4, WIDE])
def test_rows_are_gathered_into_an_array_of_the_caller(two, count):
    variable = made(two, np.arange(400.0).reshape(100, 4).repeat(8, 1))
    rows = RNG.integers(0, 100, count)
    out, holes = np.empty((count, 32)), np.empty((count, 64))[:, ::2]
    for target in (out, holes):
        assert variable.gather_rows(rows, out=target) is target
        np.testing.assert_array_equal(target, variable.numpy()[rows])
    given = two.run(lambda: variable.gather_rows(rows, out=np.empty((count, 32))))
    np.testing.assert_array_equal(given.values, [out, out])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda v: np.empty((3, 2)), r"float64\[2, 2\]; got one that is float64\[3, 2\]"),
        (lambda v: np.empty((2, 2), "f4"), r"float64\[2, 2\]; got one that is float32\[2, 2\]"),
        (lambda v: v.values[0][:2], "read-only"),
        (lambda v: [[0.0, 0.0]] * 2, "must be an array, got a list"),
    ],
)
def test_an_out_that_does_not_fit_is_refused(two, wrong, said):
    variable = made(two, np.zeros((5, 2)))
    with pytest.raises(
        (ValueError, TypeError), match=f"gather_rows of variable 'table': out.*{said}"
    ):
        variable.gather_rows([1, 0], out=wrong(variable))
    with pytest.raises((ValueError, TypeError), match=f"out of replica [01].*{said}"):
        two.run(lambda: variable.gather_rows([1, 0], out=wrong(variable)))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ([0, 1, -1], "got index -1 at position 2"),
        ([[0, 5], [9, 1]], r"got index 5 at position \(0, 1\)"),
        (np.array([0, 2**64 - 1], "u8"), "got index 18446744073709551615 at position 1"),
        (np.int8(-3), "got index -3 from replica 1"),
        ([0.0, 1.0, 1.5], "1.5 at position 2"),
        ([[0.0, np.nan]], r"nan at position \(0, 1\)"),
        ([1.0, np.inf], "inf at position 1"),
        ([2.0], "2.0 at position 0"),
        ([True, False], "True at position 0"),
        (["0"], "'0' at position 0"),
        ([[0], [0, 1]], r"\[\[0\], \[0, 1\]\]"),
    ],
)
@pytest.mark.parametrize("verb", ["gather_rows", "scatter_add", "scatter_update"])
@pytest.mark.parametrize("mode", ["on_write", "none"])
def test_wrong_indices_are_named_before_anything_is_written(two, verb, mode, wrong, said):
    how = "sum" if verb != "scatter_update" else "only_first_replica"
    variable = made(two, np.zeros((5, 2)), mode, how)

    def act():
        indices = wrong if replica() == 1 else [0]
        given = (
            () if verb == "gather_rows" else (np.ones((*np.shape(np.array(indices, object)), 2)),)
        )
        getattr(variable, verb)(indices, *given)

    pattern = f"{verb} of variable 'table'.*{said}.*replica 1|{said}"
    with pytest.raises((IndexError, TypeError), match=pattern) as caught:
        two.run(act)
    assert "from replica 1" in str(caught.value)
    untouched = variable.values if mode == "on_write" else variable.values[1:]
    assert not any(copy.any() for copy in untouched)


def test_a_table_without_rows_says_so(two):
    variable = made(two, np.zeros((0, 2)))
    assert variable.gather_rows([]).shape == (0, 2)
    variable.scatter_add([], np.zeros((0, 2)))
    with pytest.raises(IndexError, match="it has no rows"):
        variable.gather_rows([0])


def test_drafts_of_an_update_are_scattered_and_committed_together(two):
    variable = made(two, np.zeros((3, 2)))

    def fails_at_the_second(draft):
        draft.scatter_add([1, 1], np.ones((2, 2)))
        if "replica_1" in draft.name:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        two.update(variable, fails_at_the_second)
    assert not np.any(variable.values)
    two.update(variable, lambda draft: draft.scatter_add([1, 1], np.ones((2, 2))))
    np.testing.assert_array_equal(variable.values, [[[0, 0], [2, 2], [0, 0]]] * 2)


def test_a_variable_outside_every_scope_is_written_in_a_forked_process():
    program = """
import os
import numpy as np
import dvkernels as dv

loose = dv.Variable(np.zeros(3))
own = dv.Variable(np.zeros(3), synchronization="none")
loose.scatter_add([0, 0], np.ones(2))
for _ in range(2):
    if child := os.fork():
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    loose.assign_add(np.ones(3))
    loose.scatter_add([1] * 99_999, np.ones(99_999))  # by all cores
    dv.sync([own])
assert loose.numpy().tolist() == [4.0, 200_000.0, 2.0], loose
"""
    done = fork_server.run(program)
    assert done.returncode == 0, done.stderr
