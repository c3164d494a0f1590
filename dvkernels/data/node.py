"""Base class of the nodes of a pipeline: a source or a transform of a dataset.

A dataset is a chain of nodes. A node with random access computes element ``index`` of an epoch
from (epoch, index) alone, so its position is its whole state. A sequential node can only be
iterated from its start; a position in it is reached by replaying the elements before it.

Where a source cannot be replayed (a stateful or a live source), each iterator works on its own
copy of the chain, whose nodes keep resume points: see :meth:`Node.own_chain`.
"""

from __future__ import annotations

import abc
import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import numpy as np

from dvkernels import user_errors
from dvkernels.data.array_nest import Element, leading_length, slice_rows
from dvkernels.data.buffer_pool import BufferPool
from dvkernels.data.error_policy import skipping
from dvkernels.data.resume_points import ResumePoints
from dvkernels.data.stacking import stack
from dvkernels.errors import DatasetError

__all__: list[str] = []

# math.inf for an endless node, None where the length is unknown until the end is reached.
Length = int | float | None
Indices = np.ndarray[Any, np.dtype[np.int64]]
# Maps the number of rows of a batch to the range (start, stop) of the rows to keep.
RowSelector = Callable[[int], tuple[int, int]]


# The most elements of a source that a fingerprint reads.
_MAX_SAMPLES = 4096
_MAX_SEQUENTIAL_SAMPLES = 256


class EmptyBatchError(Exception):
    """All elements of a batch were skipped, so there is no batch."""


