"""Replica of a step that JAX traces: its collectives are those of XLA, its identity is traced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, final

import numpy as np

from dvkernels import pytree, reduce_op
from dvkernels.communicators.jax import lowering
from dvkernels.devices import interop, jax_arrays, jax_keys
from dvkernels.errors import BufferMismatchError, ContextError
from dvkernels.reduce_op import ReduceOp, Reduction
from dvkernels.replica_context import ReplicaContext
from dvkernels.replicas.collective_call import CollectiveCall
from dvkernels.replicas.rendezvous import Rendezvous
from dvkernels.values.distributed import DistributedValues, Mirrored
from dvkernels.values.handle import Handle
from dvkernels.values.operands import as_array
from dvkernels.values.placement import Placement
from dvkernels.values.random_draws import check_key_name
from dvkernels.values.regroup import check_fits, is_variable
from dvkernels.values.scalar_checks import is_integer
from dvkernels.variables.traced_state import TracedState

__all__: list[str] = []

_UNCOMPILED = "or run the function itself, uncompiled: strategy.run(fn, args)"


@final
class TracedReplica(ReplicaContext):
    """Replica context in a function of ``strategy.jit``, which is traced once for all replicas."""

    __slots__ = ("trace",)

    def __init__(self, placement: Placement, strategy: Any, trace: TracedState) -> None:
        super().__init__(placement, Rendezvous(1), 0, strategy)
        self.trace = trace

    @property
    def replica_id_in_sync_group(self) -> Any:
        """The id of the replica, a traced int32: no branch of Python can depend on it."""
        return lowering.replica_id()

    @property
    def rank_in_process(self) -> NoReturn:
        """Raise: the program is the same for all replicas."""
        self._refuse("rank_in_process", "use replica_id_in_sync_group")

    @property
    def device(self) -> NoReturn:
        """Raise: the program is the same on all devices."""
        self._refuse("device", "the program runs on all of them; use strategy.worker_devices")

    def __repr__(self) -> str:
        return f"<each replica of {self.placement.name}, traced>"

    def own(self, value: Any) -> Any:
        """Return the value of a variable in this replica; other values as they are."""
        if not isinstance(value, DistributedValues):
            return value
        check_fits(value, self.placement)
        if is_variable(value):
            variable: Any = value
            return variable.read_value()
        if isinstance(value, Mirrored):
            return value.values[0]
        self._refuse("a PerReplica of another place", "pass it to run as an argument")

    def rng(self, name: str = "") -> NoReturn:
        """Raise: the draws of NumPy would be constants of the program."""
        self._refuse("rng", "its draws would be constants; use rng_key(name) and jax.random")

    def rng_key(self, name: str = "") -> Any:
        """Return the key of this replica for this step: that of the function uncompiled."""
        check_key_name(name)
        seed = self.strategy.generators.seed
        return jax_keys.replica_key(seed, name, self.trace.step(), lowering.replica_id())

    # -- collectives ------------------------------------------------------------------------------

    def all_reduce(
        self,
        op: Reduction | str,
        value: Any,
        *,
        weight: Any = None,
        out: Any = None,
        shared: bool = False,
    ) -> Any:
        """Reduce ``value`` over the replicas; with a weight, which may be traced, the mean."""
        reduction = reduce_op.parse(op)
        if out is not None:
            raise BufferMismatchError(
                "all_reduce: a compiled step writes no arrays; take the result, without out"
            )
        if weight is None:
            return self._map("all_reduce", value, lowering.all_reduce, reduction)
        if reduction is not ReduceOp.MEAN:
            raise ValueError(
                f"all_reduce: a weight belongs to MEAN, got op {reduction.name}; drop the weight"
            )
        own = self.trace.weight(self.own(weight), "all_reduce", reduction)
        return self._map(
            "all_reduce", value, lambda x, _: lowering.weighted_mean(x, own), reduction
        )

    def all_reduce_async(self, op: Reduction | str, value: Any) -> Handle:
        """Reduce ``value``; XLA decides what it computes meanwhile."""
        result = self.all_reduce(op, value)
        return Handle(lambda: True, lambda: result)

    def reduce_scatter(self, op: Reduction | str, value: Any) -> Any:
        """Reduce ``value``; each replica gets a part of the same length."""
        count = self.num_replicas_in_sync

        def scattered(array: Any, reduction: Any) -> Any:
            if array.ndim == 0 or array.shape[0] % count:
                raise BufferMismatchError(
                    f"reduce_scatter of shape {array.shape} over {count} replicas: a compiled step "
                    f"has parts of one length; pad axis 0 to a multiple of {count}, {_UNCOMPILED}"
                )
            return lowering.reduce_scatter(array, reduction)

        return self._map("reduce_scatter", value, scattered, reduce_op.parse(op))

    def all_gather(self, value: Any, axis: int = 0) -> Any:
        """Concatenate the replicas' values, which have one shape."""
        if not is_integer(axis):
            raise ValueError(f"all_gather: axis must be an integer, got {axis!r}")

        def gathered(array: Any, _: Any) -> Any:
            stacked = array.reshape(1) if array.ndim == 0 else array
            if not -stacked.ndim <= axis < stacked.ndim:
                raise ValueError(f"all_gather: axis {axis} is out of range for {stacked.shape}")
            return lowering.all_gather(stacked, axis % stacked.ndim)

        return self._map("all_gather", value, gathered, None)

    def broadcast(self, value: Any, root: int = 0) -> Any:
        """Send the value of replica ``root`` to every replica."""
        count = self.num_replicas_in_sync
        if not is_integer(root) or not 0 <= root < count:
            raise ValueError(
                f"broadcast: root must be a replica id from 0 to {count - 1}, got {root!r}"
            )
        return self._map("broadcast", value, lambda x, _: lowering.broadcast(x, int(root)), None)

    def barrier(self) -> None:
        """Do nothing: a program has no moment at which a replica could wait."""

    def merge_call(
        self,
        fn: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> NoReturn:
        """Raise: a program has no moment at which all replicas wait."""
        self._refuse("merge_call", "use all_reduce, all_gather or broadcast")

    def meet(self, call: CollectiveCall) -> NoReturn:
        """Raise: a program has no moment at which all replicas meet."""
        remedy = "create variables before the step, in strategy.scope()"
        if not call.verb.startswith("Variable"):
            remedy = "use the collectives of the replica context"
        self._refuse(call.verb, remedy)

    def _map(
        self, verb: str, value: Any, collective: Callable[[Any, Any], Any], op: Reduction | None
    ) -> Any:
        def reduced(leaf: Any) -> Any:
            own = self.own(leaf)
            array = own if interop.is_of_jax(own) else as_array(own, verb, 0)
            if op is not None:
                kept = self.placement.memory.kept_dtype(np.dtype(array.dtype))
                reduce_op.check_dtype(verb, op, kept)
            return collective(jax_arrays.unshared_array(array), op)

        leaves, structure = pytree.flatten(value)
        return pytree.unflatten(structure, [reduced(leaf) for leaf in leaves])

    def _refuse(self, what: str, remedy: str) -> NoReturn:
        raise ContextError(f"{what} in a step that JAX compiles: {remedy}, {_UNCOMPILED}")
