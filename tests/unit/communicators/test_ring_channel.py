"""Message channels over shared memory: whole messages, in order, and the end of the other side."""

from __future__ import annotations

import numpy as np
import pytest

from dvkernels.communicators.workers.shm.ring_channel import RingChannel
from dvkernels.errors import WorkerLostError
from dvkernels.kernels.cpu.message_ring import CAPACITY, RING_NBYTES


@pytest.fixture
def ends():
    """Two ends of a channel, and why each is gone."""
    rings = [np.zeros(RING_NBYTES, np.uint8) for _ in range(2)]
    gone = [("", False), ("", False)]
    made = [
        RingChannel(1 - k, f"process {k}", lambda k=k: gone[1 - k], rings[k], rings[1 - k])
        for k in range(2)
    ]
    return *made, gone


SIZES = [0, 1, 7, CAPACITY - 8, CAPACITY, 3, 2 * CAPACITY + 5, 0, 64]


def test_messages_come_whole_and_in_order_both_ways(ends):
    one, other, _ = ends
    sent = [np.arange(size).astype(np.uint8) for size in SIZES]
    came: list[list[np.ndarray]] = [[], []]
    for message in sent:
        half = len(message) // 2
        for end in (one, other):
            end.post([memoryview(message[:half]), memoryview(message[half:])])
    while min(map(len, came)) < len(sent):
        for end, found in zip((one, other), came, strict=True):
            end.flush()
            message = end.receive()
            if message is not None:
                found.append(message)
    for found in came:
        for expected, message in zip(sent, found, strict=True):
            np.testing.assert_array_equal(message, expected)


def test_the_last_words_of_a_lost_process_come_before_its_loss(ends):
    one, other, gone = ends
    one.post([memoryview(b"last words")])
    one.post([memoryview(bytes(2 * CAPACITY))])  # of which a part is missing
    gone[0] = ("it was killed", False)
    assert other.next("words", 0.0).tobytes() == b"last words"
    with pytest.raises(
        WorkerLostError, match="process 0 is lost, and with it words: it was killed"
    ):
        other.next("words", 30.0)


def test_no_message_in_time_is_none(ends):
    assert ends[0].next("words", 0.0) is None
