"""Laws of the cursors: an element is taken again until it is confirmed, and none is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvkernels.data.cursor import EpochPosition
from dvkernels.data.dataset import Dataset
from dvkernels.data.prefetch import open_cursor

LENGTH = 11
SOURCES = {
    "random access": Dataset.range(LENGTH),
    "sequential": Dataset.from_iterable(lambda: iter(range(LENGTH))),
    "filtered": Dataset.range(2 * LENGTH).filter(lambda x: x < LENGTH),
}


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("source", SOURCES)
@given(steps=st.lists(st.tuples(st.integers(1, 4), st.booleans()), max_size=12))
def test_elements_are_taken_again_until_they_are_confirmed(source, depth, steps):
    cursor = open_cursor(SOURCES[source].node, EpochPosition(0, 0), depth)
    position = 0
    for count, is_confirmed in steps:
        if position == LENGTH:
            with pytest.raises(StopIteration):
                cursor.take(count)
            break
        taken = [int(element) for element in cursor.take(count)]
        assert taken == [*range(position, position + len(taken))]
        assert len(taken) >= min(count, LENGTH - position)
        assert cursor.epoch_position.position == position
        if is_confirmed:
            cursor.confirm()
            position += len(taken)
            assert cursor.epoch_position.position == position
    cursor.move_to(EpochPosition(0, 3))
    assert [int(element) for element in cursor] == [*range(3, LENGTH)]
    cursor.close()
