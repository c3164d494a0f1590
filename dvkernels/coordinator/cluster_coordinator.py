"""Cluster coordinator: schedules calls on the workers of a parameter-server strategy."""

from __future__ import annotations

import contextvars
import itertools
import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, final

from dvkernels import context, pytree
from dvkernels.context import Frame
from dvkernels.coordinator.closure import Closure, RemoteValue
from dvkernels.coordinator.closure_queue import ClosureQueue
from dvkernels.coordinator.coordinator_stats import CoordinatorStats, servers_of
from dvkernels.coordinator.per_worker import PerWorkerDataset, PerWorkerIterator
from dvkernels.coordinator.remote_worker import RemoteWorker, encoded
from dvkernels.coordinator.worker_thread import WorkerThread
from dvkernels.errors import ClusterError, CollectiveTimeoutError, ContextError, DatasetError
from dvkernels.replicas.thread_limits import ThreadLimit
from dvkernels.strategies.current_call import current_call
from dvkernels.strategies.parameter_server import ParameterServerStrategy
from dvkernels.threads import stoppable_thread
from dvkernels.values import function_checks
from dvkernels.values.process_bound import ProcessBound

__all__ = ["ClusterCoordinator"]


@final
class ClusterCoordinator(ProcessBound):
    """Coordinator of the workers of a parameter-server strategy: hands out calls, in order.

    Parameters
    ----------
    strategy : ParameterServerStrategy
        A second coordinator of one strategy is the first, until that is closed.

    Raises
    ------
    ClusterError
        Another strategy, whose replicas work in step: use its ``run``, or ``map``.

    Notes
    -----
    A call may read and write the variables of the strategy at any time, beside those of the other
    workers. A worker that is lost (its call raises ``WorkerLostError``) is replaced, and the call
    made again, up to four times: then its error comes out. What it had written counts twice unless
    it was scheduled with ``once=True``.

    Where the workers are threads, arguments and results are the objects themselves, of any size,
    and a call sees what is written to them meanwhile. The threads end with the coordinator: by
    ``close()``, at the end of ``with``, with the strategy, or when it is garbage-collected. It does
    not follow a fork.

    Examples
    --------
    >>> import dvkernels as dv
    >>> with dv.ParameterServerStrategy(num_workers=2) as strategy:
    ...     coordinator = dv.ClusterCoordinator(strategy)
    ...     squares = [coordinator.schedule(lambda x: x * x, (k,)) for k in range(4)]
    ...     coordinator.join()
    ...     print(coordinator.fetch(squares))
    [0, 1, 4, 9]
    """

    _bound_by = "its workers are threads of this process; make another coordinator where one is due"

    _strategy: ParameterServerStrategy
    _closures: ClosureQueue
    _workers: list[WorkerThread]
    _limit: ThreadLimit | None
    _numbers: itertools.count[int]
    _began: float

    def __new__(cls, strategy: ParameterServerStrategy) -> Self:
        """Return the coordinator of the strategy; make it if there is none."""
        if not isinstance(strategy, ParameterServerStrategy):
            raise ClusterError(
                f"a ClusterCoordinator needs a ParameterServerStrategy, got a "
                f"{type(strategy).__name__}; the replicas of other strategies work in step: use "
                f"strategy.run, or strategy.map for independent items"
            )
        found = strategy.coordinator()
        if isinstance(found, cls) and found._is_usable():
            return found
        placement = strategy.placement
        context.require_cross_replica(placement, "ClusterCoordinator")
        made = super().__new__(cls)
        made._strategy = strategy
        made._began = time.monotonic()
        made._numbers = itertools.count(strategy.generators.num_done)
        closures = made._closures = ClosureQueue(placement.name, strategy.timeout_seconds)
        made._limit = ThreadLimit(strategy.num_workers) if strategy.shares_threads else None
        if made._limit is not None:
            made._limit.apply(stacklevel=2)
        share = None if made._limit is None else made._limit.share
        count = strategy.num_workers
        owner = weakref.ref(made, lambda _: closures.close("its coordinator was dropped", count))
        frame = Frame(placement, strategy, merging=True)
        processes, living = strategy.processes, {*range(count)}
        made._workers = [
            WorkerThread(
                number,
                closures,
                frame,
                owner,
                share,
                None if processes is None else RemoteWorker(processes, number),
                living,
            )
            for number in range(count)
        ]
        stoppable_thread.start_all([worker.new_thread() for worker in made._workers])
        strategy.adopt(made)
        return made

    def schedule(
        self,
        fn: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        once: bool = False,
    ) -> RemoteValue:
        """Schedule a call; return at once, unless 1024 calls wait for a worker.

        Parameters
        ----------
        fn : callable
            Called on a worker, in the cross-replica context of the strategy; ``strategy.run`` in it
            runs a function in replica context.
        args : list or tuple
            Positional arguments.
        kwargs : dict, optional
            Keyword arguments. In both, iterators over per-worker datasets, at any depth, are
            replaced by those of the worker.
        once : bool
            Whether the writes of the call to variables take effect together when it has returned,
            and not if it raises. So they count once, though a lost worker lets it run again; and
            its own reads do not see them.

        Returns
        -------
        RemoteValue
            ``fetch()`` waits for the result.

        Raises
        ------
        Exception
            The error of an earlier call that has not come out, as it is. This call is not
            scheduled, and those behind the failed one that no worker had begun are cancelled.
        TypeError
            ``fn`` is not callable, or is a coroutine or generator function.
        ValueError
            ``args`` or ``kwargs`` have the wrong type.
        ContextError
            Called in a call, in replica context or under another strategy's scope, after ``close``,
            or in a fork; or an argument is a ``RemoteValue``.
        WorkerLostError
            The last worker, of other processes, is lost.
        CollectiveTimeoutError
            The queue is full, and no call has ended for too long.
        """
        self._check("schedule")
        function_checks.check("schedule", fn)
        function_checks.check_arguments("schedule", args, kwargs)
        named = {} if kwargs is None else dict(kwargs)
        has_workers_values, leaves = False, []
        if args or named:
            leaves = [*pytree.leaves((tuple(args), named))]
            for leaf in leaves:
                if isinstance(leaf, RemoteValue):
                    raise ContextError(
                        f"schedule: an argument is {leaf!r}, and a call does not wait for another; "
                        f"pass what its fetch() returns"
                    )
                if isinstance(leaf, PerWorkerDataset):
                    raise ContextError(
                        "schedule: an argument is a per-worker dataset; pass iter(dataset)"
                    )
                has_workers_values = has_workers_values or isinstance(leaf, PerWorkerIterator)
        closure = Closure(
            next(self._numbers),
            fn,
            tuple(args),
            named,
            bool(once),
            has_workers_values,
            contextvars.copy_context(),
        )
        if self._strategy.processes is not None:
            closure.sent, kept = encoded(
                self._strategy.processes, closure.number, closure.once, fn, args, named
            )
            # What is sent by reference must live until the call has ended.
            iterators = [leaf for leaf in leaves if isinstance(leaf, PerWorkerIterator)]
            closure.args, closure.kwargs = (*kept, *iterators), {}
        self._closures.put(closure)
        generators = self._strategy.generators  # on which the draws of a resumed program go on
        generators.num_done = max(generators.num_done, closure.number + 1)
        return RemoteValue(closure, self._wait)

    def join(self) -> None:
        """Wait until all scheduled calls have ended.

        Raises
        ------
        Exception
            The error of a call that has not come out yet, as it is; of several, the first. Each
            comes out of one ``join`` or ``schedule``. Calls behind it are cancelled.
        CollectiveTimeoutError
            No call has ended for too long; names those that run, their workers and lines. They go
            on, and so may ``join``.
        ContextError
            Called in a call, or in a fork.

        Notes
        -----
        Ctrl-C ends the wait, not the calls.
        """
        self._check("join")
        self._closures.join()

    def done(self) -> bool:
        """Return whether all scheduled calls have ended, with or without an error."""
        self._check("done")
        return self._closures.is_idle

    def fetch(self, nest: Any) -> Any:
        """Return a nest with the results of its remote values, for which it waits.

        Other values stay as they are. Errors are those of :meth:`RemoteValue.fetch`.
        """

        def fetched(value: Any) -> Any:
            return value.fetch() if isinstance(value, RemoteValue) else value

        return pytree.map_leaves(fetched, nest)

    def create_per_worker_dataset(self, dataset: Any) -> PerWorkerDataset:
        """Return a dataset of which each worker has one of its own.

        Parameters
        ----------
        dataset : callable or iterable
            A function that returns an iterable, such as a ``Dataset``; each worker calls it once
            for each ``iter``. Or such an iterable, over which every worker iterates. A worker gets
            all its elements: shuffle with a seed of its own, or shard by what the function knows.

        Returns
        -------
        PerWorkerDataset
            ``schedule(fn, args=(iter(dataset),))`` passes ``fn`` the iterator of its worker, which
            goes on from call to call. A worker that replaces a lost one begins anew.
        """
        self._check("create_per_worker_dataset")
        if callable(dataset):
            function_checks.check("create_per_worker_dataset", dataset)
            return PerWorkerDataset(dataset)
        if iter(dataset) is dataset:  # iter raises TypeError
            raise DatasetError(
                f"create_per_worker_dataset: every worker would take elements from one "
                f"{type(dataset).__name__}, which is an iterator; pass a function that makes one"
            )
        return PerWorkerDataset(lambda: dataset)

    def stats(self) -> CoordinatorStats:
        """Return how many calls wait, run and have ended, and what the servers were asked."""
        workers = self._workers
        return CoordinatorStats(
            time.monotonic() - self._began,
            self._closures.num_queued,
            len(self._closures.running),
            sum(worker.num_returned for worker in workers),
            sum(worker.num_failed for worker in workers),
            sum(worker.num_repeated for worker in workers),
            servers_of(self._strategy),
        )

    def close(self) -> None:
        """Cancel the calls that have not begun, wait for the others, and end the workers.

        Raises
        ------
        CollectiveTimeoutError
            A call has been running for too long; its thread goes on until it returns.
        """
        if current_call.get() is not None:
            self._check("close")
        closures = self._closures
        closures.close("its coordinator was closed", len(self._workers))
        if closures.pid == os.getpid():
            deadline = time.monotonic() + closures.patience()
            for worker in self._workers:
                ended = None
                while ended is not worker.threads[-1]:  # a lost one has left another
                    ended = worker.threads[-1]
                    if not ended.wait(deadline - time.monotonic()):
                        raise CollectiveTimeoutError(
                            f"close of {closures.name}: {closures.describe_running()}"
                        )
        if self._limit is not None:
            self._limit.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ClusterCoordinator of {self._closures.name}>"

    def _wait(self, closure: Closure) -> None:
        self._check("fetch")
        self._closures.wait(closure)

    def _is_usable(self) -> bool:
        return not self._closures.why_closed and self._closures.pid == os.getpid()

    def _check(self, verb: str) -> None:
        """Raise in a call of a worker, in replica context, and in a fork."""
        context.require_cross_replica(self._strategy.placement, verb)
        closures = self._closures
        if current_call.get() is not None:
            raise ContextError(
                f"{verb} of {closures.name} was called in one of its calls, on a worker, which "
                f"would wait for itself; return what is to be done next, and schedule it outside"
            )
        if closures.pid != os.getpid():
            raise ContextError(
                f"{verb} of {closures.name}: its workers are threads of the process that this one "
                f"was forked from; make a strategy and a coordinator here"
            )
