import numpy as np

from dvkernels.data.shard import even_slices


def test_slices_are_those_of_array_split():
    for length in range(20):
        for num_parts in range(1, 9):
            parts = [list(range(length))[where] for where in even_slices(length, num_parts)]
            assert parts == [p.tolist() for p in np.array_split(np.arange(length), num_parts)]
