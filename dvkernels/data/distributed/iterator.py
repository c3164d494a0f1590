"""Goes through one epoch of a distributed dataset."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import numpy as np

from dvkernels.data.array_nest import flatten
from dvkernels.data.cursor import Cursor, EpochPosition
from dvkernels.data.distributed import sharding
from dvkernels.data.distributed.lockstep import (
    Exchange,
    StartReport,
    StepReport,
    agree,
    agree_on_start,
    report,
)
from dvkernels.data.distributed.optional import DistributedOptional
from dvkernels.data.distributed.options import AutoShardPolicy, InputOptions
from dvkernels.data.distributed.sharding import Sharding
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
from dvkernels.devices.buffers import Spec
from dvkernels.errors import DatasetError
from dvkernels.values.process_bound import ProcessBound

__all__ = ["DistributedIterator"]


class DistributedIterator(ProcessBound, Iterator[Any]):
    """Goes through one epoch, and gives each global batch as a nest of ``PerReplica``.

    The parts are views of the batch. If anything raises, be it user code, the position stays:
    the next ``next()`` tries the same batch again. After the end ``next()`` raises
    ``StopIteration`` each time. After :meth:`close` the members that deliver or load raise
    :class:`DatasetError`; the state can still be asked for. Several threads may share an iterator:
    one at a time is at it, so each batch goes to one of them.

    Over several workers each gives the parts of its own replicas, and all take equally many
    steps. Before the first one, and after a state has been loaded, they compare their pipelines,
    epochs, positions and lengths; if they differ, :class:`DatasetError` on all of them says how.
    Where a worker cannot know when the others end (it reads files, or a dataset, of its
    own), they tell each other at each step, so every worker must call ``next()``; one whose data
    are used up gives empty parts until the last one ends, and an error in one worker is raised in
    all.

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
        "it has a place in an epoch that this process goes through; pass on state_dict(), and load "
        "that into an iterator made where it is needed"
    )

    def __init__(
        self,
        node: Node,
        shared: Sharding,
        share: WorkerShare,
        dealer: Splitter,
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
        self._dealer = dealer
        self._check_context = check_context
        self._on_load = on_load
        self._prefetch = options.prefetch
        self._is_dealt = is_dealt
        self._is_resumable = node.why_not_resumed is None
        self._exchange = exchange
        self._takes_fingerprint = options.fingerprint
        self._skips = SkippedElements() if options.on_error == "skip" else None
        self._clock = StatsRecorder()
        self._turn = MutualExclusion()
        self._is_closed = False
        self._by_policy = shared
        self._element: str | None = None  # the outline of what has been, or is to be delivered
        self._begin(shared, EpochPosition(epoch, 0))

    def _begin(
        self, shared: Sharding, place: EpochPosition, lanes: list[int] | None = None
    ) -> None:
        """Read from a place on; ``lanes`` says how far each lane of files is, if there are any."""
        if shared.policy is AutoShardPolicy.FILE and lanes is None:
            lanes = [0] * self._share.num_workers
        self._shared = shared
        self._lanes = None if lanes is None else list(lanes)
        self._states: list[dict[str, Any]] = []  # of workers with datasets of their own
        self._has_ended = False
        self._has_begun = self._is_outlined = False
        self._empty: Any = None
        # Lanes count from where they begin, since that is all they know of what was before.
        self._num_steps = place.position
        own = place if lanes is None else EpochPosition(place.epoch, 0)
        count = self._share.num_local if self._is_dealt else 1
        self._feed = Fetcher(shared.node, own, self._prefetch, count, self._skips)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        self._check_context("next(iterator)")
        return self._turn.take(self._advance)

    def get_next_as_optional(self) -> DistributedOptional:
        """Return the next batch, or at the end, and ever after it, an object without one."""
        self._check_context("get_next_as_optional")
        try:
            return DistributedOptional(self._turn.take(self._advance))
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
        return self._turn.take(self._spec)

    def _spec(self) -> Any:
        try:
            # What a live source has given to another cursor, this one would never see.
            fresh = Cursor(self._node, self._feed.place.epoch)
            first = fresh.peek() if self._is_resumable else self._feed.peek()
        except StopIteration:
            raise DatasetError("element_spec: the dataset is empty; nothing tells") from None
        leaves, spec = flatten(first)
        held = [np.asarray(leaf) for leaf in leaves]
        count = self._share.num_local
        return spec.unflatten(
            self._dealer.together([Spec((None, *a.shape[1:]) if a.ndim else (), a.dtype)] * count)
            for a in held
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the position, as a small dict that JSON can hold; the same on every worker.

        It fits every iterator over a dataset built alike, on any number of replicas and workers.
        Two exceptions: where workers have datasets of their own
        (``distribute_datasets_from_function``), or each reads everything (``"off"``), it fits as
        many workers.
        """
        if not self._is_resumable:
            return self._state()  # which says why not, and waits for nobody
        return self._turn.take(self._state)

    def _state(self) -> dict[str, Any]:
        if self._is_dealt and self._share.num_workers > 1:
            return write_workers_state(self._node, self._place.epoch, self._states)
        return self._own_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; the next ``iter()`` of the dataset is the epoch after it.

        Datasets without random access (``from_iterable``, ``filter``) are replayed from their
        start by the next ``next()``. Every worker loads the same state.

        Raises
        ------
        DatasetError
            It is not a state, or that of another pipeline. Nothing has changed.
        """
        self._check_open("load_state_dict")
        self._turn.take(functools.partial(self._load, state))

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
        place, lanes = saved.place, saved.lanes
        shared = self._by_policy
        if lanes is not None:
            shared = sharding.by_files(self._node, share, lanes, "as when the state was saved")
        elif place.position and shared.policy is AutoShardPolicy.FILE:
            shared = sharding.by_elements(self._node, share, "as when the state was saved")
        self._feed.close()
        self._begin(shared, place, lanes)
        self._states = states
        self._element = saved.element
        self._on_load(place.epoch)

    def close(self) -> None:
        """Let go of the source; may be called twice.

        Another thread that waits for an element gets a :class:`DatasetError` instead.
        """
        self._is_closed = True
        self._feed.stop()
        self._turn.end(self._feed.close, self._feed.stop)
        self._feed.wait()

    def stats(self) -> InputStats:
        """Return what fetching has cost since the iterator was made."""
        return self._clock.stats(self._feed.ahead, self._feed.depth, self._skips)

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
            f"epoch={self._place.epoch}, position={self._place.position}{closed})"
        )

    @property
    def _place(self) -> EpochPosition:
        place = self._feed.place
        return place if self._lanes is None else EpochPosition(place.epoch, self._num_steps)

    @property
    def _state_node(self) -> Node:
        """The pipeline that a position belongs to: who reads everything has one of its own."""
        is_off = self._by_policy.policy is AutoShardPolicy.OFF
        return self._by_policy.node if is_off else self._node

    def _outline(self, element: Any) -> None:
        """Note what the elements are, which a saved state may know already."""
        found = kinds_of(element)
        check_same("element", found, self._element)
        self._element, self._is_outlined = found, True

    @property
    def _fingerprint(self) -> str | None:
        return fingerprint(self._node) if self._takes_fingerprint else None

    def _own_state(self) -> dict[str, Any]:
        return write_state(
            self._state_node, self._place, self._lanes, self._element, self._fingerprint
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
            if self._shared.needs_agreement:
                elements, nest = self._advance_together()
                self._clock.count(began, elements)
                return nest
            elements = self._feed.take()
            if not self._is_outlined:
                self._outline(elements[0])
            nest = self._dealer.deal(elements, self._clock)
            self._clock.count(began, elements)
            self._feed.confirm()  # last, so that an interrupt of what comes before loses no batch
            return nest
        finally:
            if self._is_closed:  # meanwhile, by a thread that may not have waited for this one
                self._feed.close()

    def _agree_on_start(self) -> None:
        """Make sure that all workers are about to read the same."""
        if self._share.num_workers > 1:
            place = self._place
            own = StartReport((), None, place.epoch, 0)
            if not self._is_dealt:
                own = StartReport(
                    self._node.pipeline, self._node.length, *place[:2], self._fingerprint
                )
            agree_on_start(self._exchange, own)
        self._has_begun = True

    def _advance_together(self) -> tuple[list[Any], Any]:
        """Take a step with all workers, or end with all of them."""
        if self._has_ended:
            raise StopIteration
        before = self._feed.place
        try:
            return self._take_step()
        except StopIteration:
            raise
        except BaseException:
            # What a live source gave has not been confirmed, and comes again by itself.
            if self._is_resumable:
                self._feed.move_to(before)
            self._has_begun = False  # all try again, and compare first where they are
            raise

    def _take_step(self) -> tuple[list[Any], Any]:
        try:
            elements, nest = self._take_own()
        except Exception as error:
            report(self._exchange, error)
            raise
        own = StepReport(self._feed.place.epoch, 0, bool(elements), self._progress(), self._empty)
        if self._lanes is not None:
            own = own._replace(step=self._num_steps)
        words = agree(self._exchange, own)
        have = [word.has_batch for word in words]
        if not any(have) or (self._shared.ends_with_first and not all(have)):
            self._has_ended = True
            raise StopIteration
        self._note(words)
        if not elements:
            return elements, self._dealer.deal_empty(self._empty, self._clock)
        if not self._is_resumable:
            self._feed.confirm()
        return elements, nest

    def _take_own(self) -> tuple[list[Any], Any]:
        """Return what this worker has for the step, and its parts; nothing at its end."""
        try:
            elements = self._feed.take()
        except StopIteration:
            return [], None
        if not self._is_outlined:
            self._outline(elements[0])
        nest = self._dealer.deal(elements, self._clock)
        if self._empty is None:
            self._empty = self._dealer.empty(elements[0])
        if self._is_resumable:
            self._feed.confirm()  # since others are told where that leads to
        return elements, nest

    def _progress(self) -> Any:
        if self._is_dealt:
            with contextlib.suppress(DatasetError):  # only who asks for a state needs one
                return self._own_state()
            return None
        if self._lanes is None:
            return None
        own, memory = self._shared.own_lanes, self._feed.place.memory
        positions = memory[-1][2] if memory else [self._lanes[lane] for lane in own]
        return dict(zip(own, positions, strict=True))

    def _note(self, words: list[StepReport]) -> None:
        """Keep how far all workers are."""
        if self._empty is None:
            self._empty = next((word.empty for word in words if word.empty is not None), None)
        if self._element is None and self._empty is not None:
            self._outline(self._empty)
        if self._is_dealt:
            self._states = [word.progress for word in words]
        elif self._lanes is not None:
            self._num_steps += 1
            for word in words:
                for lane, position in word.progress.items():
                    self._lanes[lane] = position
