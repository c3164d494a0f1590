"""Cross-replica context: the verbs of a strategy outside ``run``, on one value per replica."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dvkernels import context, pytree, verbs
from dvkernels.devices import array_memory, registry
from dvkernels.devices.array_spec import Array
from dvkernels.devices.device import Device
from dvkernels.reduce_op import Reduction
from dvkernels.user_errors import brief
from dvkernels.values import operands, regroup
from dvkernels.values.distributed import DistributedValues, Mirrored
from dvkernels.values.placement import Placement
from dvkernels.values.process_bound import ProcessBound

__all__: list[str] = []


class CrossReplica(ProcessBound):
    """Base class of strategies: their collectives on one value per replica."""

    _placement: Placement

    def reduce(
        self, op: Reduction | str, value: Any, axis: int | Sequence[int] | None = None
    ) -> Any:
        """Reduce one value per replica to one array.

        Parameters
        ----------
        op : ReduceOp, CustomReduction or str
            The reduction, or its name.
        value : PerReplica, Mirrored or Variable, or a pytree of them
            Arrays of one shape and one dtype that ``op`` supports; with ``axis``, lengths along
            it may differ. A variable counts as one value per replica. Unchanged.
        axis : int or list of int, optional
            Also reduce each replica's elements along these axes. MEAN is then weighted by their
            number, so uneven batches give the mean of all examples; sums and products of bool and
            of integers narrower than 64 bits have NumPy's wider dtype.

        Returns
        -------
        array, or a pytree of them
            The reduction: a new array that the caller owns.

        Raises
        ------
        ValueError
            ``value`` is not distributed, an axis is out of range, or MEAN, MIN or MAX along
            ``axis`` has no elements.
        ContextError
            Called in replica context or under another strategy's scope, or ``value`` belongs to
            another strategy.
        BufferMismatchError, NotABufferError, UnsupportedDTypeError, ReduceOpError, TypeError
            The replicas' shapes or dtypes differ, are not reducible, or ``op`` or ``axis`` is
            malformed. ``value`` is unchanged.

        Examples
        --------
        >>> import dvkernels as dv
        >>> losses = dv.PerReplica([[1.0, 2.0, 3.0], [4.0]])
        >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        ...     print(strategy.reduce("mean", losses, axis=0))
        2.5
        """
        context.require_cross_replica(self._placement, "reduce", True)
        return verbs.reduce(self._placement, op, value, axis)

    def gather(self, value: Any, axis: int = 0) -> Any:
        """Concatenate one value per replica along ``axis``, in replica order.

        Parameters
        ----------
        value : PerReplica, Mirrored or Variable, or a pytree of them
            Arrays of one dtype and one shape, except for the lengths along ``axis``. Scalars are
            stacked. Strings of fixed width get the widest width. Unchanged.
        axis : int
            The axis of concatenation; a negative axis counts from the end.

        Returns
        -------
        array, or a pytree of them
            The concatenation: a new array that the caller owns.

        Raises
        ------
        ValueError
            ``value`` is not distributed, or ``axis`` is out of range.
        BufferMismatchError
            Dtypes, or lengths along the other axes, differ.
        ContextError
            As for :meth:`reduce`.

        Examples
        --------
        >>> import dvkernels as dv
        >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        ...     print(strategy.gather(dv.PerReplica([[1, 2], [3]])))
        [1 2 3]
        """
        context.require_cross_replica(self._placement, "gather", True)
        return verbs.gather(self._placement, value, axis)

    def local_results(self, value: Any) -> tuple[Any, ...]:
        """Return the components of a distributed value, one per replica of this process.

        Parameters
        ----------
        value : object
            A distributed value, or a pytree that contains some. A plain value, or a plain leaf,
            is repeated for each replica.

        Returns
        -------
        tuple
            One component per local replica; for a pytree, one pytree per local replica.

        Examples
        --------
        >>> import dvkernels as dv
        >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        ...     print(strategy.local_results({"loss": dv.PerReplica([0.5, 0.25])}))
        ({'loss': 0.5}, {'loss': 0.25})
        """
        return tuple(operands.components(value, "local_results", self._placement, variables=True))

    def reduce_to(self, op: Reduction | str, value: Any, destinations: Any) -> Any:
        """Reduce one value per replica, and mirror the result on the destinations.

        Parameters
        ----------
        op : ReduceOp, CustomReduction or str
            The reduction, or its name.
        value : PerReplica, Mirrored or Variable, or a pytree of them
            Arrays of one shape and dtype, as for :meth:`reduce`. Unchanged.
        destinations : Variable, DistributedValues, Device or str
            The devices of a variable or value, or one device.

        Returns
        -------
        Mirrored, or a pytree of them
            Read-only, one per destination; destinations in the same memory share one array.

        Raises
        ------
        TypeError, DeviceError
            ``destinations`` has another type, or names a device that does not exist.
        ContextError, ValueError, BufferMismatchError, UnsupportedDTypeError
            As for :meth:`reduce`.

        Examples
        --------
        >>> import dvkernels as dv
        >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        ...     print(strategy.reduce_to("sum", dv.PerReplica([1.0, 2.0]), "cpu:0"))
        Mirrored(0: array(3.))
        """
        devices = _devices_of(destinations, "reduce_to", self._placement)
        return self._mirrored(self.reduce(op, value), devices)

    def batch_reduce_to(self, op: Reduction | str, pairs: Sequence[tuple[Any, Any]]) -> list[Any]:
        """Return ``reduce_to(op, value, destinations)`` for each pair of value and destinations.

        Parameters
        ----------
        op : ReduceOp, CustomReduction or str
            One reduction for all pairs.
        pairs : sequence of (value, destinations)
            As for :meth:`reduce_to`. The destinations of all pairs are checked before the first
            value is reduced.

        Returns
        -------
        list of Mirrored, or of pytrees of them
            One result per pair, in order.

        Raises
        ------
        TypeError
            An item is not a pair. Further errors are those of :meth:`reduce_to`.
        """
        listed: list[Any] = [*pairs]
        for pair in listed:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise TypeError(
                    "batch_reduce_to needs pairs of a value and its destinations; got "
                    f"{brief(pair)}"
                )
        places = [
            _devices_of(destinations, "batch_reduce_to", self._placement)
            for _, destinations in listed
        ]
        reduced = self.reduce(op, [value for value, _ in listed])
        return [
            self._mirrored(result, devices) for result, devices in zip(reduced, places, strict=True)
        ]

    def broadcast_to(self, value: Any, destinations: Any) -> Any:
        """Mirror one value on the destinations.

        Parameters
        ----------
        value : array or number, Mirrored or Variable, or a pytree of them
            Of any shape and any dtype but object. Copied; over several workers, the value of the
            first worker is taken.
        destinations : Variable, DistributedValues, Device or str
            The devices of a variable or value, or one device.

        Returns
        -------
        Mirrored, or a pytree of them
            Read-only, one per destination; destinations in the same memory share one array.

        Raises
        ------
        ValueError
            ``value`` is a ``PerReplica``, which holds several values.
        TypeError, DeviceError
            ``destinations`` has another type, or names a device that does not exist.
        ContextError
            Called in replica context or under another strategy's scope.

        Examples
        --------
        >>> import dvkernels as dv
        >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        ...     print(strategy.broadcast_to(2.5, dv.PerReplica([0, 0])))
        Mirrored(0: array(2.5), 1: array(2.5))
        """
        context.require_cross_replica(self._placement, "broadcast_to", True)
        devices = _devices_of(destinations, "broadcast_to", self._placement)

        def broadcast_leaf(leaf: Any) -> Array:
            return verbs.broadcast_from_chief(self._placement, "broadcast_to", leaf)

        return self._mirrored(pytree.map_leaves(broadcast_leaf, value), devices)

    def _mirrored(self, tree: Any, devices: tuple[Device, ...]) -> Any:
        owner = self._placement if len(devices) == self._placement.num_local else None

        def mirror(array: Array) -> Mirrored[Any]:
            whole = array_memory.holding(array).read_only(array)
            copies = [array_memory.on_device(whole, device) for device in devices]
            return Mirrored(copies, devices=devices, owner=owner)

        return pytree.map_leaves(mirror, tree)


def _devices_of(destinations: Any, verb: str, placement: Placement) -> tuple[Device, ...]:
    if isinstance(destinations, DistributedValues):
        regroup.check_owner(destinations, placement, f"{verb}: ")
        return destinations.devices
    if isinstance(destinations, (Device, str)):
        return (registry.resolve(destinations),)
    raise TypeError(
        f"{verb}: destinations are a variable, a distributed value or a device, got a "
        f"{type(destinations).__name__}"
    )
