"""A dataset whose batches are cut into one part per replica."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Self

import numpy as np

from dvkernels.data.ahead import Ahead
from dvkernels.data.checks import check_count
from dvkernels.data.clock import Clock, InputStats
from dvkernels.data.cursor import Cursor
from dvkernels.data.dataset import Dataset, known_length
from dvkernels.data.nest import flatten, is_flat_tuple, leaf_names
from dvkernels.data.options import InputOptions
from dvkernels.data.skips import Skips, skipping
from dvkernels.data.state import read_state, write_state
from dvkernels.data.transforms import prefetch_depth
from dvkernels.devices.buffers import Spec
from dvkernels.errors import DatasetError
from dvkernels.schedules import partition
from dvkernels.values.distributed import PerReplica

__all__ = ["DistributedDataset", "DistributedIterator", "DistributedOptional"]


_PLAIN = InputOptions()


def _allow(member: str) -> None:
    """Check nothing: every context will do."""


class DistributedDataset:
    """A dataset of global batches, each of which all replicas share.

    Each ``iter()`` is the next epoch, from 0 on. It is made by ``strategy.distribute_dataset``.

    Parameters
    ----------
    dataset : Dataset
        Its elements are the global batches.
    num_replicas : int
        How many parts a batch is cut into, as evenly as it goes, larger ones first; a replica
        may get an empty part.
    devices : iterable of Device or str, optional
        Where the replicas live, one each.
    check_context : callable, optional
        Called with the name of the member before anything is delivered; raises where that is
        not allowed.
    owner : object, optional
        Handed on to every ``PerReplica``.
    options : InputOptions
        How batches are fetched.
    is_dealt : bool
        The elements are the replicas' batches, dealt to them in turn, not global batches.

    Examples
    --------
    >>> from dvkernels.data.dataset import Dataset
    >>> distributed = DistributedDataset(Dataset.range(5).batch(3), num_replicas=2)
    >>> for batch in distributed:
    ...     print(batch)
    PerReplica(0: array([0, 1]), 1: array([2]))
    PerReplica(0: array([3]), 1: array([4]))
    """

    def __init__(
        self,
        dataset: Dataset,
        num_replicas: int,
        devices: Iterable[Any] | None = None,
        *,
        check_context: Callable[[str], None] = _allow,
        owner: object = None,
        options: InputOptions = _PLAIN,
        is_dealt: bool = False,
    ) -> None:
        if not isinstance(dataset, Dataset):
            raise DatasetError(
                f"distribute_dataset: expected a dv.Dataset; got a {type(dataset).__name__}; "
                "make one with dv.Dataset.from_arrays, from_sequence or from_iterable"
            )
        self._dataset = dataset
        self._num_replicas = check_count("distribute_dataset", "num_replicas", num_replicas, 1)
        # The devices as PerReplica reads them: parsed once, and as many as there are replicas.
        self._devices = PerReplica((None,) * self._num_replicas, devices=devices).devices
        self._check_context = check_context
        self._owner = owner
        self._options = options
        self._is_dealt = is_dealt
        self._next_epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next ``iter()``; those after it count on from there."""
        self._next_epoch = check_count("set_epoch", "epoch", epoch, 0)

    def __iter__(self) -> DistributedIterator:
        epoch = self._next_epoch
        self._next_epoch += 1
        return self._iterator(epoch)

    @property
    def element_spec(self) -> Any:
        """What each element holds: see :attr:`DistributedIterator.element_spec`."""
        return self._iterator(self._next_epoch).element_spec

    def _iterator(self, epoch: int) -> DistributedIterator:
        return DistributedIterator(
            self._dataset,
            self._num_replicas,
            self._devices,
            epoch=epoch,
            check_context=self._check_context,
            owner=self._owner,
            on_load=self._follow,
            options=self._options,
            is_dealt=self._is_dealt,
        )

    def __len__(self) -> int:
        length = known_length(self._dataset.length)
        return -(-length // self._num_replicas) if self._is_dealt else length

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"DistributedDataset({self._dataset!r}, num_replicas={self._num_replicas})"

    def _follow(self, epoch: int) -> None:
        self._next_epoch = epoch + 1


class DistributedOptional:
    """A batch, or the lack of one at the end of an epoch."""

    __slots__ = ("_held",)

    def __init__(self, *held: Any) -> None:
        self._held = held

    def has_value(self) -> bool:
        """Tell whether there is a batch."""
        return bool(self._held)

    def get_value(self) -> Any:
        """Return the batch; :class:`DatasetError` if there is none."""
        if not self._held:
            raise DatasetError(
                "get_value: expected a batch; got none, the epoch is over; ask has_value() first"
            )
        return self._held[0]

    def __repr__(self) -> str:
        return f"DistributedOptional({repr(self._held[0]) if self._held else ''})"


class DistributedIterator(Iterator[Any]):
    """Goes through one epoch, and gives each global batch as a nest of ``PerReplica``.

    The parts are views of the batch. If anything raises, be it user code, the position stays:
    the next ``next()`` tries the same batch again. After the end ``next()`` raises
    ``StopIteration`` each time. After :meth:`close` the members that deliver or load raise
    :class:`DatasetError`; the state can still be asked for.

    Made by ``iter(distributed_dataset)``; the parameters are those of :class:`DistributedDataset`
    and the epoch. ``on_load`` is called with the epoch of a state that has been loaded.

    Examples
    --------
    >>> from dvkernels.data.dataset import Dataset
    >>> dataset = Dataset.range(6).batch(2)
    >>> iterator = iter(DistributedDataset(dataset, num_replicas=2))
    >>> next(iterator)
    PerReplica(0: array([0]), 1: array([1]))
    >>> state = iterator.state_dict()
    >>> with iter(DistributedDataset(dataset, num_replicas=1)) as resumed:
    ...     resumed.load_state_dict(state)
    ...     next(resumed)
    PerReplica(0: array([2, 3]))
    """

    def __init__(
        self,
        dataset: Dataset,
        num_replicas: int,
        devices: Iterable[Any] | None = None,
        *,
        epoch: int = 0,
        check_context: Callable[[str], None] = _allow,
        owner: object = None,
        on_load: Callable[[int], None] | None = None,
        options: InputOptions = _PLAIN,
        is_dealt: bool = False,
    ) -> None:
        self._node = dataset.node
        self._num_replicas = num_replicas
        self._devices = devices
        self._check_context = check_context
        self._owner = owner
        self._on_load = on_load
        self._is_dealt = is_dealt
        self._cursor = Cursor(self._node, epoch)
        depth = prefetch_depth(self._node, options.prefetch)
        self._depth = depth * num_replicas if is_dealt else depth
        self._skips = Skips() if options.on_error == "skip" else None
        self._ahead = Ahead(self._node, epoch, 0, self._depth, self._skips) if self._depth else None
        self._clock = Clock()
        self._is_closed = False
        self._slices: tuple[int, tuple[slice, ...]] = (-1, ())  # Of the latest batch length.

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        self._check_context("next(iterator)")
        return self._advance("next(iterator)")

    def get_next_as_optional(self) -> DistributedOptional:
        """Return the next batch, or at the end, and ever after it, an object without one."""
        self._check_context("get_next_as_optional")
        try:
            return DistributedOptional(self._advance("get_next_as_optional"))
        except StopIteration:
            return DistributedOptional()

    @property
    def element_spec(self) -> Any:
        """What an element holds: its nest, of ``PerReplica`` of shape and dtype.

        The leading length is None, since parts of a batch may differ in length. It looks at the
        first element of the epoch, and leaves the iterator where it is; ``DatasetError`` if there
        is none.
        """
        self._check_open("element_spec")
        try:
            # What a live source has given to another cursor, this one would never see.
            is_live = self._node.why_not_resumed is not None
            cursor = self._cursor if is_live else Cursor(self._node, self._cursor.epoch)
            first = cursor.peek()
        except StopIteration:
            raise DatasetError("element_spec: the dataset is empty; nothing tells") from None
        leaves, spec = flatten(first)
        held = [np.asarray(leaf) for leaf in leaves]
        return spec.unflatten(
            self._together(
                [Spec((None, *a.shape[1:]) if a.ndim else (), a.dtype)] * self._num_replicas
            )
            for a in held
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the position, as a small dict that JSON can hold.

        It fits every iterator over a dataset built alike, on any number of replicas.
        """
        return write_state(self._node, *self._cursor.place)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; the next ``iter()`` of the dataset is the epoch after it.

        Datasets without random access (``from_iterable``, ``filter``) are replayed from their
        start by the next ``next()``.

        Raises
        ------
        DatasetError
            It is not a state, or that of another pipeline. Nothing has changed.
        """
        self._check_open("load_state_dict")
        place = read_state(self._node, state)
        self._cursor.move_to(*place)
        if self._ahead is not None:
            self._ahead.move_to(*place)
        if self._on_load is not None:
            self._on_load(place.epoch)

    def close(self) -> None:
        """Let go of the source; may be called twice."""
        self._is_closed = True
        if self._ahead is not None:
            self._ahead.move_to(*self._cursor.place)
        self._cursor.close()
        self._cursor.move_to(*self._cursor.place)

    def stats(self) -> InputStats:
        """Return what fetching has cost since the iterator was made."""
        return self._clock.stats(self._ahead, self._depth, self._skips)

    def __enter__(self) -> Self:
        self._check_open("with")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        closed = ", closed" if self._is_closed else ""
        return (
            f"DistributedIterator({self._node!r}, num_replicas={self._num_replicas}, "
            f"epoch={self._cursor.epoch}, position={self._cursor.position}{closed})"
        )

    def _check_open(self, member: str) -> None:
        if self._is_closed:
            raise DatasetError(
                f"{member}: expected an open iterator; this one has been closed; "
                "make a new one with iter(distributed_dataset)"
            )

    def _advance(self, member: str) -> Any:
        if self._is_closed:
            self._check_open(member)
        began = time.perf_counter()
        count = self._num_replicas if self._is_dealt else 1
        token = None if self._skips is None else skipping.set(self._skips)
        try:
            if self._ahead is not None:
                elements = self._take(self._ahead, count)
            else:
                elements = self._cursor.peek_many(count)
        finally:
            if token is not None:
                skipping.reset(token)
        nest = self._deal(elements) if self._is_dealt else self._split(elements[0])
        if self._ahead is not None:
            self._cursor.move_to(*self._ahead.place)
        else:
            self._cursor.advance()
        self._clock.count(began, elements)
        return nest

    def _take(self, ahead: Ahead, count: int) -> list[Any]:
        """Return the next elements of those that a thread computes ahead."""
        found: list[Any] = []
        try:
            while len(found) < count:
                found.append(next(ahead))
        except StopIteration:
            if not found:
                raise
        except BaseException:
            ahead.move_to(*self._cursor.place)
            raise
        return found

    def _together(self, parts: list[Any]) -> PerReplica[Any]:
        return PerReplica(parts, devices=self._devices, owner=self._owner)

    def _deal(self, elements: list[Any]) -> Any:
        """Give one element to each replica; those that miss one get an empty batch like it."""
        flat = [flatten(element) for element in elements]
        structure = flat[0][1]
        for place, (_, other) in enumerate(flat):
            if other != structure:
                raise DatasetError(
                    f"distribute_datasets_from_function: expected elements of one structure; got "
                    f"{structure!s:.200} and, {place} later, {other!s:.200}"
                )
        columns = [list(column) for column in zip(*(leaves for leaves, _ in flat), strict=True)]
        missing = self._num_replicas - len(elements)
        for column in columns if missing else ():
            array = np.asarray(column[0])
            if array.ndim == 0:
                raise DatasetError(
                    f"distribute_datasets_from_function: the last step has {len(elements)} "
                    f"elements for {self._num_replicas} replicas, and elements that are no batches "
                    f"have no empty part; batch the dataset, or drop the rest with take()"
                )
            column += [array[:0]] * missing
        return structure.unflatten([self._together(column) for column in columns])

    def _split(self, batch: Any) -> Any:
        # The two most frequent nests, one array and a flat tuple, are spared optree's 2 us.
        if type(batch) is np.ndarray:
            return self._parts([batch], batch)[0]
        if is_flat_tuple(batch):
            return tuple(self._parts(batch, batch))
        leaves, spec = flatten(batch)
        if not leaves:
            raise DatasetError(
                f"distribute_dataset: expected batches with at least one array; got {batch!r:.80}; "
                "let the dataset's elements hold something"
            )
        return spec.unflatten(self._parts(leaves, batch))

    def _parts(self, leaves: Iterable[Any], batch: Any) -> list[PerReplica[Any]]:
        length, slices = self._slices
        parts = []
        for leaf in leaves:
            shape = getattr(leaf, "shape", None)
            if not shape or shape[0] != length:
                length, slices = self._cut(batch)
            parts.append(
                PerReplica(
                    [leaf[where] for where in slices], devices=self._devices, owner=self._owner
                )
            )
        return parts

    def _cut(self, batch: Any) -> tuple[int, tuple[slice, ...]]:
        """Check that all leaves have one leading length, and remember its slices."""
        leaves, _ = flatten(batch)
        found = []
        for name, leaf in zip(leaf_names(batch, "batch"), leaves, strict=True):
            shape = getattr(leaf, "shape", None)
            if not shape:
                raise DatasetError(
                    "distribute_dataset: expected batches, arrays with a leading axis to share "
                    f"among {self._num_replicas} replicas; got {leaf!r:.80}, a "
                    f"{type(leaf).__name__}, as {name}; call .batch(global_batch_size) on the "
                    "dataset"
                )
            found.append((name, shape[0]))
        if len({length for _, length in found}) > 1:
            lengths = ", ".join(f"{length} for {name}" for name, length in found)
            raise DatasetError(
                "distribute_dataset: expected one leading length, that of the global batch; got "
                f"{lengths}; call .batch(global_batch_size) on the dataset"
            )
        length = int(found[0][1])
        parts = partition.parts(length, self._num_replicas)
        self._slices = (length, tuple(slice(start, stop) for start, stop in parts))
        return self._slices
