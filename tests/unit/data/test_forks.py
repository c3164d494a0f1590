"""A forked process continues with an iterator, as its parent does."""

from __future__ import annotations

import math
import os
import time
import traceback

import pytest

from dvkernels.data.dataset import Dataset
from dvkernels.data.distributed.dataset import DistributedDataset

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


def forked(act):
    """Return the exit status of a forked process that calls ``act``."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    end = time.monotonic() + 30
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            return "hangs"
        time.sleep(0.005)


@pytest.mark.parametrize("is_distributed", [False, True])
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize(
    ("workers", "depth"), [(None, 2), ("threads", 0), ("threads", 2), ("processes", 0)]
)
def test_child_and_parent_both_continue_after_a_fork(workers, depth, sequential, is_distributed):
    squares = [float(k * k) for k in range(24)]
    source = Dataset.from_sequence(squares)
    if sequential:
        source = Dataset.from_iterable(lambda: iter(squares))
    options = {} if workers is None else {"num_workers": 2, "workers": workers}
    data = source.map(math.sqrt, **options).batch(4).prefetch(depth)
    iterator = iter(DistributedDataset(data, 1) if is_distributed else data)

    def numbers(batches):
        return [x for b in batches for x in (b.values[0] if is_distributed else b).tolist()]

    def go_on():
        assert numbers(iterator) == [*range(4, 24)]

    assert numbers([next(iterator)]) == [*range(4)]
    assert forked(go_on) == 0
    go_on()
    iterator.close()
