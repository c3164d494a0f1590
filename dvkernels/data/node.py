"""The node: one source or one transform of a dataset, and what all of them offer.

A dataset is a chain of nodes. A node with random access computes element ``index`` of an epoch
from the two numbers alone, so its position is its whole state. A sequential node can only be
gone through from its start; to come back to a place in it, what lies before is replayed.

Where a source cannot be replayed (it has a state of its own, or is live), each iterator goes
through a copy of the chain, whose nodes remember where they are: see :meth:`Node.own_chain`.
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
from dvkernels.data.array_nest import leading_length, slice_rows
from dvkernels.data.error_policy import skipping
from dvkernels.data.resume_points import ResumePoints
from dvkernels.data.stacking import Stack
from dvkernels.errors import DatasetError

__all__ = ["Cut", "EmptyRunError", "Indices", "Length", "Node", "add_note", "callable_name"]

# math.inf for an endless node, None where it is not known before the end is reached.
Length = int | float | None
Indices = np.ndarray[Any, np.dtype[np.int64]]
# Of a batch of so many rows, those from one number to another.
Cut = Callable[[int], tuple[int, int]]


# How many elements a fingerprint reads of a source.
_MAX_SAMPLES = 4096
_MAX_SEQUENTIAL_SAMPLES = 256


class EmptyRunError(Exception):
    """All elements of a batch were left out, so that there is no batch."""


class Node(abc.ABC):
    """One link of the chain; immutable, so that any number of iterators may share it."""

    length: Length
    random_access: bool
    source: Node | None = None
    is_held = False  # whether iterators must hold something of it while they go

    # Why an iterator cannot be resumed from a saved state; None where it can.
    refusal: str | None = None
    # Whether iterators need a chain of their own because of this very node.
    is_replayable = True
    # What the node remembers at the start of an epoch; None if it remembers nothing.
    first_mark: Any = None
    remembers = False
    marks: ResumePoints | None = None  # Set in the chain of one iterator only.

    @abc.abstractmethod
    def describe(self) -> str:
        """Return this link as it was written: all that the order of the elements depends on."""

    def element(self, index: int, epoch: int) -> Any:
        """Return one element; random access only."""
        raise DatasetError(f"{self.describe()} has no random access")

    def gather(self, indices: Indices, epoch: int) -> Any:
        """Return the elements of ``indices`` (one or more), stacked along a new leading axis."""
        return self._stacked(indices.tolist(), epoch)

    def batch(self, start: int, stop: int, epoch: int) -> Any:
        """Return the elements ``start`` to ``stop`` (one or more), stacked likewise."""
        return self._stacked(range(start, stop), epoch)

    def _stacked(self, indices: Sequence[int], epoch: int) -> Any:
        batch = Stack(len(indices))
        for element in self.elements(indices, epoch):
            batch.add(element)
        if not batch.count:
            raise EmptyRunError(f"every element of a run of {self!r} failed")
        return batch.finished()

    def part(self, index: int, epoch: int, cut: Cut) -> Any:
        """Return the rows that ``cut`` says of an element that is a batch."""
        batch = self.element(index, epoch)
        return slice_rows(batch, *cut(leading_length(batch)))

    def elements(self, indices: Sequence[int], epoch: int) -> Iterator[Any]:
        """Yield elements one by one; those that fail are left out where they may be."""
        if skipping.get() is None:
            return (self.element(index, epoch) for index in indices)
        return (element for _, element in self.attempts(indices, epoch))

    def attempts(self, indices: Iterable[int], epoch: int) -> Iterator[tuple[int, Any]]:
        """Yield each index and its element; those that fail are left out where they may be."""
        skips = skipping.get()
        for index in indices:
            try:
                element = self.element(index, epoch)
            except EmptyRunError:
                continue  # each element of it has been noted
            except DatasetError:
                raise
            except Exception as error:
                if skips is None:
                    raise
                skips.note(error, f"element {index} of {self!r} (epoch {epoch})")
                continue
            yield index, element

    def places(self, epoch: int, start: int) -> Iterator[tuple[int, Any]]:
        """Yield each element from a place on, and the place behind it, errors as above."""
        if self.random_access:
            length = math.inf if self.length is None else self.length
            rest = itertools.takewhile(lambda index: index < length, itertools.count(start))
            for index, element in self.attempts(rest, epoch):
                yield index + 1, element
        else:
            yield from enumerate(self.iterate(epoch, start), start + 1)

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Go through an epoch, leaving out its first ``start`` elements."""
        index = start
        while self.length is None or index < self.length:
            yield self.element(index, epoch)
            index += 1

    def sample(self) -> Iterator[Any]:
        """Yield what tells the data of a source from others, for a fingerprint: some elements."""
        if self.random_access and self.length is not None:
            count = int(self.length)
            step = max(1, (count - 1) / (_MAX_SAMPLES - 1))
            chosen = dict.fromkeys(round(k * step) for k in range(min(count, _MAX_SAMPLES)))
            return (self.element(index, 0) for index in chosen)
        return itertools.islice(self.own_chain().iterate(0), _MAX_SEQUENTIAL_SAMPLES)

    def links(self) -> Iterator[Node]:
        """Yield this node and all before it."""
        yield self
        for node in self.sources:
            yield from node.links()

    def hold(self) -> object:
        """Return what an iterator must hold while it goes, where ``is_held``."""
        return None

    def stop(self) -> None:  # noqa: B027 - most nodes never wait
        """End a wait of another thread in :meth:`iterate`: the iterator is being closed."""

    def origin(self, index: int, epoch: int) -> int | None:
        """Return the index at the root source of an element, None where it has no single one."""
        return None

    @property
    def owns_elements(self) -> bool:
        """Whether what it gives stays as it is, whatever user code does with its own memory.

        Else an element may change as soon as the next one is pulled: who holds it copies it.
        """
        return bool(self.sources) and all(node.owns_elements for node in self.sources)

    @property
    def sources(self) -> tuple[Node, ...]:
        """The nodes that this one takes its elements from."""
        return () if self.source is None else (self.source,)

    @functools.cached_property
    def needs_own_chain(self) -> bool:
        """Whether a position alone is not enough to come back to it."""
        return not self.is_replayable or any(node.needs_own_chain for node in self.sources)

    @functools.cached_property
    def why_not_resumed(self) -> str | None:
        """Why no state of an iterator can be saved or loaded; None where it can."""
        reasons = (self.refusal, *(node.why_not_resumed for node in self.sources))
        return next((reason for reason in reasons if reason is not None), None)

    def onto(self, old: Node, new: Node) -> Node:
        """Return the chain up to here with ``new`` in the place of ``old``, a link of it.

        Only for links that have as many elements as their source, or an unknown number.
        """
        if self is old:
            return new
        assert self.source is not None
        twin = copy.copy(self)
        twin.source = self.source.onto(old, new)
        twin.random_access = self.random_access and twin.source.random_access
        twin.length = twin.source.length if self.length == self.source.length else None
        for name in ("pipeline", "needs_own_chain", "why_not_resumed"):
            vars(twin).pop(name, None)  # what was found for the other chain
        return twin

    def own_chain(self) -> Self:
        """Return a copy of the chain up to here for one iterator, whose nodes may remember."""
        if not self.needs_own_chain:
            return self
        twin = copy.copy(self)
        if self.source is not None:
            twin.source = self.source.own_chain()
        if self.remembers:
            twin.marks = ResumePoints(self.first_mark)
        return twin

    def upstream(self, epoch: int, position: int) -> tuple[int, int]:
        """Return (epoch, position) in the source from which this one's ``position`` is made."""
        return epoch, position

    def release(self, epoch: int, position: int) -> list[Any]:
        """Note that all before ``position`` has been delivered; return what it takes to go on.

        One entry for each node that remembers, this one first; JSON can hold them.
        """
        memory = [] if self.marks is None else [self.marks.release(epoch, position)]
        if remembering := self._sources_that_remember():
            place = self.upstream(epoch, position)
            memory += [entry for node in remembering for entry in node.release(*place)]
        return memory

    def restore(self, memory: Iterator[Any]) -> None:
        """Take the own entries of what :meth:`release` returned."""
        if self.marks is not None:
            self.marks.restore(next(memory, None))
        for node in self._sources_that_remember():
            node.restore(memory)

    def _sources_that_remember(self) -> list[Node]:
        # One side of a zip may be replayed while another is not: it has no marks to ask.
        return [node for node in self.sources if node.needs_own_chain]

    @functools.cached_property
    def pipeline(self) -> tuple[str, ...]:
        """The descriptions of all links, from the source to this one."""
        upstream = self.source.pipeline if self.source is not None else ()
        return (*upstream, self.describe())

    def __repr__(self) -> str:
        return ".".join(self.pipeline)


def callable_name(function: Callable[..., Any]) -> str:
    """Return a name that is the same in every run, which a ``repr`` with an address is not."""
    name = getattr(function, "__qualname__", None)
    return name if isinstance(name, str) else type(function).__qualname__


def add_note(error: Exception, verb: str, node: Node, index: int, epoch: int) -> None:
    """Say on an error of user code where it happened; the caller re-raises it as it is.

    A ``StopIteration`` would end the epoch without a word, so it becomes a ``RuntimeError``.
    """
    origin = node.origin(index, epoch) if node.random_access else None
    where = "" if origin is None or node.source is None else f", index {origin} of the source"
    note = f"dvkernels: {verb} failed at element {index} of {node!r} (epoch {epoch}{where})"
    if isinstance(error, StopIteration):
        fault = RuntimeError(f"{verb} raised StopIteration; return or raise something else")
        user_errors.annotate(fault, note)
        raise fault from error
    user_errors.annotate(error, note)
