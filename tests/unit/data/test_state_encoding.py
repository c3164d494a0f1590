"""States of readers survive a round trip through JSON, with types and bits."""

from __future__ import annotations

import collections
import json
import random
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dvkernels.data.dataset import Dataset
from dvkernels.data.distributed.dataset import DistributedDataset
from dvkernels.data.state_encoding import decode, encode
from dvkernels.errors import DatasetError


def through_json(value: Any) -> Any:
    return decode(json.loads(json.dumps(encode(value, "state"))))


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    if isinstance(one, np.ndarray | np.generic):
        values = np.asarray(one), np.asarray(other)
        return (
            values[0].dtype == values[1].dtype
            and values[0].shape == values[1].shape
            and (values[0].tobytes() == values[1].tobytes())
        )
    return bool(one == other)


PLAIN = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    | st.binary() | arrays.arrays(arrays.scalar_dtypes(), arrays.array_shapes(min_dims=0))
)  # fmt: skip
STATES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner) | st.tuples(inner, inner)
    | st.dictionaries(st.text() | st.integers() | st.just("dvkernels"), inner),
    max_leaves=8,
)  # fmt: skip


@given(STATES)
def test_states_survive_the_round_trip(state: Any) -> None:
    assert same(state, through_json(state))


def test_bfloat16_scalars_and_generators_survive_the_round_trip() -> None:
    half = np.array([1.5, 2], ml_dtypes.bfloat16)
    assert same(through_json(half), half)
    for scalar in (np.int64(3), np.float16(0.1), np.bool_(True), np.datetime64("2020-01-02")):
        assert same(through_json(scalar), scalar)
    drawn = random.Random(4)
    again = random.Random()
    again.setstate(through_json(drawn.getstate()))
    assert again.random() == drawn.random()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8", "bool", "complex64", "int64"])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_tensors_survive_the_round_trip(dtype: str, shape: tuple[int, ...]) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.ones(shape).to(getattr(torch, dtype))
    back = through_json(tensor)
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert torch.equal(back, tensor)
    if tensor.numel():
        back.zero_()  # it is writable


@pytest.mark.parametrize("part", [
    object(), {1, 2}, np.array([object()]), np.ma.array([1], mask=[1]), lambda: 1,
    np.zeros(2, [("a", int)]), iter([1]), 1j,
], ids=lambda part: type(part).__name__)  # fmt: skip
def test_parts_that_cannot_be_encoded_are_named(part: Any) -> None:
    with pytest.raises(DatasetError, match=rf"(?s)state\['a'\]\[1\] .* a {type(part).__name__};"):
        encode({"a": [1, part]}, "state")


@pytest.mark.parametrize("damaged", [
    {"dvkernels": "pickle", "base64": ""}, {"dvkernels": ["array"]}, {"dvkernels": "array"},
    {"dvkernels": "array", "dtype": "O", "shape": [1], "base64": "AAAAAAAAAAA="},
    {"dvkernels": "array", "dtype": "<f8", "shape": [2**40], "base64": "AAAAAAAAAAA="},
    {"dvkernels": "array", "dtype": "<f8", "shape": [-1], "base64": "AAAAAAAAAAA="},
    {"dvkernels": "array", "dtype": "<f8", "shape": ["x"], "base64": "AAAAAAAAAAA="},
    {"dvkernels": "array", "dtype": "nothing", "shape": [0], "base64": ""},
    {"dvkernels": "bytes", "base64": "%%"}, {"dvkernels": "tuple", "items": 3},
    {"dvkernels": "dict", "items": [[1, 2, 3]]}, {"dvkernels": "dict", "items": [[[], 2]]},
    {"dvkernels": "tensor", "dtype": "load", "shape": [1], "base64": ""},
    {"dvkernels": "tensor", "dtype": "float32", "shape": [3], "base64": "AAAAAAAAAAA="},
])  # fmt: skip
def test_damaged_encodings_are_refused(damaged: Any) -> None:
    if damaged["dvkernels"] == "tensor":
        pytest.importorskip("torch")
    with pytest.raises(DatasetError, match="damaged"):
        decode([damaged])


class Draws:
    """Reader of random numbers, whose state holds an array and a tuple, and ``extra``."""

    def __init__(self, extra: Any = None, length: int = 12) -> None:
        self.extra, self.length = extra, length

    def open(self, epoch: int, state: Any) -> Any:
        return DrawsReader(self, epoch, state)


class DrawsReader:
    def __init__(self, source: Draws, epoch: int, state: Any) -> None:
        self.source, self.generator = source, np.random.Generator(np.random.MT19937(epoch))
        self.values: Any = {"left": source.length, "key": None, "extra": source.extra, 7: (1, [2])}
        if state is not None:
            self.values = state
            self.generator.bit_generator.state = state["key"]
            assert state[7] == (1, [2])

    def __next__(self) -> Any:
        if self.values["left"] == 0:
            raise StopIteration
        self.values["left"] -= 1
        value = self.generator.random()
        self.values["key"] = self.generator.bit_generator.state
        return value

    def state(self) -> Any:
        return self.values  # always the same dict


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_reader_with_arrays_in_its_state_is_resumed_exactly(prefetch: int) -> None:
    data = Dataset.from_source(Draws(b"\0\xff")).filter(lambda x: x > 0.2).batch(2)
    data = data.repeat(2).prefetch(prefetch)
    whole = [batch.values[0].tolist() for batch in DistributedDataset(data, 1)]
    for steps in range(len(whole)):
        with iter(DistributedDataset(data, 1)) as begun, iter(DistributedDataset(data, 1)) as later:
            collections.deque((next(begun) for _ in range(steps)), maxlen=0)
            later.load_state_dict(json.loads(json.dumps(begun.state_dict())))
            assert [batch.values[0].tolist() for batch in later] == whole[steps:]


def test_a_state_that_cannot_be_saved_fails_when_it_is_saved() -> None:
    data = Dataset.from_source(Draws(extra={1, 2})).batch(2)
    with iter(DistributedDataset(data, 1)) as batches:
        next(batches)
        with pytest.raises(DatasetError, match=r"memory\[0\]\[2\]\['extra'\].* a set"):
            batches.state_dict()
        assert len(list(batches)) == 5
