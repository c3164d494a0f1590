"""Collectives between hosts: every algorithm, over threads, without MPI."""

from __future__ import annotations

import itertools

import ml_dtypes
import numba
import numpy as np
import pytest
from mail_between_workers import Mail, MailPointToPoint, MailTransport, transports_between_hosts
from threads_as_workers import Together, results

from dvkernels import reduce_op
from dvkernels.communicators import accumulation
from dvkernels.communicators.workers.group import WorkerGroup
from dvkernels.communicators.workers.mpi import collectives
from dvkernels.communicators.workers.mpi.ring import HostRing
from dvkernels.communicators.workers.shm.staging import LocalStaging
from dvkernels.custom_reduction import CustomReduction
from dvkernels.reduce_op import ReduceOp
from dvkernels.testing import check_communicator

ALGORITHMS = pytest.mark.parametrize("algorithm", ["gather", "exchange", "ring"])
SOME_HOSTS = [  # the host of each worker
    [0, 1], [0, 1, 2], [0, 0, 1], [0, 0, 1, 2], [0, 0, 0, 1], [0, 1, 0, 1], [0, 1, 2, 2, 1, 3],
]  # fmt: skip
HOSTS = pytest.mark.parametrize("hosts", SOME_HOSTS, ids=str)
PIECE_NBYTES = 1 << 12
LARGER = CustomReduction(numba.njit(lambda a, b: a if abs(a) > abs(b) else b), 0, "larger")


@pytest.fixture(autouse=True)
def _short_pieces(monkeypatch):
    monkeypatch.setattr(collectives, "PIECE_NBYTES", PIECE_NBYTES)


def groups(hosts, algorithm):
    return [WorkerGroup(transport) for transport in transports_between_hosts(hosts, algorithm)]


def reduced(workers, values, op, outs=None):
    """Return each worker's result."""
    outs = outs or [np.empty_like(value) for value in values]
    triples = zip(workers, values, outs, strict=True)
    return [
        found
        for (found,) in results(
            *(lambda w=w, v=v, o=o: w.all_reduce([v], op, [o]) for w, v, o in triples)
        )
    ]


def bits(arrays):
    return {array.tobytes() for array in arrays}


# Daily each algorithm, and one and several workers a host.
DAILY = [("gather", [0, 1, 2]), ("exchange", [0, 1, 0, 1]), ("ring", [0, 1, 0, 1])]


@pytest.mark.parametrize(
    ("algorithm", "hosts"),
    [
        pytest.param(*case, marks=[] if case in DAILY else pytest.mark.wide)
        for case in itertools.product(["gather", "exchange", "ring"], SOME_HOSTS)
    ],
    ids=str,
)
def test_the_laws_of_communicators(hosts, algorithm):
    check_communicator(
        lambda size: Together(size, carried=transports_between_hosts(hosts, algorithm)),
        sizes=[len(hosts)],
        dtypes=["float32", "bfloat16", "uint8", "bool"],
    )


@ALGORITHMS
@HOSTS
def test_sizes_around_pieces_and_parts(hosts, algorithm):
    workers = groups(hosts, algorithm)
    count, step = len(hosts), PIECE_NBYTES // 4
    for size in [0, 1, count - 1, count, count + 1, step - 1, step, step + 1, 9 * step + 1]:
        values = [
            np.random.default_rng([size, k]).standard_normal(size).astype(np.float32)
            for k in range(count)
        ]
        apart = reduced(workers, values, ReduceOp.SUM)
        assert len(bits(apart)) == 1, size
        np.testing.assert_allclose(apart[0], sum(values), 1e-4, 1e-5)
        in_place = [value.copy() for value in values]
        reduced(workers, in_place, ReduceOp.SUM, in_place)
        assert bits(in_place) == bits(apart), size


@pytest.mark.parametrize("algorithm", ["exchange", "ring"])
def test_no_message_is_longer_than_a_piece(algorithm, monkeypatch):
    """So MPI counts its bytes with 32 bits, however long the array is."""
    sent = []
    post = Mail.post

    def measured(mail, key, array, is_sent):
        if is_sent:
            sent.append(array.nbytes)
        return post(mail, key, array, is_sent)

    monkeypatch.setattr(Mail, "post", measured)
    workers = groups([0, 1, 0, 1], algorithm)
    values = [np.full(10 * PIECE_NBYTES, 1.0 + k) for k in range(4)]
    for found in reduced(workers, values, ReduceOp.SUM):
        assert (found == 10).all()
    root = [np.arange(10.0 * PIECE_NBYTES) * (k == 1) for k in range(4)]
    results(*(lambda w=w, v=v: w.broadcast([v], 1) for w, v in zip(workers, root, strict=True)))
    assert max(sent) <= PIECE_NBYTES
    assert sum(sent) > 2 * values[0].nbytes


@ALGORITHMS
@HOSTS
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("op", [ReduceOp.SUM, ReduceOp.MEAN])
def test_halves_are_rounded_once(hosts, algorithm, dtype, op):
    """1 + many halves of its last bit: rounded at each step, they would all be lost."""
    dtype, size = np.dtype(dtype), 3 * PIECE_NBYTES // 4 + 5
    last_bit = float(ml_dtypes.finfo(dtype).eps)
    values = [np.full(size, 1.0 if k == 0 else last_bit / 2, dtype) for k in range(len(hosts))]
    wide = reduce_op.working_dtype(dtype)
    total = sum(value.astype(wide) for value in values)
    right = (total / wide.type(len(hosts)) if op is ReduceOp.MEAN else total).astype(dtype)
    for found in reduced(groups(hosts, algorithm), values, op):
        assert (found == right).all()


