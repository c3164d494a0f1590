"""Values made per replica: by a function of the replica's id, or as uninitialized arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dvkernels import context, pytree, reduce_op
from dvkernels.devices import array_memory
from dvkernels.reduce_op import ReduceOp
from dvkernels.user_errors import brief
from dvkernels.values import function_checks
from dvkernels.values.distributed import PerReplica
from dvkernels.values.placement import Placement
from dvkernels.values.process_bound import ProcessBound
from dvkernels.values.scalar_checks import is_integer

__all__ = ["ValueContext"]


class ValueContext:
    """The replica for which the function of ``distribute_values_from_function`` makes a value.

    Attributes
    ----------
    replica_id_in_sync_group : int
        The id of the replica, from 0.
    num_replicas_in_sync : int
        The number of replicas, over all workers.

    Examples
    --------
    >>> import dvkernels as dv
    >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
    ...     strategy.distribute_values_from_function(
    ...         lambda context: context.num_replicas_in_sync - context.replica_id_in_sync_group
    ...     )
    PerReplica(0: 2, 1: 1)
    """

    __slots__ = ("num_replicas_in_sync", "replica_id_in_sync_group")

    def __init__(self, replica_id_in_sync_group: int, num_replicas_in_sync: int) -> None:
        self.replica_id_in_sync_group = replica_id_in_sync_group
        self.num_replicas_in_sync = num_replicas_in_sync


class PerReplicaValues(ProcessBound):
    """Base class of strategies: their methods that make one value per replica."""

    _placement: Placement

    def distribute_values_from_function(self, fn: Callable[[ValueContext], Any]) -> Any:
        """Return a ``PerReplica`` of the values that ``fn`` makes, one per replica.

        Parameters
        ----------
        fn : callable
            Called as ``fn(ctx)`` with a :class:`ValueContext`, once per replica of this process,
            in replica order, on the calling thread.

        Returns
        -------
        PerReplica, or a pytree of them
            The values as ``fn`` returned them.

        Raises
        ------
        ValueError
            ``fn`` returned different structures for different replicas.
        ContextError
            Called in replica context or under another strategy's scope.

        Examples
        --------
        >>> import dvkernels as dv
        >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        ...     print(strategy.distribute_values_from_function(
        ...         lambda ctx: ctx.replica_id_in_sync_group + 10))
        PerReplica(0: 10, 1: 11)
        """
        context.require_cross_replica(self._placement, "distribute_values_from_function")
        function_checks.check("distribute_values_from_function", fn)
        first, num_replicas = self._placement.first_replica, self._placement.num_replicas
        local = range(first, first + self._placement.num_local)
        made = [fn(ValueContext(replica, num_replicas)) for replica in local]
        flat = [pytree.flatten(result) for result in made]
        for replica, (_, structure) in zip(local, flat, strict=True):
            if structure != flat[0][1]:
                raise ValueError(
                    f"distribute_values_from_function: replica {first} got "
                    f"{pytree.describe_structure(flat[0][1])}, replica {replica} "
                    f"{pytree.describe_structure(structure)}; return the same structure for every "
                    f"replica"
                )
        columns = zip(*(leaves for leaves, _ in flat), strict=True)
        return pytree.unflatten(flat[0][1], [self._per_replica(column) for column in columns])

    def empty(self, shape: int | Sequence[int], dtype: Any = np.float64) -> PerReplica[Any]:
        """Return a ``PerReplica`` of uninitialized arrays for use in every step, such as gradients.

        Where workers of one host share memory, these arrays lie in symmetric memory: collectives
        in place reduce them where they lie, with all threads of the workers. Other arrays are
        staged through shared memory by one thread per worker.

        Parameters
        ----------
        shape : int or sequence of int
            The shape of each array.
        dtype : dtype
            A numeric dtype or bool; not object.

        Returns
        -------
        PerReplica
            One array of this shape and dtype on the device of each replica of this process, with
            arbitrary content.

        Raises
        ------
        ValueError, TypeError, UnsupportedDTypeError
            The shape is malformed, or the dtype cannot be reduced.
        ContextError
            Called in replica context or under another strategy's scope.
        CollectiveMismatchError
            Over several workers: their calls differ.
        DeviceError
            Over several workers of one host: the host has too little shared memory. Raised on
            all of them; nothing has been allocated.

        Notes
        -----
        Over several workers all must make the same calls in the same order. The memory of an array
        is reused once the arrays of all workers have been dropped. For a reduction in place every
        worker must pass arrays of the same ``empty``, or the same slices of them. A process forked
        from a worker shares the worker's arrays; it gets no copies.

        Examples
        --------
        >>> import dvkernels as dv
        >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        ...     gradients = strategy.empty(3, "float32")
        ...     def step(own):
        ...         own[:] = dv.get_replica_context().replica_id_in_sync_group
        ...         return dv.get_replica_context().all_reduce("mean", own, out=own)
        ...     print(strategy.run(step, args=(gradients,))[0])
        [0.5 0.5 0.5]
        """
        context.require_cross_replica(self._placement, "empty")
        kind = np.dtype(dtype)
        reduce_op.check_dtype("empty", ReduceOp.MAX if kind.kind == "b" else ReduceOp.SUM, kind)
        extents = _extents(shape)
        placement = self._placement
        is_of_host = placement.memory is array_memory.HOST
        made = placement.workers.empty(extents, kind, placement.num_local if is_of_host else 0)
        if not is_of_host:
            content = np.broadcast_to(np.zeros((), kind), extents)
            made = [placement.memory.new(content, device) for device in placement.replica_devices]
        return self._per_replica(made)

    def _per_replica(self, values: Sequence[Any]) -> PerReplica[Any]:
        return PerReplica(values, devices=self._placement.replica_devices, owner=self._placement)


def _extents(shape: Any) -> tuple[int, ...]:
    """Return a shape as a tuple; a malformed shape raises."""
    extents = (shape,) if is_integer(shape) else shape
    if not isinstance(extents, (list, tuple)) or not all(map(is_integer, extents)):
        raise TypeError(f"empty: shape must be an integer or a list of them, got {brief(shape)}")
    if any(extent < 0 for extent in extents):
        raise ValueError(f"empty: lengths must not be negative, got shape {brief(shape)}")
    return tuple(map(int, extents))
