"""A claim: one of several threads gets it."""

from __future__ import annotations

import threading

from dvkernels.threads.claim import Claim


def test_one_of_many_threads_gets_a_claim():
    for _ in range(200):
        claim, barrier, taken = Claim(), threading.Barrier(4), []

        def take(claim=claim, barrier=barrier, taken=taken):
            barrier.wait()
            taken.append(claim.take())

        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(taken) == [False, False, False, True]
