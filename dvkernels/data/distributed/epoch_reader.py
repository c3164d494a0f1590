"""Reader of one worker's batches of an epoch, and owner of a distributed iterator's position."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dvkernels.communicators.worker_share import WorkerShare
from dvkernels.communicators.workers.atomic_commit import Exchange
from dvkernels.data.array_nest import Element
from dvkernels.data.cursor import EpochPosition
from dvkernels.data.distributed.lockstep import (
    StartReport,
    StepReport,
    agree_on_start,
    agree_on_step,
)
from dvkernels.data.distributed.options import AutoShardPolicy, InputOptions
from dvkernels.data.distributed.sharding import Sharding, by_elements, by_files
from dvkernels.data.distributed.split import Splitter
from dvkernels.data.distributed.stats import InputStats, StatsRecorder
from dvkernels.data.fingerprint import fingerprint, kinds_of
from dvkernels.data.node import Node
from dvkernels.data.prefetch import open_cursor, prefetch_depth
from dvkernels.data.state import (
    SavedPosition,
    check_same,
    read_state,
    read_workers_state,
    write_state,
    write_workers_state,
)
from dvkernels.errors import DatasetError

__all__: list[str] = []


@dataclass(frozen=True)
class Distribution:
    """How a dataset is distributed; all its iterators share it."""

    node: Node
    sharding: Sharding
    share: WorkerShare
    splitter: Splitter
    options: InputOptions
    is_dealt: bool  # the elements are batches of single replicas, assigned to them in turn
    exchange: Exchange

    @property
    def is_resumable(self) -> bool:
        """Whether iterators can save and load a state."""
        return self.node.why_not_resumable is None

    @property
    def has_workers_state(self) -> bool:
        """Whether the state holds one of each worker, since each has a dataset of its own."""
        return self.is_dealt and self.share.num_workers > 1

    @property
    def state_node(self) -> Node:
        """The pipeline that a position refers to: under ``"off"`` the worker's own batches."""
        is_off = self.sharding.policy is AutoShardPolicy.OFF
        return self.sharding.node if is_off else self.node

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the data, if the options ask for it."""
        return fingerprint(self.node) if self.options.fingerprint else None


class EpochReader:
    """Reader of the batches of an epoch for the replicas of one worker, from a position on.

    The position is that of its cursor. Where files are sharded, it is instead the number of steps
    and the position in each lane; where workers have datasets of their own, the states of all
    workers.

    Parameters
    ----------
    distribution : Distribution
        The dataset, and the share of this worker.
    recorder : StatsRecorder
        Records batches, times and skipped elements.
    saved : SavedPosition
        Where to begin.
    states : sequence of dict
        The state of each worker, where it has been saved.
    """

    def __init__(
        self,
        distribution: Distribution,
        recorder: StatsRecorder,
        saved: SavedPosition,
        states: Sequence[Any] = (),
    ) -> None:
        node, share = distribution.node, distribution.share
        sharding, start, lanes = distribution.sharding, saved.epoch_position, saved.lanes
        self._num_steps = start.position
        if lanes is not None:
            sharding = by_files(node, share, lanes, "as when the state was saved")
        elif sharding.policy is AutoShardPolicy.FILE and start.position:
            sharding = by_elements(node, share, "as when the state was saved")
        elif sharding.policy is AutoShardPolicy.FILE:
            lanes = [0] * share.num_workers
        if lanes is not None:  # The cursor counts steps from 0: the lanes know where to begin.
            start = EpochPosition(start.epoch, 0)
        self._distribution = distribution
        self._splitter = distribution.splitter
        self._recorder = recorder
        self._sharding = sharding
        self._lanes = None if lanes is None else list(lanes)
        self._states = states
        self._element = saved.element  # the outline of the elements, once it is known
        self._is_outlined = self._has_begun = self._has_ended = False
        self._empty: Element = None  # an element without rows
        self._count = share.num_local if distribution.is_dealt else 1
        prefetch = distribution.options.prefetch
        self.cursor = open_cursor(sharding.node, start, prefetch, self._count, recorder.skips)
        self._depth = prefetch_depth(sharding.node, prefetch)

    @property
    def epoch_position(self) -> EpochPosition:
        """The position behind the batches delivered so far."""
        epoch_position = self.cursor.epoch_position
        if self._lanes is None:
            return epoch_position
        return EpochPosition(epoch_position.epoch, self._num_steps)

    def state(self) -> dict[str, Any]:
        """Return the position as a JSON-serializable dict, the same on every worker."""
        if not self._distribution.has_workers_state:
            return self._own_state()
        node, epoch = self._distribution.node, self.epoch_position.epoch
        return write_workers_state(node, epoch, self._states)

    def _own_state(self) -> dict[str, Any]:
        return write_state(
            self._distribution.state_node,
            self.epoch_position,
            self._lanes,
            self._element,
            self._distribution.fingerprint,
        )

    def moved_to(self, state: object) -> EpochReader:
        """Return another reader, at a saved position; :class:`DatasetError` if it is none."""
        distribution = self._distribution
        share, state_node = distribution.share, distribution.state_node
        states: list[dict[str, Any]] = []
        if distribution.has_workers_state:
            epoch, states = read_workers_state(distribution.node, state, share.num_workers)
            saved = SavedPosition(EpochPosition(epoch, 0))
            if states:
                saved = read_state(state_node, states[share.worker])
        else:
            saved = read_state(state_node, state)
        check_same("element", self._element, saved.element)
        if saved.fingerprint is not None:
            check_same("fingerprint", distribution.fingerprint, saved.fingerprint)
        return EpochReader(distribution, self._recorder, saved, states)

    def stats(self) -> InputStats:
        """Return the input statistics so far."""
        return self._recorder.stats(self.cursor, self._depth, self._splitter.balancer)

    def advance(self) -> Any:
        """Return the parts of the next batch, and move past it.

        If it raises, the position stays. One thread at a time may call it.
        """
        if not self._has_begun:
            self._agree_on_start()
        began = time.perf_counter()
        if self._sharding.needs_agreement:
            elements, parts = self._advance_together()
            self._recorder.count(began, elements)
            return parts
        elements, parts = self._take_own()
        self._recorder.count(began, elements)
        self.cursor.confirm()  # last, so that an interrupt before it loses no batch
        return parts

    def _take_own(self) -> tuple[list[Element], Any]:
        """Return this worker's elements for the step, and their parts."""
        elements = self.cursor.take(self._count)
        if not self._is_outlined:
            self._outline(elements[0])
        return elements, self._splitter.split(elements, self._recorder)

    def _outline(self, element: Element) -> None:
        """Record the outline of the elements; compare it with that of a loaded state."""
        found = kinds_of(element)
        check_same("element", found, self._element)
        self._element, self._is_outlined = found, True

    def _agree_on_start(self) -> None:
        """Check that all workers are about to read the same data from the same position."""
        distribution = self._distribution
        if distribution.share.num_workers > 1:
            epoch, position, _ = self.epoch_position
            own = StartReport((), None, epoch, 0)
            if not distribution.is_dealt:
                node = distribution.node
                own = StartReport(
                    node.pipeline, node.length, epoch, position, distribution.fingerprint
                )
            agree_on_start(distribution.exchange, own)
        self._has_begun = True

    def _advance_together(self) -> tuple[list[Element], Any]:
        """Take a step in lockstep with all workers, or end with all of them."""
        if self._has_ended:
            raise StopIteration
        before = self.cursor.epoch_position
        try:
            return self._take_step()
        except StopIteration:
            raise
        except BaseException:
            # The elements of a live source were not confirmed, so they are returned again.
            if self._distribution.is_resumable:
                self.cursor.move_to(before)
            self._has_begun = False  # Before the next try all workers compare their positions.
            raise

    def _take_step(self) -> tuple[list[Element], Any]:
        is_resumable = self._distribution.is_resumable
        elements: list[Element] = []
        parts = None

        def take() -> StepReport:
            nonlocal elements, parts
            with contextlib.suppress(StopIteration):
                elements, parts = self._take_own()
            if elements and self._empty is None:
                self._empty = self._splitter.empty_like(elements[0])
            if elements and is_resumable:
                self.cursor.confirm()  # The report to the other workers holds the new position.
            epoch = self.cursor.epoch_position.epoch
            step = 0 if self._lanes is None else self._num_steps
            return StepReport(epoch, step, bool(elements), self._progress(), self._empty)

        reports = agree_on_step(self._distribution.exchange, take)
        have = [report.has_batch for report in reports]
        if not any(have) or (self._sharding.ends_with_first and not all(have)):
            self._has_ended = True
            raise StopIteration
        self._record_progress(reports)
        if not elements:
            return elements, self._splitter.split_empty(self._empty, self._recorder)
        if not is_resumable:
            self.cursor.confirm()
        return elements, parts

    def _progress(self) -> Any:
        if self._distribution.is_dealt:
            with contextlib.suppress(DatasetError):  # raised only when a state is requested
                return self._own_state()
            return None
        if self._lanes is None:
            return None
        own, memory = self._sharding.own_lanes, self.cursor.epoch_position.memory
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
        if self._distribution.is_dealt:
            self._states = [report.progress for report in reports]
        elif self._lanes is not None:
            self._num_steps += 1
            for report in reports:
                for lane, position in report.progress.items():
                    self._lanes[lane] = position
