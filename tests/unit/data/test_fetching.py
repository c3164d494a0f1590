"""Prefetching and map workers change neither the elements nor their positions."""

from __future__ import annotations

import contextlib
import gc
import logging
import operator
import os
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import daily, examples

import dvkernels as dv
from dvkernels.data.dataset import Dataset
from dvkernels.data.distributed import stats as input_stats
from dvkernels.data.distributed.dataset import DistributedDataset
from dvkernels.errors import DatasetError, WorkerLostError

KINDS = ["threads", "processes"]


def data_threads():
    return [t.name for t in threading.enumerate() if t.name.startswith("dvkernels-data")]


def children():
    family = psutil.Process().children(recursive=True)
    return [child for child in family if "dvkernels.data.worker_process" in str(child.cmdline())]


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    gc.collect()
    end = time.monotonic() + 10
    while data_threads() or children():
        assert time.monotonic() < end, (data_threads(), children())
        time.sleep(0.01)


def numbers(iterator):
    return [int(x) for batch in iterator for part in batch.values for x in part]


def fails_on(*bad):
    def fn(x):
        if int(x) in bad:
            raise ZeroDivisionError(f"on {int(x)}")
        return x

    return fn


def end_the_process(x):
    if int(x) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sequential", [False, True])
def test_workers_keep_the_order(kind, sequential):
    source = Dataset.from_iterable(lambda: iter(range(23))) if sequential else Dataset.range(23)
    mapped = source.map(operator.neg, num_workers=2, workers=kind)
    assert [int(x) for batch in mapped.batch(5) for x in batch] == [-x for x in range(23)]
    shuffled = Dataset.range(23).shuffle(seed=1).map(operator.neg, num_workers=2, workers=kind)
    plain = Dataset.range(23).shuffle(seed=1).map(operator.neg)
    with contextlib.closing(iter(DistributedDataset(shuffled.batch(4), 2))) as batches:
        assert numbers(batches) == numbers(DistributedDataset(plain.batch(4), 2))


@pytest.mark.parametrize("num_workers", [0, 3])
def test_a_failing_element_is_named_and_nothing_is_lost(num_workers):
    data = Dataset.range(20).shuffle(seed=3).map(fails_on(7), num_workers=num_workers).batch(4)
    iterator = iter(DistributedDataset(data.prefetch(2), 2))
    seen = []

    def go_on():
        for batch in iterator:
            seen.extend(int(x) for part in batch.values for x in part)

    with pytest.raises(ZeroDivisionError, match="on 7") as caught:
        go_on()
    assert any("index 7 of the source" in note for note in caught.value.__notes__)
    with pytest.raises(ZeroDivisionError):  # the same batch is tried again
        next(iterator)
    assert iterator.state_dict()["position"] == len(seen) // 4
    iterator.close()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize("sequential", [False, True])
def test_failing_elements_can_be_skipped(num_workers, depth, sequential):
    source = Dataset.from_iterable(lambda: iter(range(12))) if sequential else Dataset.range(12)
    mapped = source.map(fails_on(2, 4, 5, 6, 7), num_workers=num_workers)
    options = dv.InputOptions(prefetch=depth, on_error="skip")
    right = [0, 1, 3, 8, 9, 10, 11]
    for data in (mapped.batch(4), mapped.batch(1)):
        with iter(DistributedDataset(data, 2, options=options)) as iterator:
            assert numbers(iterator) == right
            stats = iterator.stats()
            assert stats.num_skipped == 5
            assert "ZeroDivisionError: on 2" in stats.skipped[0]
    with iter(DistributedDataset(mapped.batch(1), 1, options=options)) as iterator:
        for _ in range(3):
            next(iterator)
        state = iterator.state_dict()
    with iter(DistributedDataset(mapped.batch(1), 1, options=options)) as iterator:
        iterator.load_state_dict(state)
        assert numbers(iterator) == right[3:]