class Node(abc.ABC):
    """One link of a pipeline; immutable, so any number of iterators may share it."""

    length: Length
    random_access: bool
    source: Node | None = None

    # Why this node keeps an iterator from being resumed from a saved state; None if it does not.
    refusal: str | None = None
    # False if each iterator needs a chain of its own because of this node.
    is_replayable = True
    # The value of the resume point at the start of an epoch.
    initial_resume_value: Any = None
    has_resume_points = False
    resume_points: ResumePoints | None = None  # Set only in the own chain of an iterator.

    @abc.abstractmethod
    def describe(self) -> str:
        """Return this link as the user wrote it: all that the order of the elements depends on."""

    def element(self, index: int, epoch: int) -> Element:
        """Return one element; random access only."""
        raise DatasetError(f"{self.describe()} has no random access")

    def gather(self, indices: Indices, epoch: int) -> Element:
        """Return the elements at ``indices``, stacked along a new leading axis.

        ``indices`` has shape (n,) with n >= 1, int64.
        """
        return self._stacked(indices.tolist(), epoch)

    def batch(self, start: int, stop: int, epoch: int) -> Element:
        """Return the elements ``start`` to ``stop`` (one or more), stacked as by `gather`."""
        return self._stacked(range(start, stop), epoch)

    def _stacked(self, indices: Sequence[int], epoch: int) -> Element:
        pools: list[BufferPool] = vars(self).setdefault("_buffer_pools", [])  # atomic
        batch = stack(self.elements(indices, epoch), len(indices), pools)
        if batch is None:
            raise EmptyBatchError(f"every element of a batch of {self!r} failed")
        return batch

    def select_rows(self, index: int, epoch: int, select: RowSelector) -> Element:
        """Return the rows of batch ``index`` that ``select`` chooses."""
        batch = self.element(index, epoch)
        return slice_rows(batch, *select(leading_length(batch)))

    def elements(self, indices: Sequence[int], epoch: int) -> Iterator[Element]:
        """Yield the elements at ``indices``; failing elements are skipped where that is asked."""
        if skipping.get() is None:
            return (self.element(index, epoch) for index in indices)
        return (element for _, element in self.attempts(indices, epoch))

    def attempts(self, indices: Iterable[int], epoch: int) -> Iterator[tuple[int, Element]]:
        """Yield (index, element) pairs; failing elements are skipped where that is asked."""
        skips = skipping.get()
        for index in indices:
            try:
                element = self.element(index, epoch)
            except EmptyBatchError:
                continue  # each of its elements has been noted
            except DatasetError:
                raise
            except Exception as error:
                if skips is None:
                    raise
                skips.note(error, f"element {index} of {self!r} (epoch {epoch})")
                continue
            yield index, element

    def enumerate_from(self, epoch: int, start: int) -> Iterator[tuple[int, Element]]:
        """Yield (position behind the element, element) from ``start`` on, skipping as above."""
        if self.random_access:
            for index, element in self.attempts(self.positions(start), epoch):
                yield index + 1, element
        else:
            yield from enumerate(self.iterate(epoch, start), start + 1)

    def positions(self, start: int) -> Iterable[int]:
        """Return the positions of an epoch from ``start`` on; random access only."""
        assert self.length is not None
        return itertools.count(start) if self.length == math.inf else range(start, int(self.length))

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Element]:
        """Yield the elements of an epoch from ``start`` on; sequential nodes only."""
        raise DatasetError(f"{self.describe()} has random access")

    def sample(self) -> Iterator[Any]:
        """Yield elements, or other samples of the data of a source, to fingerprint."""
        if self.random_access and self.length is not None:
            count = int(self.length)
            step = max(1, (count - 1) / (_MAX_SAMPLES - 1))
            chosen = dict.fromkeys(round(k * step) for k in range(min(count, _MAX_SAMPLES)))
            return (self.element(index, 0) for index in chosen)
        return itertools.islice(self.own_chain().iterate(0), _MAX_SEQUENTIAL_SAMPLES)

    def links(self) -> Iterator[Node]:
        """Yield this node and all nodes upstream of it."""
        yield self
        for node in self.sources:
            yield from node.links()

    def hold_workers(self) -> object:
        """Return an object that keeps the workers of this node alive; None if it has none."""
        return None

    def stop(self) -> None:  # noqa: B027 - most nodes never wait
        """Wake a thread that waits in :meth:`iterate`: its iterator is being closed."""

    def origin(self, index: int, epoch: int) -> int | None:
        """Return the index at the root source of an element, None if it has no single one."""
        return None if self.sources else index

    @property
    def owns_elements(self) -> bool:
        """Whether user code cannot change an element after the node has returned it.

        If False, an element may change as soon as the next one is pulled, so whoever keeps an
        element copies it first.
        """
        return bool(self.sources) and all(node.owns_elements for node in self.sources)

    @property
    def sources(self) -> tuple[Node, ...]:
        """The nodes directly upstream, from which this one takes its elements."""
        return () if self.source is None else (self.source,)

    @functools.cached_property
    def needs_own_chain(self) -> bool:
        """Whether a position alone does not suffice to resume there."""
        return not self.is_replayable or any(node.needs_own_chain for node in self.sources)

    @functools.cached_property
    def why_not_resumable(self) -> str | None:
        """Why iterators cannot save or load a state; None if they can."""
        reasons = (self.refusal, *(node.why_not_resumable for node in self.sources))
        return next((reason for reason in reasons if reason is not None), None)

    def replace_link(self, old: Node, new: Node) -> Node:
        """Return a copy of the chain up to this node, with its link ``old`` replaced by ``new``.

        Every link behind ``old`` must have as many elements as its source, or an unknown number.
        """
        if self is old:
            return new
        assert self.source is not None
        clone = copy.copy(self)
        clone.source = self.source.replace_link(old, new)
        clone.random_access = self.random_access and clone.source.random_access
        clone.length = clone.source.length if self.length == self.source.length else None
        for name in ("pipeline", "needs_own_chain", "why_not_resumable", "interleaving"):
            vars(clone).pop(name, None)  # cached properties of the original chain
        return clone

    def own_chain(self) -> Self:
        """Return a copy of the chain up to this node for one iterator, with its resume points."""
        if not self.needs_own_chain:
            return self
        clone = copy.copy(self)
        if self.source is not None:
            clone.source = self.source.own_chain()
        if self.has_resume_points:
            clone.resume_points = ResumePoints(self.initial_resume_value)
        return clone

    def resume(self, epoch: int, position: int) -> tuple[int, Any]:
        """Return the last (position, value) from which the node can go on to ``position``."""
        if self.resume_points is None:
            return 0, self.initial_resume_value
        return self.resume_points.resume(epoch, position)

    def upstream(self, epoch: int, position: int) -> tuple[int, int]:
        """Return the (epoch, position) of the source that this node's ``position`` maps to."""
        return epoch, position

    def release(self, epoch: int, position: int) -> list[Any]:
        """Drop the resume points before ``position``; return those needed to resume there.

        The result has one JSON-serializable entry per node with resume points, this node first.
        """
        memory = [] if self.resume_points is None else [self.resume_points.release(epoch, position)]
        if stateful := self._sources_with_resume_points():
            source_position = self.upstream(epoch, position)
            memory += [entry for node in stateful for entry in node.release(*source_position)]
        return memory

    def restore(self, memory: Iterator[Any]) -> None:
        """Consume this chain's entries of what :meth:`release` returned."""
        if self.resume_points is not None:
            self.resume_points.restore(next(memory, None))
        for node in self._sources_with_resume_points():
            node.restore(memory)

    def _sources_with_resume_points(self) -> list[Node]:
        # Of two zipped sources one may be replayable and have no resume points.
        return [node for node in self.sources if node.needs_own_chain]

    @functools.cached_property
    def interleaving(self) -> tuple[int, int]:
        """The (step, first) of a numbering of elements that differs between shards.

        Element n has the number ``first + step * n``, its index where the first shard is taken.
        """
        return (1, 0) if self.source is None else self.source.interleaving

    @functools.cached_property
    def pipeline(self) -> tuple[str, ...]:
        """The descriptions of all links, from the source to this node."""
        upstream = self.source.pipeline if self.source is not None else ()
        return (*upstream, self.describe())

    def __repr__(self) -> str:
        return ".".join(self.pipeline)


def callable_name(function: Callable[..., Any]) -> str:
    """Return a name of the callable that is the same in every run, unlike its ``repr``."""
    name = getattr(function, "__qualname__", None)
    return name if isinstance(name, str) else type(function).__qualname__


def add_note(error: Exception, verb: str, node: Node, index: int, epoch: int) -> None:
    """Add a note to an error of user code that says where it happened; the caller re-raises it.

    A ``StopIteration`` would end the epoch silently, so a ``RuntimeError`` is raised instead.
    """
    origin = node.origin(index, epoch) if node.random_access else None
    where = "" if origin is None or node.source is None else f", index {origin} of the source"
    note = f"dvkernels: {verb} failed at element {index} of {node!r} (epoch {epoch}{where})"
    if isinstance(error, StopIteration):
        fault = RuntimeError(f"{verb} raised StopIteration; return or raise something else")
        user_errors.annotate(fault, note)
        raise fault from error
    user_errors.annotate(error, note)
