"""Map over items: one function, applied to each item by whichever replica is free."""

from __future__ import annotations

import contextvars
import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

from dvkernels import context
from dvkernels.context import Frame
from dvkernels.data.distributed.dataset import DistributedDataset
from dvkernels.data.distributed.iterator import DistributedIterator
from dvkernels.devices import array_memory
from dvkernels.errors import ContextError
from dvkernels.replica_context import ReplicaContext
from dvkernels.replicas import diagnostics
from dvkernels.replicas.item_step import ItemStep
from dvkernels.replicas.map_iterator import MapIterator
from dvkernels.replicas.runner import Runner
from dvkernels.replicas.streams import StreamedRunner
from dvkernels.replicas.task_farm import TaskFarm
from dvkernels.user_errors import brief
from dvkernels.values import function_checks
from dvkernels.values.distributed import DistributedValues
from dvkernels.values.placement import Placement
from dvkernels.values.process_bound import ProcessBound

__all__: list[str] = []

T = TypeVar("T")
R = TypeVar("R")


class ItemMap(ProcessBound):
    """Base class of strategies: their map over items."""

    _placement: Placement
    _runner: Runner | StreamedRunner

    def map(
        self, fn: Callable[[T], R], items: Iterable[T], *, ordered: bool = True
    ) -> MapIterator[R]:
        """Call ``fn`` on each item, on whichever replica is free; return an iterator of results.

        Parameters
        ----------
        fn : callable
            Called as ``fn(item)`` in the context of the replica that took the item, on a thread of
            that replica. Collectives, and writes of ON_WRITE variables, raise ``ContextError``
            there: the replicas do not meet.
        items : iterable
            Of any length, or endless. The replicas' threads advance it, one at a time, in the
            context of the caller; at most 2 N + 1 items are taken ahead of the results that the
            caller has received (N replicas in this process).
        ordered : bool
            Whether the results come in the order of the items, or as they are ready.

        Returns
        -------
        MapIterator
            An iterator of the results, with ``close()``; also a context manager. The first error,
            of ``fn`` or of ``items``, is raised in its place and ends it.

        Raises
        ------
        ContextError
            Called in replica context or in ``merge_call``, under another strategy's scope, while
            another map of this strategy is open, or after ``close``.
        TypeError
            ``fn`` is not callable, or is a coroutine or generator function; ``items`` is not
            iterable, or holds a part for each replica.
        CollectiveTimeoutError
            Another thread has been running a step of this strategy for too long.

        Notes
        -----
        The replicas begin at once, and go on while the caller works on the results. Replica 0 is
        the caller's thread, which works on items while it waits for a result, if ``items`` has a
        length and is on the host; other iterables may block it, so replica 0 has a thread then, as
        the others have. Until the
        last result or an error has been received, or ``close`` was called, or the iterator was
        dropped, the map is open: ``run``, ``reduce``, ``gather``, a second map, and writes of
        variables in cross-replica context raise ``ContextError``. Afterwards they wait for the
        calls of ``fn`` that still run.

        An error is raised unchanged, with a note of the item's index; only a ``StopIteration``
        becomes the cause of a ``RuntimeError``. Ctrl-C while the caller waits, or works on
        an item, ends the map at once.

        Over several workers each maps the items that it was given, with its own replicas; nothing
        is communicated. On GPUs, the caller's work on a result is to be queued before the next
        result is asked for, if the result is dropped then.

        Examples
        --------
        >>> import dvkernels as dv
        >>> with dv.MirroredStrategy(2) as strategy:
        ...     print(list(strategy.map(lambda x: x * x, range(5))))
        [0, 1, 4, 9, 16]
        """
        placement = self._placement
        frame = context.require_cross_replica(placement, "map", True)
        if frame is not None and frame.merging:
            raise ContextError(
                "map was called in merge_call, while the replicas wait for it; call it outside of "
                "run"
            )
        function_checks.check("map", fn)
        if not isinstance(ordered, bool):
            raise TypeError(f"map: ordered is True or False, got {brief(ordered)}")
        if isinstance(items, (DistributedValues, DistributedDataset, DistributedIterator)):
            raise TypeError(
                f"map expected items of which one replica each takes one, got a "
                f"{type(items).__name__}, which has a part for each replica; use run, or pass "
                f"strategy.local_results(...), the dataset itself, or an array"
            )
        try:
            source = iter(items)
        except TypeError as error:
            raise TypeError(
                f"map expected an iterable of items, got {brief(items)}, a {type(items).__name__}"
            ) from error
        steps = [ItemStep() for _ in range(placement.num_local)]
        farm = TaskFarm(
            fn,
            source,
            steps,
            [self._replica_variables(step, rank) for rank, step in enumerate(steps)],
            is_ordered=ordered,
            name=f"{placement.name}, made at {diagnostics.user_line(sys._getframe())},",
            first_replica=placement.first_replica,
            step_lock=placement.step_lock,
            # The caller must not be kept from its results by items that may never come.
            has_caller=hasattr(items, "__len__") and placement.memory is array_memory.HOST,
        )
        results: MapIterator[R] = MapIterator(farm)
        try:
            self._runner.farm_out(farm)
            results.start(placement.num_local)
        except BaseException:
            farm.close("it could not be started")  # the traceback keeps the iterator
            raise
        return results

    def _replica_variables(self, step: ItemStep, rank: int) -> contextvars.Context:
        """Return the caller's context variables, with the frame of one replica."""
        placement = self._placement
        variables = contextvars.copy_context()
        here = ReplicaContext(placement, step, rank, self)
        variables.run(context.enter, Frame(placement, self, here))
        return variables