@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize(
    "transform",
    [
        lambda data: data.filter(lambda x: fails_on(2, 4)(x) >= 0),
        lambda data: data.map(fails_on(2, 4)).filter(lambda x: True),
        lambda data: data.map(fails_on(2, 4)).filter(lambda x: True).shuffle(seed=0, window=1),
    ],
)
def test_failing_elements_are_skipped_around_a_filter(transform, depth):
    options = dv.InputOptions(prefetch=depth, on_error="skip")
    distributed = DistributedDataset(transform(Dataset.range(7)).batch(2), 1, options=options)
    iterator = iter(distributed)
    assert numbers(iterator) == [0, 1, 3, 5, 6]
    stats = iterator.stats()
    assert stats.num_skipped == 2
    assert "ZeroDivisionError: on 4" in stats.skipped[1]
    assert "element 4 of range(7)" in stats.skipped[1]
    resumed = iter(distributed)
    resumed.load_state_dict(iterator.state_dict() | {"position": 1})
    assert numbers(resumed) == [3, 5, 6]


def test_a_killed_worker_process_is_an_error_and_the_next_batch_works():
    data = Dataset.range(12).map(end_the_process, num_workers=2, workers="processes").batch(4)
    with iter(DistributedDataset(data, 1)) as iterator:
        next(iterator)
        with pytest.raises(WorkerLostError, match="was it killed"):
            next(iterator)
        state = iterator.state_dict() | {"position": 2}
        iterator.load_state_dict(state)
        assert numbers(iterator) == [8, 9, 10, 11]


def test_functions_that_cannot_be_pickled_are_refused():
    with pytest.raises(DatasetError, match="cannot be pickled"):
        Dataset.range(3).map(lambda x: x, num_workers=2, workers="processes")
    with pytest.raises(DatasetError, match="threads, processes"):
        Dataset.range(3).map(abs, num_workers=2, workers="magic")


@settings(max_examples=examples(60), deadline=None)
@given(
    length=st.integers(0, 40),
    size=st.integers(1, 7),
    depth=st.integers(0, 3),
    num_workers=st.sampled_from([0, 0, 2]),
    sequential=st.booleans(),
    stops=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), max_size=4),
)
def test_stopped_anywhere_resumed_on_any_number_of_replicas(
    length, size, depth, num_workers, sequential, stops
):
    if sequential:
        source = Dataset.from_iterable(lambda: iter(range(length)))
    else:
        source = Dataset.range(length).shuffle(seed=5)
    data = source.map(operator.neg, num_workers=num_workers).batch(size).prefetch(depth)
    right = [int(x) for batch in source.map(operator.neg).batch(size) for x in batch]
    seen, state = [], None
    for steps, replicas in [*stops, (1000, 3)]:
        with iter(DistributedDataset(data, replicas)) as iterator:
            if state is not None:
                iterator.load_state_dict(state)
            for _ in range(steps):
                found = iterator.get_next_as_optional()
                if not found.has_value():
                    break
                seen += [int(x) for part in found.get_value().values for x in part]
            state = iterator.state_dict()
    assert seen == right


def test_prefetch_is_no_part_of_the_state():
    with iter(DistributedDataset(Dataset.range(9).batch(2).prefetch(3), 2)) as iterator:
        next(iterator)
        time.sleep(0.05)  # the prefetch thread continues meanwhile
        state = iterator.state_dict()
    with iter(DistributedDataset(Dataset.range(9).batch(2), 1)) as iterator:
        iterator.load_state_dict(state)
        assert numbers(iterator) == [*range(2, 9)]


def test_prefetching_overlaps_with_the_work():
    def slow(x):
        time.sleep(0.02)
        return x

    options = dv.InputOptions(prefetch=2)
    with iter(DistributedDataset(Dataset.range(12).map(slow).batch(1), 1, options=options)) as data:
        next(data)
        for _ in data:
            time.sleep(0.025)
        stats = data.stats()
    assert stats.num_batches == 12
    assert stats.nbytes == 12 * 8
    assert stats.fetch_seconds > 12 * 0.02
    assert stats.wait_seconds < 0.6 * stats.fetch_seconds
    assert stats.copy_seconds == 0  # parts are views
    assert (stats.prefetch, stats.queue_depth) == (2, 0)


def test_an_input_bound_loop_is_warned_with_a_remedy(caplog):
    data = Dataset.range(150).map(lambda x: time.sleep(2e-4) or x).batch(1)
    with (
        caplog.at_level(logging.WARNING, "dvkernels"),
        iter(DistributedDataset(data, 1)) as batches,
    ):
        numbers(batches)
    (record,) = caplog.records
    assert "prefetch" in record.message
    assert "num_workers" in record.message


