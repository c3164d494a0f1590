"""Workers as threads of one process on simulated hosts, with in-process messages for MPI."""

from __future__ import annotations

import collections
import threading
import time

import numpy as np
from threads_as_workers import segments_of

from dvkernels.communicators.workers.mpi.collectives import MpiCollectives
from dvkernels.communicators.workers.mpi.point_to_point import all_complete
from dvkernels.communicators.workers.shm.staging import (
    NUM_RESULTS,
    PIECE_NBYTES,
    LocalStaging,
    SharedStaging,
)
from dvkernels.schedules.cost_model import Routing


def transports_between_hosts(hosts, algorithm, timeout_seconds=20.0):
    """Return a transport for each worker over in-process messages; ``hosts`` numbers the hosts."""
    stagings = {}
    for host, size in collections.Counter(hosts).items():
        alone = [LocalStaging()]
        shared = segments_of(size, NUM_RESULTS // 2, PIECE_NBYTES) if size > 1 else []
        stagings[host] = iter([SharedStaging(segment, 0, False) for segment in shared] or alone)
    mail = Mail()
    return [
        MailTransport(
            MailPointToPoint(mail, rank, len(hosts)),
            next(stagings[host]),
            hosts,
            algorithm,
            timeout_seconds,
        )
        for rank, host in enumerate(hosts)
    ]


class Mail:
    """Posted sends and receives by sender, receiver and tag, in their order.

    Nothing is buffered: a message is delivered when both sides are posted, directly into the
    receiver's memory. Code that relies on more than MPI guarantees hangs, or loses data.
    """

    def __init__(self):
        self._mutex = threading.Lock()
        self._sent = collections.defaultdict(collections.deque)
        self._wanted = collections.defaultdict(collections.deque)

    def post(self, key, array, is_sent):
        request = Letter(array)
        with self._mutex:
            (self._sent if is_sent else self._wanted)[key].append(request)
            while self._sent[key] and self._wanted[key]:
                sent, fingerprint = self._sent[key].popleft(), self._wanted[key].popleft()
                fingerprint.array.view(np.uint8)[...] = sent.array.view(np.uint8)
                sent.is_done = fingerprint.is_done = True
        return request


class Letter:
    """Request of a posted send or receive."""

    def __init__(self, array):
        self.array, self.is_done = array, False

    def Test(self):
        return self.is_done


class MailPointToPoint:
    """A worker's ``PointToPoint`` by mail."""

    def __init__(self, mail, rank, size):
        self._mail, self.rank, self.size = mail, rank, size

    def send(self, array, to, tag):
        return self._mail.post((self.rank, to, tag), array, True)

    def receive(self, array, source, tag):
        return self._mail.post((source, self.rank, tag), array, False)

    def all_gather(self, own, gathered):
        return MailGather(self, own, gathered)

    def progress(self):
        pass


class MailGather:
    """Repeatable all-gather by mail."""

    def __init__(self, p2p, own, gathered):
        self._p2p, self._own, self._held = p2p, own, gathered

    def Start(self):
        rank = self._p2p.rank
        self._held[rank] = self._own
        others = [other for other in range(self._p2p.size) if other != rank]
        self._letters = all_complete(
            [
                *(self._p2p.receive(self._held[other], other, 0) for other in others),
                *(self._p2p.send(self._own, other, 0) for other in others),
            ]
        )

    def Test(self):
        return self._letters()


class MailTransport:
    """Transport over ``MpiCollectives``, without control rounds: its workers always agree."""

    takes_columns = False
    symmetric_memory = None
    has_ended = False

    def __init__(self, p2p, staging, hosts, algorithm, timeout_seconds):
        self.rank, self.size, self.timeout_seconds = p2p.rank, p2p.size, timeout_seconds
        self._p2p = p2p
        self.exchange = MpiCollectives(p2p, staging, hosts, Routing(algorithm))

    def all_reduce_into(self, columns, num_sources, op, fingerprint, divisor=1):
        ((source, target),) = columns
        self.exchange.all_reduce(target, source, op, self.finish)

    def all_reduce_short(self, *_):
        return False

    def all_gather_bytes(self, source, fingerprint):
        counts = np.zeros((self.size, 8), np.uint8)
        gather = self._p2p.all_gather(np.array([source.nbytes]).view(np.uint8), counts)
        gather.Start()
        self.finish(gather.Test)
        targets = [np.empty(int(count), np.uint8) for (count,) in counts.view(np.int64)]
        targets[self.rank][...] = source
        self.exchange.all_gather(targets, self.finish)
        return targets

    def broadcast_into(self, target, root, fingerprint):
        self.exchange.broadcast(target, root, self.finish)

    def finish(self, is_done):
        deadline = time.monotonic() + self.timeout_seconds
        while not is_done():
            assert time.monotonic() < deadline, "a request is never done"
            time.sleep(0)
