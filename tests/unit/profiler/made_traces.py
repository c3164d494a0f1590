"""Traces with known answers, in milliseconds, written as ``dv.profiler.trace`` writes them."""

from __future__ import annotations

import numpy as np

import dvkernels as dv
from dvkernels.profiler import trace_format

STRATEGY = "MirroredStrategy(cpu:0, cpu:1)"
JOB = "MultiWorkerMirroredStrategy(cpu:0)"
CALL = "all_reduce(sum, float32[1000])"


def facts(worker=0, **more):
    about = {"worker": worker, "num_workers": 1, "host": "here", "cores": 2, "dropped_events": 0}
    return about | {"thread_seconds": [1.0, 1.0], "library_thread_seconds": []} | more


def span(name, category, begin, end, lane, worker=0, **about):
    return {
        "ph": "X", "name": name, "cat": category, "ts": 1e3 * begin, "dur": 1e3 * (end - begin),
        "pid": worker, "tid": lane, "args": about,
    }  # fmt: skip


def run(begin, end, replica, step, strategy=STRATEGY, worker=0):
    about = {"replica": replica, "step": step, "strategy": strategy}
    return span("run", "step", begin, end, replica, worker, **about)


def call(begin, end, replica, step, text=CALL, strategy=STRATEGY, worker=0, **more):
    verb = text.partition("(")[0]
    about = {"call": text, "strategy": strategy, "step": step, "replica": replica, "bytes": 4000}
    return span(verb, "collective", begin, end, replica, worker, **about, **more)


def reduce(begin, end, lane, step, text=CALL, strategy=STRATEGY, worker=0, **more):
    about = {"call": text, "strategy": strategy, "step": step, "bytes": 4000, "dtype": "float32"}
    about |= {"replicas": 2, **more}
    return span("reduce", "collective", begin, end, lane, worker, **about)


def memory(at, worker=0, **owners):
    return {"ph": "C", "name": "memory", "ts": 1e3 * at, "pid": worker, "tid": 0, "args": owners}


def steady(num_steps, compute=(2.5, 4.5), text=CALL):
    """Return steps of 10 ms: 2 of input, half a millisecond to start, the compute, 1 to reduce."""
    records = []
    for step in range(1, num_steps + 1):
        t = 10.0 * step
        calls = [t + 2.5 + each for each in compute]
        last = max(calls)
        records += [
            span("next", "input", t, t + 2, 0, bytes=8),
            *(call(begin, last + 1.5, k, step, text) for k, begin in enumerate(calls)),
            reduce(last, last + 1, calls.index(last), step, text, attained=0.5),
            run(t + 2.5, last + 2, 0, step),
            run(t + 2.5, last + 2.5, 1, step),
        ]
    return records


def write(path, records, about=None):
    with path.open("wb") as file:
        trace_format.write_records(file, records, about or facts())
    return path


def job(path):
    """Record the trace of a worker of two; the workers find this module by its name."""
    with dv.MultiWorkerMirroredStrategy(devices=["cpu:0"] * 2) as strategy:

        def step():
            dv.get_replica_context().all_reduce("sum", np.ones(1000))
            dv.get_replica_context().barrier()

        strategy.run(step)
        with dv.profiler.trace(path):
            for _ in range(5):
                strategy.run(step)