def test_prefetched_bytes_are_in_the_memory_report():
    data = Dataset.from_arrays(np.zeros((8, 1000))).batch(1).prefetch(3)
    with iter(DistributedDataset(data, 1)) as iterator:
        next(iterator)
        end = time.monotonic() + 5
        while iterator.stats().queue_depth < 3:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert dv.profiler.memory().by_device["cpu:0"]["prefetch"] == 3 * 8000


@pytest.mark.parametrize("kind", KINDS)
def test_a_collected_iterator_ends_its_threads_and_processes(kind):
    data = Dataset.range(1000).map(operator.neg, num_workers=2, workers=kind).batch(4).prefetch(2)
    iterator = iter(DistributedDataset(data, 2))
    next(iterator)
    assert data_threads()
    del iterator


@pytest.mark.parametrize(
    "options", [{"prefetch": -1}, {"on_error": "ignore"}, {"auto_shard_policy": "none"}]
)
def test_invalid_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))[:4]):
        dv.InputOptions(**options)
    with (
        dv.OneDeviceStrategy("cpu:0") as strategy,
        pytest.raises(DatasetError, match="InputOptions"),
    ):
        strategy.distribute_dataset(Dataset.range(3).batch(1), {"prefetch": 1})


def test_strategies_take_options():
    with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        options = dv.InputOptions(prefetch=1)
        batches = strategy.distribute_dataset(Dataset.range(5).batch(2), options)
        assert numbers(batches) == [0, 1, 2, 3, 4]
        dealt = strategy.distribute_datasets_from_function(
            lambda here: Dataset.range(5).batch(1), options
        )
        assert numbers(dealt) == [0, 1, 2, 3, 4]


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize(
    "sent", daily([signal.SIGINT, signal.SIGTERM, signal.SIGKILL], signal.SIGINT, signal.SIGKILL)
)
def test_no_process_outlives_the_program(tmp_path, sent):
    (tmp_path / "work.py").write_text(
        "import time\ndef slow(x):\n    time.sleep(0.02)\n    return x\n"
    )
    (tmp_path / "program.py").write_text(
        "import dvkernels as dv, work\n"
        "if __name__ == '__main__':\n"
        "    data = dv.Dataset.range(10**6).map(work.slow, num_workers=2, workers='processes')\n"
        "    for batch in data.batch(4).prefetch(2):\n"
        "        print(batch, flush=True)\n"
    )
    root = os.path.dirname(os.path.dirname(dv.__file__))
    with subprocess.Popen(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as program:
        assert program.stdout.readline()
        family = psutil.Process(program.pid).children(recursive=True)
        assert len(family) >= 2
        program.send_signal(sent)
        program.stdout.close()
        try:
            program.wait(20)
        finally:
            program.kill()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


def test_workers_run_concurrently():
    both = threading.Barrier(2, timeout=20)  # each waits for the other

    def meet(x):
        both.wait()
        return x

    data = Dataset.range(4).map(meet, num_workers=2).batch(2)
    assert [batch.tolist() for batch in data] == [[0, 1], [2, 3]]


def test_the_time_of_copies_to_devices_is_counted_separately(monkeypatch):
    class SlowCopier:
        def copy(self, columns):
            time.sleep(0.01)
            return [list(column) for column in columns]

    distributed = DistributedDataset(Dataset.range(9).batch(3), 2)
    monkeypatch.setattr(distributed._distribution.splitter, "_copier", SlowCopier())
    with iter(distributed) as iterator:
        assert len(list(iterator)) == 3
        stats = iterator.stats()
    assert 0.03 <= stats.copy_seconds <= stats.wait_seconds


@pytest.mark.parametrize(
    ("calls", "headspace"),
    [
        ([(0, 9)], None),
        ([(0, 9), (10, 11)], 2.0),  # of the 2 s after the first batch, 1 s was a wait
        ([(0, 9), (12, 13), (16, 17)], 8 / 6),
        ([(0, 9), (12, 12), (16, 16)], 1.0),
        ([(0, 9), (9, 13)], float("inf")),
    ],
)
def test_headspace_is_the_speed_up_of_steps_that_wait_for_no_data(monkeypatch, calls, headspace):
    recorder = input_stats.StatsRecorder("raise")
    for began, ended in calls:
        clock = types.SimpleNamespace(perf_counter=lambda ended=ended: float(ended))
        monkeypatch.setattr(input_stats, "time", clock)
        recorder.count(float(began), [])
    cursor = types.SimpleNamespace(fetch_seconds=None, num_ready=0)
    assert recorder.stats(cursor, 0).headspace == headspace
