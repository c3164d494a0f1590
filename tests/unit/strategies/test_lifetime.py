"""Lifetime of replica threads: forks, interrupts, failures and garbage collection."""

from __future__ import annotations

import ast
import functools
import gc
import os
import signal
import threading
import time
import weakref

import fork_server
import numpy as np
import psutil
import pytest

import dvkernels as dv
from dvkernels.errors import CollectiveTimeoutError, ContextError

DEVICES = ["cpu:0", "cpu:1"]
MIB = 1024 * 1024

needs_posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and POSIX signals")


@pytest.fixture
def strategy():
    with dv.MirroredStrategy(DEVICES) as strategy:
        yield strategy


def here():
    return dv.get_replica_context()


def total():
    return float(here().all_reduce("sum", np.ones(100))[0])


def replica_threads():
    return [t for t in threading.enumerate() if t.name.startswith("dvkernels-replica")]


def eventually(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def fail():
    raise ValueError("no")


def use_and_drop():
    strategy = dv.MirroredStrategy(DEVICES)
    with strategy.scope():
        variable = dv.Variable(np.zeros(1000), aggregation="sum")
    strategy.run(lambda: variable.assign_add(np.ones(1000)))
    with pytest.raises(ValueError, match="no"):
        strategy.run(fail)


@pytest.mark.wide
def test_a_thousand_strategies_leave_no_thread_and_no_memory():
    process = psutil.Process()
    for _ in range(200):
        use_and_drop()
    gc.collect()
    before = process.memory_info().rss
    for _ in range(1000):
        use_and_drop()
    gc.collect()
    assert eventually(lambda: not replica_threads())
    assert process.memory_info().rss - before < 4 * MIB


def test_a_dropped_strategy_ends_its_threads_even_after_an_error():
    strategy = dv.MirroredStrategy(DEVICES)
    with pytest.raises(ValueError, match="no"):
        strategy.run(fail)
    gone = weakref.ref(strategy)
    del strategy
    gc.collect()
    assert gone() is None


def test_close(strategy):
    with strategy.scope():
        variable = dv.Variable(1.0)
    strategy.run(total)
    strategy.close()
    strategy.close()
    assert not replica_threads()
    assert float(variable) == 1.0
    with pytest.raises(ContextError, match="closed"):
        strategy.run(total)


def test_replicas_run_in_parallel_on_their_own_threads(strategy):
    meeting = threading.Barrier(2)

    def meet():
        meeting.wait(10)
        return threading.get_ident()

    first, second = strategy.run(meet), strategy.run(meet)
    assert first.values == second.values
    assert first.on(0) == threading.get_ident() != first.on(1)


def test_one_step_at_a_time_from_several_threads(strategy):
    results, inside = [], []

    def step():
        inside.append(1)
        here().barrier()
        assert len(inside) == 2
        here().barrier()
        inside.pop()
        return total()

    def caller():
        results.extend(strategy.run(step).on(0) for _ in range(50))

    threads = [threading.Thread(target=caller) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [2.0] * 200


def test_a_replica_that_never_arrives_is_named(strategy, monkeypatch):
    monkeypatch.setenv("DVKERNELS_TIMEOUT_SECONDS", "0.1")

    has_given_up = threading.Event()

    def late():
        if here().replica_id_in_sync_group == 1:
            assert has_given_up.wait(60)
        try:
            here().barrier()
        finally:
            has_given_up.set()

    with pytest.raises(CollectiveTimeoutError, match=r"replicas \[1\].*test_lifetime.py"):
        strategy.run(late)
    monkeypatch.setenv("DVKERNELS_TIMEOUT_SECONDS", "soon")
    with pytest.raises(ValueError, match="DVKERNELS_TIMEOUT_SECONDS"):
        strategy.run(total)
    monkeypatch.delenv("DVKERNELS_TIMEOUT_SECONDS")
    assert strategy.run(total).values == (2.0, 2.0)


def run_alone(program):
    """Run a program in a separate process, so that signals and forks do not reach pytest."""
    prelude = (
        "import os, random, signal, time\nimport numpy as np\nimport dvkernels as dv\n"
        "from dvkernels.errors import ContextError\n"
        "strategy = dv.MirroredStrategy(['cpu:0', 'cpu:1'])\nhere = dv.get_replica_context\n"
        "def rank(): return here().replica_id_in_sync_group\n"
        "def total(): return float(here().all_reduce('sum', np.ones(100))[0])\n"
    )
    return fork_server.run(prelude + program, timeout=60)


@needs_posix
def test_a_forked_child_runs_steps_of_its_own():
    done = run_alone("""
assert strategy.run(total).values == (2.0, 2.0)
child = os.fork()
if child == 0:
    os._exit(0 if strategy.run(total).values == (2.0, 2.0) else 1)
assert os.waitpid(child, 0)[1] == 0
assert strategy.run(total).values == (2.0, 2.0)
""")
    assert done.returncode == 0, done.stderr


@needs_posix
def test_a_fork_inside_a_step_has_no_other_replicas():
    done = run_alone("""
def step():
    if rank() == 0:
        return 0
    child = os.fork()
    if child == 0:
        try:
            here().barrier()
        except ContextError:
            os._exit(0)
        os._exit(1)
    return os.waitpid(child, 0)[1]
assert strategy.run(step).values == (0, 0)
""")
    assert done.returncode == 0, done.stderr


@needs_posix
def test_an_interrupt_ends_collectives_and_waits_for_user_code():
    done = run_alone("""
def step():
    if rank() == 1:
        time.sleep(1)
    here().barrier()
strategy.run(total)
signal.signal(signal.SIGALRM, signal.default_int_handler)
signal.setitimer(signal.ITIMER_REAL, 0.2)
began = time.monotonic()
try:
    strategy.run(step)
    raise SystemExit("not interrupted")
except KeyboardInterrupt:
    assert 0.9 < time.monotonic() - began < 20, time.monotonic() - began
assert strategy.run(total).values == (2.0, 2.0)
""")
    assert done.returncode == 0, done.stderr


@needs_posix
def test_interrupts_at_any_moment_leave_all_copies_written_or_none():
    done = run_alone("""
with strategy.scope():
    variable = dv.Variable(np.zeros(1 << 18, np.float32), aggregation='sum')
ones = np.ones(1 << 18, np.float32)
def step():
    variable.assign_add(ones)
strategy.run(step)
signal.signal(signal.SIGALRM, signal.default_int_handler)
random.seed(1)
for _ in range(150):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 4e-3))
        while True:
            strategy.run(step)
    except KeyboardInterrupt:
        pass
    first, second = variable.values
    assert first[0] % 2 == 0
    assert (first == first[0]).all() and (second == first[0]).all()
print('done')
""")
    assert done.stdout == "done\n", done.stderr


@needs_posix
def test_the_signal_module_is_left_alone(strategy):
    before = signal.getsignal(signal.SIGINT)
    strategy.run(total)
    assert signal.getsignal(signal.SIGINT) is before


# -- stress --------------------------------------------------------------------------------------


@pytest.mark.wide
def test_a_thousand_failing_steps_leave_no_thread_and_no_memory(strategy):
    def fail_sometimes(k):
        if here().replica_id_in_sync_group == k % 2:
            raise ValueError("no", bytearray(100_000))
        here().barrier()

    def fail_often(count):
        for k in range(count):
            with pytest.raises(ValueError, match="no"):
                strategy.run(fail_sometimes, (k,))
        gc.collect()

    process = psutil.Process()
    fail_often(200)
    before = process.memory_info().rss
    fail_often(1000)
    assert eventually(lambda: len(replica_threads()) <= 1)
    assert process.memory_info().rss - before < 4 * MIB
    assert strategy.run(total).values == (2.0, 2.0)


def kept_error():
    with dv.MirroredStrategy(DEVICES) as strategy:
        try:
            strategy.run(fail)
        except ValueError as error:
            return error, weakref.ref(strategy)


def test_a_stored_error_keeps_no_thread_of_a_closed_strategy():
    error, _ = kept_error()
    kept_alive = not eventually(lambda: not replica_threads(), 2)
    error.with_traceback(None)
    assert not kept_alive


def test_an_error_without_its_traceback_keeps_nothing():
    error, gone = kept_error()
    error.with_traceback(None)
    gc.collect()
    assert gone() is None
    assert error.args == ("no",)


def test_closing_during_a_step_ends_the_threads_after_it(strategy):
    is_inside = threading.Event()
    is_closed = threading.Event()

    def step():
        is_inside.set()
        is_closed.wait(10)
        return total()

    results = []
    caller = threading.Thread(target=lambda: results.append(strategy.run(step).values))
    caller.start()
    assert is_inside.wait(10)
    strategy.close()
    is_closed.set()
    caller.join(10)
    assert results == [(2.0, 2.0)]
    with pytest.raises(ContextError, match="closed"):
        strategy.run(total)
    assert eventually(lambda: not replica_threads(), 2)


def test_a_long_merge_call_is_no_timeout(strategy, monkeypatch):
    monkeypatch.setenv("DVKERNELS_TIMEOUT_SECONDS", "0.1")

    def wait(_):
        time.sleep(0.5)
        return 7

    assert strategy.run(lambda: here().merge_call(wait)).values == (7, 7)


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_a_replica_that_arrives_after_the_deadline_is_refused(absent, monkeypatch):
    monkeypatch.setenv("DVKERNELS_TIMEOUT_SECONDS", "0.2")
    ended = {}
    have_given_up = threading.Semaphore(0)

    def step():
        rank = here().replica_id_in_sync_group
        if rank == absent:
            assert all(have_given_up.acquire(timeout=60) for _ in range(2))
        began = time.monotonic()
        try:
            here().all_reduce("sum", 1.0)
        finally:
            ended[rank] = time.monotonic() - began
            have_given_up.release()

    with dv.MirroredStrategy(["cpu:0", "cpu:1", "cpu:2"]) as strategy:
        with pytest.raises(CollectiveTimeoutError, match=rf"replicas \[{absent}\]"):
            strategy.run(step)
        assert max(ended.values()) < 30
        assert strategy.run(total).values == (3.0, 3.0, 3.0)


@pytest.mark.parametrize("seconds", ["", "0", "-1", "nan", "inf", "x"])
@pytest.mark.parametrize("devices", [DEVICES[:1], DEVICES])
def test_an_invalid_timeout_is_refused(devices, seconds, monkeypatch):
    monkeypatch.setenv("DVKERNELS_TIMEOUT_SECONDS", seconds)
    with (
        dv.MirroredStrategy(devices) as strategy,
        pytest.raises(ValueError, match="DVKERNELS_TIMEOUT_SECONDS must be a positive number"),
    ):
        strategy.run(here)


# Raises KeyboardInterrupt only inside the library, where a test can demand something of it.
STORM = """
import faulthandler, gc, pathlib, sys, threading
faulthandler.dump_traceback_later(20, exit=True)
strategy = dv.MirroredStrategy([f'cpu:{k}' for k in range(SIZE)])
package = str(pathlib.Path(dv.__file__).parent)
struck = 0
def strike(signum, frame):
    global struck
    while frame is not None:
        if frame.f_code.co_filename.startswith(package):
            struck += 1
            raise KeyboardInterrupt
        frame = frame.f_back
    if armed:  # the interrupt came too late: try again
        signal.setitimer(signal.ITIMER_REAL, 1e-4, INTERVAL)
signal.signal(signal.SIGALRM, strike)
random.seed(2)
with strategy.scope():
    variable = dv.Variable(np.zeros(125_000), aggregation='sum')
ones = np.ones(125_000)
def step():
    variable.assign_add(ones)
strategy.run(step)
completed, swallowed, slowest, others = 1, 0, 0.0, []
for k in range(200):
    seen, armed = struck, True
    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 3e-3), INTERVAL)
    try:
        while struck == seen:
            began = time.monotonic()
            strategy.run(step)
            completed += 1
        swallowed += 1  # run returned in spite of the interrupt
    except KeyboardInterrupt:
        pass
    except Exception as error:
        others.append(repr(error))
    armed = False
    signal.setitimer(signal.ITIMER_REAL, 0)
    slowest = max(slowest, time.monotonic() - began)
    copies = [value.copy() for value in variable.values]
    time.sleep(0.002)
    assert (variable.values[0] == copies[0]).all(), 'written after run had raised'
    assert all((value == copies[0][0]).all() for value in copies), 'copies differ'
    assert copies[0][0] in (SIZE * completed, SIZE * (completed + 1)), (copies, completed)
    completed = int(copies[0][0]) // SIZE
    if k % 25 == 24:
        result = []
        other = threading.Thread(
            target=lambda: result.append(strategy.run(total).on(0)), daemon=True
        )
        other.start()
        other.join(5)
        assert result == [SIZE], 'the turn was never given back'
strategy.close()
gc.collect()
end = time.monotonic() + 5
def left():  # an interrupted Thread.start() may leave an entry without a thread
    return [
        t.name for t in threading.enumerate()
        if t.name.startswith('dvkernels-replica') and t.ident in sys._current_frames()
    ]
while left() and time.monotonic() < end:
    time.sleep(0.01)
print([slowest < 3, swallowed, others, left()])
"""

storms = pytest.mark.parametrize(
    ("num_replicas", "interval"), [(2, 0), (3, 0), (2, 3e-4), (3, 3e-4)]
)


@functools.cache
def storm(num_replicas, interval):
    """Interrupt 200 runs, each once or every few hundred microseconds until it ends."""
    return run_alone(f"SIZE, INTERVAL = {num_replicas}, {interval}\n{STORM}")


def outcome_of_storm(num_replicas, interval):
    done = storm(num_replicas, interval)
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout)


@needs_posix
@storms
def test_a_storm_of_interrupts_ends_every_run_with_all_copies_written_or_none(
    num_replicas, interval
):
    is_prompt, swallowed, others, _ = outcome_of_storm(num_replicas, interval)
    assert is_prompt
    assert swallowed == 0
    assert others == []  # run raised KeyboardInterrupt only


@needs_posix
@storms
def test_a_storm_of_interrupts_leaves_no_thread(num_replicas, interval):
    assert outcome_of_storm(num_replicas, interval)[-1] == []


@needs_posix
@pytest.mark.parametrize("sleeper", [0, 1, 2])
def test_an_interrupt_ends_the_barriers_at_once(sleeper):
    done = run_alone(f"""
import threading
strategy = dv.MirroredStrategy(['cpu:0', 'cpu:1', 'cpu:2'])
ended = []
def step():
    # One computes until the barriers of the others have ended; replica 0 until it is interrupted.
    try:
        while rank() == {sleeper} and len(ended) < 2:
            time.sleep(0.01)
        here().barrier()
    finally:
        ended.append(rank())
strategy.run(total)
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    strategy.run(step)
    raise SystemExit('not interrupted')
except KeyboardInterrupt:
    pass
assert sorted(ended) == [0, 1, 2]
assert ended[0 if {sleeper} == 0 else -1] == {sleeper}, ended
assert strategy.run(total).values == (3.0, 3.0, 3.0)
""")
    assert done.returncode == 0, done.stderr


@needs_posix
def test_an_interrupt_while_another_thread_holds_the_step_lock():
    done = run_alone("""
import threading
def slow():
    assert is_interrupted.wait(20)
    return total()
is_interrupted = threading.Event()
results = []
other = threading.Thread(target=lambda: results.append(strategy.run(slow).values))
other.start()
while not strategy._placement.step_lock.is_elsewhere():
    time.sleep(0.001)
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    strategy.run(total)
    raise SystemExit('not interrupted')
except KeyboardInterrupt:
    assert not results  # it did not wait for the other
is_interrupted.set()
assert strategy.run(total).values == (2.0, 2.0)
other.join(10)
assert results == [(2.0, 2.0)]
""")
    assert done.returncode == 0, done.stderr


FORKED = """
from dvkernels import kernels
def ended_well(child, seconds=5):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False
"""


@needs_posix
def test_a_forked_child_has_kernels_and_variables_of_its_own():
    done = run_alone(f"""{FORKED}
with strategy.scope():
    variable = dv.Variable(0.0, aggregation='sum')
def work():
    buffers = [np.ones(1 << 20, np.float32) for _ in range(2)]
    for algorithm in ('direct', 'ring'):
        kernels.all_reduce(buffers, algorithm=algorithm)
    assert (buffers[0] == 4).all() and (buffers[1] == 4).all()
    strategy.run(lambda: variable.assign_add(1.0))
work()
child = os.fork()
if child == 0:
    code = 1
    try:
        work()
        strategy.close()
        code = 0 if float(variable) == 4.0 else 2
    finally:
        os._exit(code)
assert ended_well(child)
work()
assert float(variable) == 4.0
""")
    assert done.returncode == 0, done.stderr


@needs_posix
@pytest.mark.parametrize("forker", [0, 1])
def test_no_collective_hangs_in_a_process_forked_inside_a_step(forker):
    done = run_alone(f"""{FORKED}
with strategy.scope():
    variable = dv.Variable(0.0, aggregation='sum')
one = np.ones(2)
calls = [
    lambda: here().all_reduce('sum', one), lambda: here().all_gather(one),
    lambda: here().reduce_scatter('sum', one), lambda: here().broadcast(one),
    lambda: here().barrier(), lambda: here().merge_call(lambda _: 0),
    lambda: variable.assign_add(1.0),
]
def step():
    well = True
    if rank() == {forker}:
        child = os.fork()
        if child == 0:
            refused = 0
            try:
                for call in calls:
                    try:
                        call()
                    except ContextError:
                        refused += 1
            finally:
                os._exit(0 if refused == len(calls) else 1)
        well = ended_well(child)
    total()
    return well
assert strategy.run(step).values == (True, True)
""")
    assert done.returncode == 0, done.stderr


@needs_posix
def test_an_error_in_a_process_forked_inside_a_step_ends_that_process():
    done = run_alone(f"""{FORKED}
forked = None
def step():
    global forked
    if rank() == 0:
        forked = os.fork()
        if forked:
            assert ended_well(forked)
    return total()
try:
    result = strategy.run(step).values
except ContextError:
    os._exit(0 if forked == 0 else 1)
assert result == (2.0, 2.0)
""")
    assert done.returncode == 0, done.stderr


WHERE = {
    "replica 0": "run(lambda: rank() == 0 and fork())",
    "replica 1": "run(lambda: rank() == 1 and fork())",
    "merge_call": "run(lambda: here().merge_call(lambda _: fork()))",
    "write": "run(lambda: variable.assign_add(Forking()) if rank() else variable.assign_add(1.0))",
    "background": "run(lambda: here().all_reduce_async(op, np.ones(3)).wait())",
    "nested": "run(lambda: here().merge_call(lambda s: s.run(lambda: rank() == 1 and fork())))",
}


@needs_posix
@pytest.mark.parametrize("where", WHERE)
def test_a_child_forked_in_a_step_that_goes_on_ends(where):
    """The child returns from the function: in no thread does it wait for the other replicas."""
    done = run_alone(f"""{FORKED}
import sys, threading
from dvkernels.communicators.local import Local
with strategy.scope():
    variable = dv.Variable(0.0, aggregation='sum')
children = []
def fork():
    children.append(os.fork())
class Forking:
    def __array__(self, *args, **kwargs):
        fork()
        return np.array(1.0)
if {where!r} == 'background':
    reduce = Local.all_reduce
    def all_reduce(self, *args, **kwargs):
        if threading.current_thread().name == 'dvkernels-replica-progress':
            fork()
        return reduce(self, *args, **kwargs)
    Local.all_reduce = all_reduce
op, run = 'sum', strategy.run
strategy.run(total)
try:
    {WHERE[where]}
except dv.errors.DvKernelsError:
    assert 0 in children  # the child has no other replicas
if 0 in children:
    sys.exit()
assert children, 'nothing was forked'
for child in children:
    began = time.monotonic()
    ended_well(child, 30)  # its exit status does not matter
    assert time.monotonic() - began < 29
assert strategy.run(total).values == (2.0, 2.0)
print('done')
""")
    assert done.stdout.endswith("done\n"), done.stderr


ENDING = """
import dvkernels as dv, numpy as np
strategy = dv.MirroredStrategy([f"cpu:{k}" for k in range(SIZE)])
here = dv.get_replica_context
with strategy.scope():
    variable = dv.Variable(np.zeros(3), aggregation="sum")
for _ in range(2):
    strategy.run(lambda: here().all_reduce_async("sum", np.ones(3)).wait())
class Last:
    def __del__(self):
        ACT
last = Last()
"""
LAST = [
    "strategy.run(lambda: 2)",
    "strategy.run(lambda: variable.assign_add(np.ones(3)))",
    "strategy.run(lambda: here().all_reduce_async('sum', np.ones(3)).wait())",
    "strategy.close()",
    "dv.MirroredStrategy(['cpu:0', 'cpu:1']).run(lambda: here().barrier())",
]


@pytest.mark.parametrize("act", LAST)
@pytest.mark.parametrize("size", [1, 2])
def test_calls_during_interpreter_shutdown_end(act, size):
    """At shutdown daemon threads have stopped, and no call waits for them."""
    program = ENDING.replace("ACT", act).replace("SIZE", str(size))
    began = time.monotonic()
    done = fork_server.run(program, timeout=60)
    assert done.returncode == 0
    assert time.monotonic() - began < 20
    if size == 2 and act.startswith("strategy.run"):
        assert "ContextError: run of MirroredStrategy(cpu:0, cpu:1)" in done.stderr
