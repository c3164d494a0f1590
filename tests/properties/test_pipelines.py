"""Law of all pipelines: stopped anywhere and resumed on any replicas, the elements are the same."""

import json
from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import examples

from dvkernels.data import resume_points
from dvkernels.data.dataset import Dataset
from dvkernels.data.distributed.dataset import DistributedDataset
from dvkernels.data.distributed.options import InputOptions


class Numbers:
    """A stateful source."""

    def __init__(self, length):
        self.length = length

    def open(self, epoch, state):
        return NumbersReader(self.length, state or 0)


class NumbersReader:
    def __init__(self, length, place):
        self.length, self.place = length, place

    def __next__(self):
        if self.place == self.length:
            raise StopIteration
        self.place += 1
        return np.int64(self.place - 1)

    def state(self):
        return self.place


def fails_at_threes(x):
    if int(np.max(x)) % 7 == 3:
        raise OSError("three")
    return x


def changed(x, rng):
    return x + 8 * rng.integers(2**20)


SOURCES = [
    Dataset.range,
    lambda n: Dataset.from_arrays(np.arange(n)),
    lambda n: Dataset.from_sequence([np.int64(k) for k in range(n)]),
    lambda n: Dataset.from_iterable(lambda: (np.int64(k) for k in range(n))),
    lambda n: Dataset.from_source(Numbers(n)),
]
FEW = st.integers(0, 8)
WORKERS = st.sampled_from([0, 0, 0, 2])
TRANSFORMS = st.one_of(
    st.builds(lambda k, n: lambda d: d.shuffle(seed=k, window=n), FEW, st.integers(1, 9)),
    st.builds(lambda k: lambda d: d.map(lambda x: x + 1, num_workers=k), WORKERS),
    st.just(lambda d: d.filter(lambda x: np.sum(x) % 3 != 1)),
    st.builds(lambda k: lambda d: d.random_map(changed, seed=3, num_workers=k), WORKERS),
    st.builds(lambda n: lambda d: d.take(4 * n), FEW),
    st.builds(lambda n: lambda d: d.skip(n), FEW),
    st.builds(lambda n: lambda d: d.repeat(n), st.integers(1, 3)),
    st.builds(lambda n: lambda d: d.prefetch(n), st.integers(0, 2)),
    st.builds(lambda k: lambda d: d.shard(3, k), st.integers(0, 2)),
)
FAILING = st.builds(lambda k: lambda d: d.map(fails_at_threes, num_workers=k), WORKERS)


@st.composite
def elements(draw, transforms):
    dataset = draw(st.sampled_from(SOURCES))(draw(st.sampled_from([0, 1, 5, 17, 40])))
    for transform in draw(st.lists(transforms, max_size=5)):
        dataset = transform(dataset)
    return dataset


@st.composite
def pipelines(draw):
    if draw(st.booleans()):
        dataset = draw(elements(TRANSFORMS)).zip(draw(elements(TRANSFORMS)))
        dataset = dataset.map(lambda both: both[0] + 100 * both[1])
    else:
        dataset = draw(elements(TRANSFORMS))
    options = {"on_error": "raise"}
    if draw(st.booleans()) and len(dataset.node.sources) < 2:
        dataset = draw(elements(st.one_of(TRANSFORMS, FAILING)))
        options = {"on_error": "skip"}
    dataset = dataset.batch(draw(st.integers(1, 7)), drop_remainder=draw(st.booleans()))
    for transform in draw(st.lists(TRANSFORMS, max_size=2)):
        dataset = transform(dataset)
    return dataset, options


@settings(max_examples=examples(250), deadline=None)
@given(
    pipeline=pipelines(), epoch=st.sampled_from([0, 1, 5]), data=st.data(),
    stops=st.lists(st.integers(0, 6), max_size=3), max_marks=st.sampled_from([1, 4, 999]),
)  # fmt: skip
def test_any_pipeline_resumed_anywhere_continues_unchanged(pipeline, epoch, data, stops, max_marks):
    dataset, options = pipeline

    def batches(state, most):
        depth = data.draw(st.sampled_from([None, 0, 1, 3]))
        replicas = data.draw(st.sampled_from([1, 2, 3]))
        distributed = DistributedDataset(
            dataset, replicas, options=InputOptions(prefetch=depth, **options)
        )
        distributed.set_epoch(epoch)
        with iter(distributed) as iterator:
            if state is not None:
                iterator.load_state_dict(json.loads(json.dumps(state)))
            found = []
            while most is None or len(found) < most:
                optional = iterator.get_next_as_optional()
                if not optional.has_value():
                    break
                parts = optional.get_value().values
                found.append([x for part in parts for x in part.ravel().tolist()])
            return found, iterator.state_dict()

    with mock.patch.object(resume_points, "MAX_RESUME_POINTS", max_marks):
        whole, _ = batches(None, None)
        seen, state = [], None
        for most in [*stops, None]:
            found, state = batches(state, most)
            seen += found
        assert seen == whole
