"""Iterator over one epoch of a distributed dataset."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import numpy as np

from dvkernels import html_table, tracebacks
from dvkernels.data.cursor import DirectCursor, EpochPosition
from dvkernels.data.distributed.epoch_reader import Distribution, EpochReader
from dvkernels.data.distributed.stats import InputStats, StatsRecorder
from dvkernels.data.exclusion import MutualExclusion
from dvkernels.data.state import SavedPosition
from dvkernels.devices.array_spec import HostArray, Spec
from dvkernels.errors import DatasetError
from dvkernels.profiler import ask_server
from dvkernels.pytree import flatten
from dvkernels.values.distributed import PerReplica
from dvkernels.values.process_bound import ProcessBound

__all__ = ["DistributedIterator", "DistributedOptional"]


class DistributedIterator(ProcessBound, Iterator[Any]):
    """Iterator over the global batches of one epoch, each a pytree of ``PerReplica``.

    The parts are views of the batch. If an error is raised, in user code too, the position stays:
    the next ``next()`` tries the same batch again. After the end each ``next()`` raises
    ``StopIteration``. After :meth:`close` the members that deliver or load raise
    :class:`DatasetError`; ``state_dict()`` still works. Several threads may share an iterator:
    each batch goes to one thread.

    With several workers, each delivers the parts of its own replicas, and all take the same
    number of steps. Before the first step, and after a state has been loaded, the workers compare
    their pipelines, epochs, positions and lengths; a difference is a :class:`DatasetError` on all
    of them. Where a worker cannot know when the others end (it reads files, or a dataset, of its
    own), the workers exchange reports at each step, so every worker must call ``next()``; a
    worker whose data are used up delivers empty parts until the last worker ends, and an error
    on one worker is raised on all.

    Made by ``iter(distributed_dataset)``.

    Examples
    --------
    >>> from dvkernels.data.dataset import Dataset
    >>> from dvkernels.data.distributed.dataset import DistributedDataset
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

    _bound_by = (
        "it has a position in an epoch that this process reads; pass on state_dict(), and load "
        "that into an iterator made where it is needed"
    )

    def __init__(
        self,
        distribution: Distribution,
        epoch: int,
        check_context: Callable[[str], object],
        on_load: Callable[[int], None],
    ) -> None:
        self._distribution = distribution
        self._check_context = check_context
        self._on_load = on_load
        self._mutex = MutualExclusion()
        self._is_closed = False
        recorder = StatsRecorder(distribution.options.on_error)
        self._reader = EpochReader(distribution, recorder, SavedPosition(EpochPosition(epoch, 0)))
        _living.add(self)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        try:
            self._check_context("next(iterator)")
            return self._mutex.run(self._advance)
        except BaseException as error:
            tracebacks.trim(error)
            raise

    def get_next_as_optional(self) -> DistributedOptional:
        """Return the next batch as an optional, which is empty from the end of the epoch on."""
        self._check_context("get_next_as_optional")
        try:
            return DistributedOptional(self._mutex.run(self._advance))
        except StopIteration:
            return DistributedOptional()

    @property
    def element_spec(self) -> Any:
        """Structure of an element: a pytree of ``PerReplica`` of shape and dtype.

        The leading length is None, since parts of a batch may differ in length. It is read off the
        first element of the epoch, without moving the iterator; ``DatasetError`` if there is none.
        """
        self._check_open("element_spec")
        return self._mutex.run(self._spec)

    def _spec(self) -> Any:
        node, cursor = self._distribution.node, self._reader.cursor
        # Elements that a live source gives to another cursor would be lost to this iterator.
        if self._distribution.is_resumable:
            cursor = DirectCursor(node, EpochPosition(cursor.epoch_position.epoch, 0))
        try:
            leaves, structure = flatten(cursor.take()[0])
        except StopIteration:
            raise DatasetError(
                "element_spec: expected at least one element to inspect; the dataset is empty"
            ) from None
        return structure.unflatten(map(self._leaf_spec, map(np.asarray, leaves)))

    def _leaf_spec(self, array: HostArray) -> PerReplica[Spec]:
        spec = Spec((None, *array.shape[1:]) if array.ndim else (), array.dtype)
        splitter = self._distribution.splitter
        return splitter.per_replica([spec] * self._distribution.share.num_local)

    def state_dict(self) -> dict[str, Any]:
        """Return the position as a small JSON-serializable dict, the same on every worker.

        Any iterator over a dataset built in the same way can load it, on any number of replicas
        and workers. Two exceptions need the same number of workers: datasets made per worker
        (``distribute_datasets_from_function``), and ``"off"``, where each worker reads everything.
        """
        if not self._distribution.is_resumable:
            return self._state()  # raises, without waiting for another thread
        return self._mutex.run(self._state)

    def _state(self) -> dict[str, Any]:
        return self._reader.state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Move to a saved position; the next ``iter()`` of the dataset is the epoch after it.

        Datasets without random access (``from_iterable``, ``filter``) are replayed from their
        start by the next ``next()``. Every worker must load the same state.

        Parameters
        ----------
        state : dict
            The result of :meth:`state_dict`.

        Raises
        ------
        DatasetError
            It is not a state, or the state of another pipeline. Nothing has changed.
        """
        self._check_open("load_state_dict")
        self._mutex.run(functools.partial(self._load, state))

    def _load(self, state: dict[str, Any]) -> None:
        reader = self._reader.moved_to(state)
        before, self._reader = self._reader, reader
        before.cursor.release()
        self._on_load(reader.epoch_position.epoch)

    def close(self) -> None:
        """Release the source; may be called twice.

        In another thread that waits for an element a :class:`DatasetError` is raised.
        """
        self._is_closed = True
        self._stop()
        self._mutex.close(self._release, self._stop)
        self._reader.cursor.wait()

    def _stop(self) -> None:
        self._reader.cursor.stop()

    def _release(self) -> None:
        self._reader.cursor.release()

    def stats(self) -> InputStats:
        """Return the fetching statistics since the iterator was made."""
        return self._reader.stats()

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
        epoch, position, _ = self._reader.epoch_position
        balancer = self._distribution.splitter.balancer
        shares = "" if balancer is None else f", shares=({balancer})"
        closed = ", closed" if self._is_closed else ""
        return (
            f"DistributedIterator({self._distribution.node!r}, "
            f"num_replicas={self._distribution.share.num_replicas}, epoch={epoch}, "
            f"position={position}{shares}{closed})"
        )

    _repr_html_ = html_table.of_attributes(
        pipeline="_distribution.node.pipeline",
        replicas="_distribution.share.num_replicas",
        epoch=lambda self: self._reader.epoch_position[0],
        position=lambda self: self._reader.epoch_position[1],
        shares="_distribution.splitter.balancer",
        closed="_is_closed",
    )

    def _check_open(self, member: str) -> None:
        if self._is_closed:
            raise DatasetError(
                f"{member}: expected an open iterator; this one has been closed; "
                "make a new one with iter(distributed_dataset)"
            )

    def _advance(self) -> Any:
        if self._is_closed:
            self._check_open("next(iterator)")
        try:
            return self._reader.advance()
        finally:
            if self._is_closed:  # by another thread, which may not have waited for this one
                self._release()


_living: weakref.WeakSet[DistributedIterator] = weakref.WeakSet()


def _report() -> list[dict[str, Any]]:
    """Return where each open iterator is, and how full its queue is."""
    found = []
    for iterator in list(_living):
        if not iterator._is_closed:
            stats, (epoch, position, _) = iterator.stats(), iterator._reader.epoch_position
            about = {"iterator": repr(iterator), "epoch": epoch, "position": position}
            about |= {"ready": stats.queue_depth, "prefetch": stats.prefetch}
            found.append(about | {"headspace": stats.headspace})
    return found


ask_server.register_section("iterators", _report)


class DistributedOptional:
    """Optional batch, which is empty at the end of an epoch."""

    __slots__ = ("_value",)

    def __init__(self, *value: Any) -> None:
        self._value = value

    def has_value(self) -> bool:
        """Return whether there is a batch."""
        return bool(self._value)

    def get_value(self) -> Any:
        """Return the batch; :class:`DatasetError` if there is none."""
        if not self._value:
            raise DatasetError(
                "get_value: expected a batch; got none, the epoch is over; ask has_value() first"
            )
        return self._value[0]

    def __repr__(self) -> str:
        return f"DistributedOptional({repr(self._value[0]) if self._value else ''})"
