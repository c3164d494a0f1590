"""Laws of checkpoints over generated pytrees, strategies, and damage."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import faults
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import examples

import dvkernels as dv
from dvkernels.errors import CheckpointDamagedError

DTYPES = ["bool", "int8", "uint64", "float16", "bfloat16", "float32", "complex128"]
SHAPES = [(), (0,), (3,), (2, 3), (1, 0, 2)]
STRATEGIES = ["plain", "one", "mirrored 1", "mirrored 2", "mirrored 3", "central"]

atoms = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers(allow_nan=False)
    | st.text(st.characters(), max_size=5)
    | st.binary(max_size=5)
)
keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
data = st.recursive(
    atoms,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)
tensors = st.tuples(
    st.sampled_from(["variable", "array"]),
    st.sampled_from(DTYPES),
    st.sampled_from(SHAPES),
    st.integers(0, 2**32),
).map(lambda drawn: ("tensor", *drawn))
nests = st.recursive(
    tensors | st.tuples(st.just("data"), data),
    lambda inner: (
        st.tuples(st.just("list"), st.lists(inner, min_size=1, max_size=3))
        | st.tuples(st.just("tuple"), st.lists(inner, min_size=1, max_size=3))
        | st.tuples(st.just("dict"), st.dictionaries(keys, inner, min_size=1, max_size=3))
    ),
    max_leaves=8,
)


def strategy_of(name):
    kind, _, count = name.partition(" ")
    match kind:
        case "mirrored":
            return dv.MirroredStrategy([f"cpu:{k}" for k in range(int(count))])
        case "central":
            return dv.CentralStorageStrategy(["cpu:0", "cpu:1"])
        case _:
            return dv.OneDeviceStrategy("cpu:0")


def bits(dtype, shape, seed):
    given_dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    size = int(np.prod(shape)) * given_dtype.itemsize
    high = 2 if dtype == "bool" else 256
    raw = np.random.default_rng(seed).integers(0, high, size, dtype=np.uint8)
    return raw.view(given_dtype).reshape(shape)


def build(plan, *, is_blank=False):
    """Build the objects of a plan; blank ones have the same shapes and other content."""
    match plan:
        case ("tensor", kind, dtype, shape, seed):
            array = bits(dtype, shape, seed)
            array = np.zeros_like(array) if is_blank else array
            return dv.Variable(array) if kind == "variable" else array
        case ("data", value):
            is_container = isinstance(value, list | dict)
            return (type(value)() if is_container else None) if is_blank else value
        case ("list", inner):
            return [build(each, is_blank=is_blank) for each in inner]
        case ("tuple", inner):
            return tuple(build(each, is_blank=is_blank) for each in inner)
        case ("dict", inner):
            return {key: build(each, is_blank=is_blank) for key, each in inner.items()}
    raise AssertionError(plan)


def shown(value):
    """Return the content of objects in comparable form, bit for bit; all copies must be equal."""
    if isinstance(value, dv.Variable):
        copies = {copy.tobytes() for copy in value.values}
        assert len(copies) == 1
        return copies.pop()
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, dict):
        return {key: shown(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value), [shown(each) for each in value]
    return repr(value)


@settings(max_examples=examples(60), deadline=None)
@given(plan=nests, before=st.sampled_from(STRATEGIES), after=st.sampled_from(STRATEGIES))
def test_any_pytree_is_restored_under_any_strategy(plan, before, after):
    with tempfile.TemporaryDirectory() as folder:
        with strategy_of(before) as one:
            with one.scope():
                objects = build(plan)
            dv.Checkpoint(nest=objects).save(f"{folder}/c")
        with strategy_of(after) as two:
            with two.scope():
                found = build(plan, is_blank=True)
            restored = dv.Checkpoint(nest=found).restore(f"{folder}/c")
            assert shown(restored.values["nest"]) == shown(objects)
            if isinstance(found, list | dict):
                assert restored.values["nest"] is found
            assert not restored.missing + restored.unexpected


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "c"
    dv.Checkpoint(weight=dv.Variable(np.arange(9.0)), data={"a": [1, "x"]}).save(folder)
    return folder


@settings(max_examples=examples(150), deadline=None)
@given(drawn=st.data())
def test_any_changed_bit_is_found(saved, drawn):
    path = saved / drawn.draw(st.sampled_from(sorted(os.listdir(saved))))
    bit = drawn.draw(st.integers(0, 8 * path.stat().st_size - 1))
    good = path.read_bytes()
    faults.flip_bit(path, bit)
    weight, data_of = dv.Variable(np.zeros(9)), {}
    try:
        with pytest.raises(CheckpointDamagedError):
            dv.Checkpoint(weight=weight, data=data_of).restore(saved)
        assert not weight.numpy().any()
        assert not data_of
    finally:
        Path(path).write_bytes(good)


@settings(max_examples=examples(40), deadline=None)
@given(
    copies=st.lists(st.integers(-100, 100), min_size=1, max_size=4),
    count=st.integers(1, 4),
    aggregation=st.sampled_from(["sum", "only_first_replica", "none"]),
)
def test_the_value_read_from_an_on_read_variable_is_restored(copies, count, aggregation):
    modes = {"synchronization": "on_read", "aggregation": aggregation}
    devices = [f"cpu:{k}" for k in range(4)]
    with (
        tempfile.TemporaryDirectory() as folder,
        dv.MirroredStrategy(devices[: len(copies)]) as one,
        dv.MirroredStrategy(devices[:count]) as two,
    ):
        with one.scope():
            before = dv.Variable(0, **modes)
        with two.scope():
            after = dv.Variable(0, **modes)
        before.assign(dv.PerReplica(copies))
        dv.Checkpoint(v=before).save(f"{folder}/c")
        if aggregation == "none" and count != len(copies) and len(set(copies)) > 1:
            with pytest.raises(dv.errors.CheckpointError):
                dv.Checkpoint(v=after).restore(f"{folder}/c")
            return
        dv.Checkpoint(v=after).restore(f"{folder}/c")
        if aggregation == "none":
            held = [int(copy) for copy in after.values]
            assert held == (copies if count == len(copies) else [copies[0]] * count)
        else:
            assert int(after.read_value()) == int(before.read_value())