@ALGORITHMS
@HOSTS
def test_halves_overflow_to_infinity_without_a_warning(hosts, algorithm):
    values = [np.full(1000, 60_000.0, np.float16) for _ in hosts]
    for found in reduced(groups(hosts, algorithm), values, ReduceOp.SUM):
        assert np.isinf(found).all()


@ALGORITHMS
@HOSTS
def test_a_custom_reduction(hosts, algorithm):
    rng = np.random.default_rng(1)
    values = [rng.standard_normal(2 * PIECE_NBYTES + 3) for _ in hosts]
    stacked = np.stack(values)
    right = stacked[np.abs(stacked).argmax(0), np.arange(stacked.shape[1])]
    for found in reduced(groups(hosts, algorithm), values, LARGER):
        np.testing.assert_array_equal(found, right)


@HOSTS
def test_a_ring_adds_in_the_order_of_its_hosts(hosts):
    """Within a host in rank order, then the hosts from the one after the part's worker on."""
    count, num_hosts, length = len(hosts), max(hosts) + 1, 80  # one piece
    values = [np.random.default_rng(k).standard_normal(length * count) for k in range(count)]
    of_hosts = [
        sum(value for value, host in zip(values, hosts, strict=True) if host == one)
        for one in range(num_hosts)
    ]
    right = np.empty(length * count)
    for part, owner in enumerate(hosts):
        own = slice(length * part, length * (part + 1))
        right[own] = sum(of_hosts[(owner + 1 + k) % num_hosts][own] for k in range(num_hosts))
    (found,) = bits(reduced(groups(hosts, "ring"), values, ReduceOp.SUM))
    assert found == right.tobytes()


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_the_cost_model_gets_the_bytes_of_the_messages(dtype):
    """Partial sums of halves are twice as wide; two workers per host, two hosts."""
    asked = []

    class Asked:
        def algorithm_for(self, *given):
            asked.append(given)
            return "gather"

    transports = transports_between_hosts([0, 0, 1, 1], "auto")
    for transport in transports:
        transport.exchange._routing = Asked()
    values = [np.ones(100, dtype)] * 4
    reduced([WorkerGroup(transport) for transport in transports], values, ReduceOp.SUM)
    nbytes = 100 * np.dtype(dtype).itemsize
    assert asked == [(4, 2, nbytes, max(nbytes, 400))] * 4


def test_parts_of_a_later_piece_progress_while_one_waits():
    """The second piece completes while the first one waits for a worker."""
    mail = Mail()
    rings = [HostRing(MailPointToPoint(mail, rank, 2), [0, 1]) for rank in range(2)]
    how = accumulation.of(ReduceOp.SUM, np.dtype(np.float32), 2)

    def start(rank, number):
        own = {part: np.full(3, rank + 1.0, np.float32) for part in range(2)}
        return rings[rank].start(number, own, list(own.values()), how, np.empty)

    first, second, other = start(0, 0), start(0, 1), start(1, 1)
    assert not any([second.Test(), other.Test(), first.Test()])
    assert [second.Test(), other.Test(), first.Test()] == [True, True, False]
    late = start(1, 0)
    assert not all([late.Test(), first.Test()])
    assert all([late.Test(), first.Test()])


def test_parts_progress_during_a_host_barrier():
    """A worker sends its parts between two host barriers, although nothing tests the ring."""
    mail, posted = Mail(), []

    class Late(LocalStaging):
        meetings = 0

        def come(self):
            self.meetings += 1

        def is_met(self):
            return self.meetings < 2 or bool(posted)

    class Seen(MailPointToPoint):
        def send(self, array, to, tag):
            posted.append(tag)
            return super().send(array, to, tag)

    def all_reduce(traffic, host):
        transport = MailTransport(traffic, host, [0, 1], "ring", 5.0)
        return WorkerGroup(transport).all_reduce([np.ones(10)], ReduceOp.SUM)[0]

    for found in results(
        lambda: all_reduce(Seen(mail, 0, 2), Late()),
        lambda: all_reduce(MailPointToPoint(mail, 1, 2), LocalStaging()),
    ):
        np.testing.assert_array_equal(found, np.full(10, 2.0))


def test_a_failure_half_way_keeps_the_pending_memory():
    """No worker frees memory that others may still write to."""

    class Late(Exception):
        pass

    hosts, size = [0, 1, 2], 10 * PIECE_NBYTES
    carried = transports_between_hosts(hosts, "ring")
    values = [np.full(size, float(k)) for k in range(3)]

    def fails(transport=carried[0]):
        finish, left = transport.finish, iter(range(3))

        def fails_soon(request):
            if next(left, None) is None:
                raise Late
            finish(request)

        transport.finish = fails_soon
        with pytest.raises(Late):
            transport.all_reduce_into([[values[0], np.empty(size)]], 1, ReduceOp.SUM, None)

    def waits(transport):
        transport.timeout_seconds = 0.5
        column = [values[transport.rank], np.empty(size)]
        with pytest.raises(AssertionError, match="never done"):
            transport.all_reduce_into([column], 1, ReduceOp.SUM, None)

    results(fails, *(lambda t=t: waits(t) for t in carried[1:]))
    assert all(transport.exchange._pipeline._ring._pieces for transport in carried)
