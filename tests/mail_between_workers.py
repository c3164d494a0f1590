"""Test double of MPI: workers are threads of one process, on simulated hosts."""

from __future__ import annotations

import collections
import threading
import time

import numpy as np
from threads_as_workers import rooms

from dvkernels.communicators.workers.mpi.collectives import MpiCollectives
from dvkernels.communicators.workers.shm.staging import (
    NUM_RESULTS,
    PIECE_NBYTES,
    LocalStaging,
    SharedStaging,
)
from dvkernels.communicators.workers.wait import AllRequests
from dvkernels.schedules.cost_model import Routing


def transports_between_hosts(placed, routing, timeout_seconds=20.0):
    """Return a transport for each worker, over messages within this process.

    ``placed`` holds the number of each worker's host.
    """
    hosts = {}
    for host, size in collections.Counter(placed).items():
        alone = [LocalStaging()]
        shared = rooms(size, NUM_RESULTS // 2, PIECE_NBYTES) if size > 1 else []
        hosts[host] = iter([SharedStaging(room, 0, False) for room in shared] or alone)
    mail = Mail()
    return [
        ByMail(
            MailTraffic(mail, rank, len(placed)),
            next(hosts[host]),
            placed,
            routing,
            timeout_seconds,
        )
        for rank, host in enumerate(placed)
    ]


class Mail:
    """Queues of sends and of receives, by sender, receiver and tag.

    Nothing is kept in between: a message is there when both sides are, and goes straight into the
    receiver's memory. So who counts on more than MPI promises hangs, or loses data.
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
                sent, wanted = self._sent[key].popleft(), self._wanted[key].popleft()
                wanted.array.view(np.uint8)[...] = sent.array.view(np.uint8)
                sent.is_done = wanted.is_done = True
        return request


class Letter:
    """Request of a send or of a receive."""

    def __init__(self, array):
        self.array, self.is_done = array, False

    def Test(self):
        return self.is_done


class MailTraffic:
    """Point-to-point messages of one worker."""

    def __init__(self, mail, rank, size):
        self._mail, self.rank, self.size = mail, rank, size

    def send(self, array, to, tag):
        return self._mail.post((self.rank, to, tag), array, True)

    def receive(self, array, source, tag):
        return self._mail.post((source, self.rank, tag), array, False)

    def gather(self, own, held):
        return MailGather(self, own, held)

    def move(self):
        pass


class MailGather:
    """Persistent gather: it can be started again."""

    def __init__(self, traffic, own, held):
        self._traffic, self._own, self._held = traffic, own, held

    def Start(self):
        rank = self._traffic.rank
        self._held[rank] = self._own
        others = [other for other in range(self._traffic.size) if other != rank]
        self._letters = AllRequests(
            [
                *(self._traffic.receive(self._held[other], other, 0) for other in others),
                *(self._traffic.send(self._own, other, 0) for other in others),
            ]
        )

    def Test(self):
        return self._letters.Test()


class ByMail:
    """Transport without control rounds: its workers always agree."""

    takes_columns = False
    window = None
    has_ended = False

    def __init__(self, traffic, host, placed, routing, timeout_seconds):
        self.rank, self.size, self.timeout_seconds = traffic.rank, traffic.size, timeout_seconds
        self._traffic = traffic
        self.exchange = MpiCollectives(traffic, host, placed, Routing(routing))

    def all_reduce_into(self, columns, num_sources, op, wanted, divisor=1):
        ((source, target),) = columns
        self.exchange.all_reduce(target, source, op, self.finish)

    def gather(self, source, wanted):
        counts = np.zeros((self.size, 8), np.uint8)
        gather = self._traffic.gather(np.array([source.nbytes]).view(np.uint8), counts)
        gather.Start()
        self.finish(gather)
        targets = [np.empty(int(count), np.uint8) for (count,) in counts.view(np.int64)]
        targets[self.rank][...] = source
        self.exchange.gather(targets, self.finish)
        return targets

    def broadcast_into(self, target, root, wanted):
        self.exchange.broadcast(target, root, self.finish)

    def finish(self, request):
        deadline = time.monotonic() + self.timeout_seconds
        while not request.Test():
            assert time.monotonic() < deadline, "a request is never done"
            time.sleep(0)
