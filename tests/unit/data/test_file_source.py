import gc

import numpy as np
import pytest

from dvkernels.data.dataset import Dataset
from dvkernels.data.distributed.dataset import DistributedDataset
from dvkernels.data.file_source import MAX_OPEN_FILES
from dvkernels.errors import DatasetError


@pytest.fixture
def paths(tmp_path):
    """Three files with consecutively numbered lines; the second file is empty."""
    texts = {"a.txt": "0\n1\n2\n", "b.txt": "", "c.txt": "3\n4\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return [tmp_path / name for name in texts]


@pytest.fixture
def arrays(tmp_path):
    """Twelve files of 0 to 3 rows, more than are kept open."""
    rows = np.array_split(np.arange(18), [3, 3, 5, 6, 9, 9, 10, 12, 13, 15, 17])
    for number, part in enumerate(rows):
        np.save(tmp_path / f"{number:02}.npy", part)
    return sorted(tmp_path.glob("*.npy"))


def numbers(path):
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield int(line)


def mapped(path):
    return np.load(path, mmap_mode="r")


def test_elements_are_read_file_by_file_in_the_given_order(paths):
    assert list(Dataset.from_files(paths, numbers)) == [0, 1, 2, 3, 4]
    assert list(Dataset.from_files(paths[::-1], numbers)) == [3, 4, 0, 1, 2]
    assert list(Dataset.from_files(iter(paths), lambda path: [path[-5]])) == ["a", "b", "c"]
    assert list(Dataset.from_files([], numbers)) == []


def test_the_files_are_known_before_they_are_read(paths):
    dataset = Dataset.from_files(paths, numbers).map(str).batch(2)
    assert dataset.files == tuple(str(path) for path in paths)
    assert Dataset.range(3).files == ()


def test_a_file_is_closed_at_its_end_and_with_the_iterator(paths):
    opened = []

    def lines(path):
        opened.append(open(path, encoding="utf-8"))  # noqa: SIM115
        return opened[-1]

    iterator = iter(Dataset.from_files(paths, lines))
    assert [int(next(iterator)) for _ in range(4)] == [0, 1, 2, 3]
    assert [file.closed for file in opened] == [True, True, False]
    del iterator
    gc.collect()
    assert opened[-1].closed


def test_a_generator_is_closed_with_the_distributed_iterator(paths):
    ends = []

    def guarded(path):
        try:
            yield from numbers(path)
        finally:
            ends.append(path)

    with iter(DistributedDataset(Dataset.from_files(paths, guarded).batch(2), 1)) as iterator:
        next(iterator)
    assert ends == [str(paths[0])]


def test_an_error_of_the_reader_names_the_file_and_is_tried_again(paths):
    fails = [True]

    def shaky(path):
        for number in numbers(path):
            if number == 3 and fails:
                fails.clear()
                raise OSError("disk")
            yield number

    iterator = iter(Dataset.from_files(paths, shaky))
    assert [next(iterator) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="disk") as caught:
        next(iterator)
    assert "c.txt" in caught.value.__notes__[0]
    assert "element 3" in caught.value.__notes__[0]
    assert list(iterator) == [3, 4]


def test_a_missing_path_is_named_at_once(paths):
    with pytest.raises(DatasetError, match=r"nowhere\.txt.*pass full paths"):
        Dataset.from_files([*paths, "nowhere.txt"], numbers)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a.txt", numbers), r"expected a list of paths.*pass \[path\]"),
        (([3], numbers), r"as paths\[0\]; pass strings"),
        ((None, numbers), "expected a list of paths"),
        (([], 3), "expected a function"),
    ],
)
def test_arguments_are_checked(arguments, words):
    with pytest.raises(DatasetError, match=words):
        Dataset.from_files(*arguments)


def test_results_of_a_reader_are_checked(paths):
    with pytest.raises(DatasetError, match="expected the reader to return an iterable; got None"):
        list(Dataset.from_files(paths, lambda path: None))
    with pytest.raises(DatasetError, match="leave random_access out"):
        Dataset.from_files(paths, numbers, random_access=True)


def test_random_access_yields_the_same_rows(arrays):
    dataset = Dataset.from_files(arrays, mapped, random_access=True)
    assert len(dataset) == 18
    assert [int(x) for x in dataset] == list(range(18))
    assert sorted(int(x) for x in dataset.shuffle(seed=1)) == list(range(18))
    assert [b.tolist() for b in dataset.skip(3).batch(10)] == [
        list(range(3, 13)),
        list(range(13, 18)),
    ]


def test_lengths_are_read_once_and_few_files_stay_open(arrays):
    opened = []

    def counted(path):
        opened.append(path)
        return mapped(path)

    dataset = Dataset.from_files(arrays, counted, random_access=True)
    assert len(opened) == len(arrays) == 12
    assert len(dataset.node._open_files) == MAX_OPEN_FILES
    list(dataset)
    assert len(dataset.node._open_files) == MAX_OPEN_FILES
    before = len(opened)
    list(dataset.skip(15))  # the last two files, which are still open
    assert len(opened) == before


def test_an_error_of_an_indexed_file_names_it(arrays):
    class Broken:
        def __init__(self, path):
            self.path = path

        def __len__(self):
            return 2

        def __getitem__(self, index):
            raise KeyError(self.path)

    dataset = Dataset.from_files(arrays, Broken, random_access=True)
    with pytest.raises(KeyError) as caught:
        list(dataset.skip(3))
    assert "01.npy" in caught.value.__notes__[0]
    assert "Broken" in caught.value.__notes__[0]


@pytest.mark.parametrize("random_access", [False, True])
def test_other_file_names_make_another_pipeline(arrays, random_access):
    def over(paths):
        dataset = Dataset.from_files(paths, mapped, random_access=random_access).batch(2)
        return iter(DistributedDataset(dataset, 1))

    state = over(arrays).state_dict()
    over(arrays).load_state_dict(state)
    with pytest.raises(DatasetError, match="expected the state of the same pipeline"):
        over(arrays[::-1]).load_state_dict(state)
