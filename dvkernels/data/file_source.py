"""Sources that read a list of files in order, sequentially or with random access."""

from __future__ import annotations

import bisect
import collections
import contextlib
import copy
import hashlib
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import numpy as np

from dvkernels.data.array_nest import Element
from dvkernels.data.checks import check_callable, check_ordered, unexpected
from dvkernels.data.node import Node, add_note, callable_name
from dvkernels.data.sources import SupportsIndexing, length_of
from dvkernels.errors import DatasetError

__all__: list[str] = []

# Small enough for any limit of open files, though a batch of a shuffled dataset touches more.
MAX_OPEN_FILES = 8
# A fingerprint reads at most _MAX_BLOCKS blocks of each file.
_BLOCK_BYTES, _MAX_BLOCKS = 4096, 16


class FileList(Node):
    """Base class of the file sources: a list of paths, and the user's reader of one file."""

    def __init__(
        self, paths: Iterable[str | os.PathLike[str]], reader: Callable[[str], Any]
    ) -> None:
        check_callable(
            "from_files", reader, "pass a function of one path that returns the file's elements"
        )
        self.files = check_paths(paths)
        self._reader = reader

    def describe(self) -> str:
        # The order depends on the names only; the folder may differ between machines.
        names = "/".join(os.path.basename(path) for path in self.files)
        digest = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()[:8]
        return (
            f"from_files(count={len(self.files)}, names={digest}, "
            f"reader={callable_name(self._reader)})"
        )

    def sample(self) -> Iterator[Any]:
        for path in self.files:
            yield os.path.basename(path)
            if os.path.isdir(path):  # a zarr array, say: the names and sizes of its entries
                inside = sorted(os.scandir(path), key=lambda entry: entry.name)
                yield [(entry.name, entry.stat().st_size) for entry in inside]
                continue
            with open(path, "rb") as file:
                yield (size := file.seek(0, os.SEEK_END))
                step = max(_BLOCK_BYTES, (size - _BLOCK_BYTES) / (_MAX_BLOCKS - 1))
                for k in range(min(_MAX_BLOCKS, -(-size // _BLOCK_BYTES))):
                    file.seek(round(k * step))
                    yield file.read(_BLOCK_BYTES)

    def strided(self, start: int, step: int) -> Self:
        """Return a source of the files ``start``, ``start + step``, ``start + 2 * step``, ..."""
        clone = copy.copy(self)
        clone.files = self.files[start::step]
        vars(clone).pop("pipeline", None)
        return clone

    def _call_text(self, path: str) -> str:
        return f"{callable_name(self._reader)}({path!r})"


class FromFiles(FileList):
    """Sequential source of the elements that ``reader`` yields; one file is open at a time."""

    random_access = False
    length = None

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Element]:
        index = 0
        for path in self.files:
            opened: Any = None  # May be its own iterator, as a file is; closing it twice is fine.
            elements: Iterator[Element] | None = None
            try:
                opened = self._reader(path)
                if not isinstance(opened, Iterable):
                    wanted, remedy = (
                        "the reader to return an iterable",
                        "write it as a generator function",
                    )
                    raise unexpected("from_files", wanted, opened, remedy, f", for {path!r}")
                elements = iter(opened)
                for element in elements:
                    if index >= start:
                        yield element
                    index += 1
            except DatasetError:
                raise
            except Exception as error:
                add_note(error, self._call_text(path), self, index, epoch)
                raise
            finally:
                for closable in (elements, opened):
                    if callable(close := getattr(closable, "close", None)):
                        close()


class FromIndexedFiles(FileList):
    """Random-access source: ``reader`` returns a sequence for each file.

    Files are opened on demand and kept in an LRU cache. An evicted file is dropped, not closed:
    another thread may be reading it, and it closes when nothing refers to it.
    """

    random_access = True

    def __init__(
        self,
        paths: Iterable[str | os.PathLike[str]],
        reader: Callable[[str], SupportsIndexing],
    ) -> None:
        super().__init__(paths, reader)
        self._opening: set[tuple[int, int]] = set()  # (thread, file) of readers now running
        self._open_files: collections.OrderedDict[int, SupportsIndexing] = collections.OrderedDict()
        lengths = [
            length_of(self._open_file(file), "from_files") for file in range(len(self.files))
        ]
        self._stops = list(itertools.accumulate(lengths))
        self.length: int = sum(lengths)

    def strided(self, start: int, step: int) -> Self:
        lengths = np.diff(self._stops, prepend=0).tolist()[start::step]
        clone = super().strided(start, step)
        clone._opening, clone._open_files = set(), collections.OrderedDict()
        clone._stops, clone.length = list(itertools.accumulate(lengths)), sum(lengths)
        return clone

    def describe(self) -> str:
        return f"{super().describe()[:-1]}, length={self.length})"

    def element(self, index: int, epoch: int) -> Element:
        file = bisect.bisect_right(self._stops, index)
        offset = index - (self._stops[file - 1] if file else 0)
        try:
            return self._open_file(file)[offset]
        except DatasetError:
            raise
        except Exception as error:
            add_note(error, self._call_text(self.files[file]), self, index, epoch)
            raise

    def _open_file(self, file: int) -> SupportsIndexing:
        opened = self._open_files.get(file)
        if opened is None:
            opened = self._call_reader(file)
            # Another thread may have been faster. No lock is held while a file is opened, since
            # the user's reader may use this dataset.
            opened = self._open_files.setdefault(file, opened)
        with contextlib.suppress(KeyError):  # another thread has just evicted it
            self._open_files.move_to_end(file)
            while len(self._open_files) > MAX_OPEN_FILES:
                self._open_files.popitem(last=False)
        return opened

    def _call_reader(self, file: int) -> SupportsIndexing:
        call = (threading.get_ident(), file)
        if call in self._opening:
            raise DatasetError(
                f"from_files: expected a reader that does not use the file that it is to open; "
                f"{callable_name(self._reader)} asks the dataset for an element of "
                f"{self.files[file]!r} while it opens it; read what it needs beforehand"
            )
        try:
            self._opening.add(call)
            opened: SupportsIndexing = self._reader(self.files[file])
        finally:
            self._opening.discard(call)
        if not hasattr(opened, "__len__") or not hasattr(opened, "__getitem__"):
            raise DatasetError(
                "from_files: expected the reader to return an object with __len__ and "
                f"__getitem__(index); got a {type(opened).__name__} for "
                f"{self.files[file]!r}; leave random_access out for what can only be iterated"
            )
        return opened


def check_paths(paths: Iterable[str | os.PathLike[str]]) -> tuple[str, ...]:
    """Return the paths as strings; raise :class:`DatasetError` unless all exist."""
    if isinstance(paths, str | bytes | os.PathLike) or not isinstance(paths, Iterable):
        remedy = "pass [path] for one file, sorted(folder.glob('*.npy')) for those of a folder"
        raise unexpected("from_files", "a list of paths", paths, remedy)
    check_ordered("from_files", "the paths", paths)
    names: Sequence[Any] = list(paths)
    for index, name in enumerate(names):
        if not isinstance(name, str | os.PathLike):
            remedy = "pass strings or pathlib.Path objects"
            raise unexpected("from_files", "paths", name, remedy, f", as paths[{index}]")
    files = tuple(os.fspath(name) for name in names)
    missing = [name for name in files if not os.path.exists(name)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DatasetError(
            f"from_files: expected paths that exist; {missing[0]!r}{more} (of {len(files)}) does "
            f"not, seen from {os.getcwd()!r}; pass full paths"
        )
    return files
