"""Iterator over one epoch of a distributed dataset."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import numpy as np

from dvkernels.data.cursor import Cursor, EpochPosition
from dvkernels.data.distributed.lockstep import (
    Exchange,
    StartReport,
    StepReport,
    agree_on_start,
    agree_on_step,
    report_failure,
)
from dvkernels.data.distributed.optional import DistributedOptional
from dvkernels.data.distributed.options import AutoShardPolicy, InputOptions
from dvkernels.data.distributed.sharding import Sharding, by_elements, by_files
from dvkernels.data.distributed.split import Splitter
from dvkernels.data.distributed.stats import InputStats, StatsRecorder
from dvkernels.data.distributed.worker_share import WorkerShare
from dvkernels.data.error_policy import SkippedElements
from dvkernels.data.exclusion import MutualExclusion
from dvkernels.data.fetch import Fetcher
from dvkernels.data.fingerprint import fingerprint, kinds_of
from dvkernels.data.node import Node
from dvkernels.data.state import (
    SavedPosition,
    check_same,
    read_state,
    read_workers_state,
    write_state,
    write_workers_state,
)
from dvkernels.devices.array_spec import Spec
from dvkernels.errors import DatasetError
from dvkernels.pytree import flatten
from dvkernels.values.process_bound import ProcessBound

__all__ = ["DistributedIterator"]


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
        node: Node,
        sharding: Sharding,
        share: WorkerShare,
        splitter: Splitter,
        *,
        epoch: int,
        check_context: Callable[[str], None],
        on_load: Callable[[int], None],
        options: InputOptions,
        is_dealt: bool,
        exchange: Exchange,
    ) -> None:
        self._node = node
        self._share = share
        self._splitter = splitter
        self._check_context = check_context
        self._on_load = on_load
        self._prefetch = options.prefetch
        self._is_dealt = is_dealt
        self._is_resumable = node.why_not_resumable is None
        self._exchange = exchange
        self._takes_fingerprint = options.fingerprint
        self._skips = SkippedElements() if options.on_error == "skip" else None
        self._recorder = StatsRecorder()
        self._mutex = MutualExclusion()
        self._is_closed = False
        self._policy_sharding = sharding
        self._element: str | None = None  # the outline of the elements, once it is known
        self._begin(sharding, EpochPosition(epoch, 0))

    def _begin(
        self, sharding: Sharding, epoch_position: EpochPosition, lanes: list[int] | None = None
    ) -> None:
        """Begin at a position; ``lanes`` holds the position in each lane of files, if any."""
        if sharding.policy is AutoShardPolicy.FILE and lanes is None:
            lanes = [0] * self._share.num_workers
        self._sharding = sharding
        self._lanes = None if lanes is None else list(lanes)
        self._states: list[dict[str, Any]] = []  # of workers with datasets of their own
        self._has_ended = False
        self._has_begun = self._is_outlined = False
        self._empty: Any = None
        # With lanes the fetcher counts steps from 0: only the positions in the lanes were saved.
        self._num_steps = epoch_position.position
        own = epoch_position if lanes is None else EpochPosition(epoch_position.epoch, 0)
        count = self._share.num_local if self._is_dealt else 1
        self._fetcher = Fetcher(sharding.node, own, self._prefetch, count, self._skips)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        self._check_context("next(iterator)")
        return self._mutex.run(self._advance)

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
        try:
            # Elements that a live source gives to another cursor would be lost to this iterator.
            fresh = Cursor(self._node, self._fetcher.epoch_position.epoch)
            first = fresh.peek() if self._is_resumable else self._fetcher.peek()
        except StopIteration:
            raise DatasetError(
                "element_spec: expected at least one element to inspect; the dataset is empty"
            ) from None
        leaves, spec = flatten(first)
        arrays = [np.asarray(leaf) for leaf in leaves]
        count = self._share.num_local
        return spec.unflatten(
            self._splitter.per_replica(
                [Spec((None, *a.shape[1:]) if a.ndim else (), a.dtype)] * count
            )
            for a in arrays
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the position as a small JSON-serializable dict, the same on every worker.

        Any iterator over a dataset built in the same way can load it, on any number of replicas
        and workers. Two exceptions need the same number of workers: datasets made per worker
        (``distribute_datasets_from_function``), and ``"off"``, where each worker reads everything.
        """
        if not self._is_resumable:
            return self._state()  # raises, without waiting for another thread
        return self._mutex.run(self._state)

    def _state(self) -> dict[str, Any]:
        if self._is_dealt and self._share.num_workers > 1:
            return write_workers_state(self._node, self._epoch_position.epoch, self._states)
        return self._own_state()

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
        share = self._share
        states: list[dict[str, Any]] = []
        if self._is_dealt and share.num_workers > 1:
            epoch, states = read_workers_state(self._node, state, share.num_workers)
            saved = SavedPosition(EpochPosition(epoch, 0))
            if states:
                saved = read_state(self._state_node, states[share.worker])
        else:
            saved = read_state(self._state_node, state)
        check_same("element", self._element, saved.element)
        if saved.fingerprint is not None:
            check_same("fingerprint", self._fingerprint, saved.fingerprint)
        epoch_position, lanes = saved.epoch_position, saved.lanes
        sharding = self._policy_sharding
        if lanes is not None:
            sharding = by_files(self._node, share, lanes, "as when the state was saved")
        elif epoch_position.position and sharding.policy is AutoShardPolicy.FILE:
            sharding = by_elements(self._node, share, "as when the state was saved")
        self._fetcher.close()
        self._begin(sharding, epoch_position, lanes)
        self._states = states
        self._element = saved.element
        self._on_load(epoch_position.epoch)

    def close(self) -> None:
        """Release the source; may be called twice.

        In another thread that waits for an element a :class:`DatasetError` is raised.
        """
        self._is_closed = True
        self._fetcher.stop()
        self._mutex.close(self._fetcher.close, self._fetcher.stop)
        self._fetcher.wait()

    def stats(self) -> InputStats:
        """Return the fetching statistics since the iterator was made."""
        return self._recorder.stats(self._fetcher.prefetcher, self._fetcher.depth, self._skips)

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
            f"DistributedIterator({self._node!r}, num_replicas={self._share.num_replicas}, "
            f"epoch={self._epoch_position.epoch}, position={self._epoch_position.position}{closed})"
        )

    @property
    def _epoch_position(self) -> EpochPosition:
        epoch_position = self._fetcher.epoch_position
        return (
            epoch_position
            if self._lanes is None
            else EpochPosition(epoch_position.epoch, self._num_steps)
        )

    @property
    def _state_node(self) -> Node:
        """The pipeline that a position refers to: under ``"off"`` the worker's own batches."""
        is_off = self._policy_sharding.policy is AutoShardPolicy.OFF
        return self._policy_sharding.node if is_off else self._node

    def _outline(self, element: Any) -> None:
        """Record the outline of the elements; compare it with that of a loaded state."""
        found = kinds_of(element)
        check_same("element", found, self._element)
        self._element, self._is_outlined = found, True

    @property
    def _fingerprint(self) -> str | None:
        return fingerprint(self._node) if self._takes_fingerprint else None

    def _own_state(self) -> dict[str, Any]:
        return write_state(
            self._state_node, self._epoch_position, self._lanes, self._element, self._fingerprint
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
        if not self._has_begun:
            self._agree_on_start()
        began = time.perf_counter()
        try:
            if self._sharding.needs_agreement:
                elements, nest = self._advance_together()
                self._recorder.count(began, elements)
                return nest
            elements = self._fetcher.take()
            if not self._is_outlined:
                self._outline(elements[0])
            nest = self._splitter.split(elements, self._recorder)
            self._recorder.count(began, elements)
            self._fetcher.confirm()  # last, so that an interrupt before it loses no batch
            return nest
        finally:
            if self._is_closed:  # by another thread, which may not have waited for this one
                self._fetcher.close()

    def _agree_on_start(self) -> None:
        """Check that all workers are about to read the same data from the same position."""
        if self._share.num_workers > 1:
            epoch_position = self._epoch_position
            own = StartReport((), None, epoch_position.epoch, 0)
            if not self._is_dealt:
                own = StartReport(
                    self._node.pipeline, self._node.length, *epoch_position[:2], self._fingerprint
                )
            agree_on_start(self._exchange, own)
        self._has_begun = True

    def _advance_together(self) -> tuple[list[Any], Any]:
        """Take a step in lockstep with all workers, or end with all of them."""
        if self._has_ended:
            raise StopIteration
        before = self._fetcher.epoch_position
        try:
            return self._take_step()
        except StopIteration:
            raise
        except BaseException:
            # The elements of a live source were not confirmed, so they are returned again.
            if self._is_resumable:
                self._fetcher.move_to(before)
            self._has_begun = False  # Before the next try all workers compare their positions.
            raise

    def _take_step(self) -> tuple[list[Any], Any]:
        try:
            elements, nest = self._take_own()
        except Exception as error:
            report_failure(self._exchange, error)
            raise
        own = StepReport(
            self._fetcher.epoch_position.epoch, 0, bool(elements), self._progress(), self._empty
        )
        if self._lanes is not None:
            own = own._replace(step=self._num_steps)
        reports = agree_on_step(self._exchange, own)
        have = [report.has_batch for report in reports]
        if not any(have) or (self._sharding.ends_with_first and not all(have)):
            self._has_ended = True
            raise StopIteration
        self._record_progress(reports)
        if not elements:
            return elements, self._splitter.split_empty(self._empty, self._recorder)
        if not self._is_resumable:
            self._fetcher.confirm()
        return elements, nest

    def _take_own(self) -> tuple[list[Any], Any]:
        """Return this worker's elements for the step, and their parts; ([], None) at its end."""
        try:
            elements = self._fetcher.take()
        except StopIteration:
            return [], None
        if not self._is_outlined:
            self._outline(elements[0])
        nest = self._splitter.split(elements, self._recorder)
        if self._empty is None:
            self._empty = self._splitter.empty_like(elements[0])
        if self._is_resumable:
            self._fetcher.confirm()  # The report to the other workers holds the new position.
        return elements, nest

    def _progress(self) -> Any:
        if self._is_dealt:
            with contextlib.suppress(DatasetError):  # raised only when a state is requested
                return self._own_state()
            return None
        if self._lanes is None:
            return None
        own, memory = self._sharding.own_lanes, self._fetcher.epoch_position.memory
        positions = memory[-1][2] if memory else [self._lanes[lane] for lane in own]
        return dict(zip(own, positions, strict=True))

    def _record_progress(self, reports: list[StepReport]) -> None:
        """Record the progress of all workers."""
        if self._empty is None:
            self._empty = next(
                (report.empty for report in reports if report.empty is not None), None
            )
        if self._element is None and self._empty is not None:
            self._outline(self._empty)
        if self._is_dealt:
            self._states = [report.progress for report in reports]
        elif self._lanes is not None:
            self._num_steps += 1
            for report in reports:
                for lane, position in report.progress.items():
                    self._lanes[lane] = position
