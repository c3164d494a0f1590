import math

import numpy as np
import pytest

from dvkernels.data.dataset import Dataset
from dvkernels.data.distributed.dataset import DistributedDataset
from dvkernels.data.distributed.options import InputOptions
from dvkernels.errors import DatasetError


def test_elements_are_tuples_as_long_as_the_shortest():
    letters = Dataset.from_sequence("abcd")
    both = letters.zip(Dataset.range(3), Dataset.range(9).skip(5))
    assert len(both) == 3
    assert [(a, int(b), int(c)) for a, b, c in both] == [("a", 0, 5), ("b", 1, 6), ("c", 2, 7)]
    assert list(Dataset.zip(letters)) == [("a",), ("b",), ("c",), ("d",)]
    assert list(Dataset.zip(letters, letters))[-1] == ("d", "d")


def test_batches_and_shuffles_keep_rows_together():
    x = np.arange(20)
    both = Dataset.from_arrays(x).zip(Dataset.from_arrays({"y": x**2}), Dataset.range(20))
    for a, b, c in both.shuffle(seed=3).batch(6):
        np.testing.assert_array_equal(a**2, b["y"])
        np.testing.assert_array_equal(a, c)


@pytest.mark.parametrize(
    ("other", "length", "random_access"),
    [
        (Dataset.range(2).repeat(), 5, True),
        (Dataset.from_iterable(lambda: range(3)), None, False),
        (Dataset.range(0), 0, True),
        (Dataset.from_iterable(lambda: range(3)).take(0), 0, False),
    ],
)
def test_length_and_random_access(other, length, random_access):
    both = Dataset.range(5).zip(other)
    assert both.length == length
    assert both.node.random_access is random_access
    assert len(list(both)) == (3 if length is None else length)
    assert Dataset.range(1).repeat().zip(Dataset.range(1).repeat()).length == math.inf


def test_an_error_names_the_element():
    both = Dataset.range(5).zip(Dataset.range(5).map(lambda x: 1 // (3 - int(x))))
    with pytest.raises(ZeroDivisionError) as caught:
        list(both)
    assert "element 3" in caught.value.__notes__[0]


def test_only_datasets_are_zipped():
    with pytest.raises(DatasetError, match=r"got \[1\], a list, as argument 1; make it a dataset"):
        Dataset.range(1).zip(Dataset.range(1), [1])


def test_rows_stay_together_when_failing_elements_are_skipped():
    def picky(x):
        if x == 3:
            raise ArithmeticError("three")
        return x

    options = InputOptions(on_error="skip")
    by_index = Dataset.range(6).map(picky).zip(Dataset.range(6)).batch(4)
    for batch in DistributedDataset(by_index, 1, options=options):
        assert batch[0].values[0].tolist() == batch[1].values[0].tolist() != []
    in_order = Dataset.from_iterable(lambda: range(6)).map(picky).zip(Dataset.range(6)).batch(2)
    iterator = iter(DistributedDataset(in_order, 1, options=options))
    next(iterator)
    with pytest.raises(ArithmeticError, match="three"):
        next(iterator)
