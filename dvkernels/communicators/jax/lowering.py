"""Lowering of collectives to those of XLA, inside a ``shard_map`` over the replicas.

Each function takes the traced value of one replica, and returns that of one replica. The mesh axis
is named ``AXIS``. All of them expect ``check_vma=False``: a gradient with respect to a replicated
array is then each replica's own, where JAX would sum it over the replicas by itself.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dvkernels import reduce_op
from dvkernels.custom_reduction import CustomReduction
from dvkernels.devices.jax_devices import AXIS
from dvkernels.errors import ReduceOpError
from dvkernels.reduce_op import ReduceOp, Reduction

__all__: list[str] = []


def all_reduce(value: Any, op: Reduction) -> Any:
    """Return the reduction over the replicas; half types are accumulated in float32."""
    if type(op) is CustomReduction:
        raise ReduceOpError(
            f"{op!r} is compiled by Numba and cannot be part of a program of JAX; use sum, mean, "
            f"min, max or prod, or combine the values of ctx.all_gather yourself"
        )
    dtype = value.dtype
    if op in (ReduceOp.MIN, ReduceOp.MAX):
        return _extreme(value, op)
    wide = value.astype(reduce_op.working_dtype(np.dtype(dtype)))
    if op is ReduceOp.PROD:
        total = functools.reduce(jnp.multiply, lax.all_gather(wide, AXIS))
    else:
        total = lax.psum(wide, AXIS)
    if op is ReduceOp.MEAN:
        total = total / jnp.asarray(lax.psum(1, AXIS), total.real.dtype)
    return total.astype(dtype)


def _extreme(value: Any, op: Reduction) -> Any:
    """Return the least or greatest value; NaN wherever some replica has it, as in NumPy."""
    reduce = lax.pmin if op is ReduceOp.MIN else lax.pmax
    if value.dtype == jnp.bool_:
        return reduce(value.astype(jnp.uint8), AXIS).astype(jnp.bool_)
    found = reduce(value, AXIS)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return found
    has_nan = lax.pmax(jnp.isnan(value).astype(jnp.uint8), AXIS) > 0
    return jnp.where(has_nan, jnp.asarray(jnp.nan, value.dtype), found)


def weighted_mean(value: Any, weight: Any) -> Any:
    """Return ``sum(weight * value) / sum(weight)``; a weight of 0 hides even NaN.

    Where all weights are 0 the result is NaN: a compiled program cannot raise.
    """
    dtype = value.dtype
    wide = value.astype(reduce_op.working_dtype(np.dtype(dtype)))
    weight = jnp.asarray(weight).astype(wide.real.dtype)
    share = weight / lax.psum(weight, AXIS)
    scaled = jnp.where(weight == 0, jnp.zeros_like(wide), wide * share)
    total = lax.psum(scaled, AXIS)
    return jnp.where(jnp.isnan(share), jnp.asarray(jnp.nan, total.dtype), total).astype(dtype)


def all_gather(value: Any, axis: int) -> Any:
    """Return the concatenation of the replicas' values, which have one shape."""
    if value.shape[axis] == 0:  # XLA does not gather nothing
        return value
    return lax.all_gather(value, AXIS, axis=axis, tiled=True)


def broadcast(value: Any, root: int) -> Any:
    """Return the value of one replica."""
    if value.dtype == jnp.bool_:
        return broadcast(value.astype(jnp.uint8), root).astype(jnp.bool_)
    if jnp.issubdtype(value.dtype, jnp.complexfloating):
        return lax.complex(broadcast(value.real, root), broadcast(value.imag, root))
    if jnp.issubdtype(value.dtype, jnp.floating):  # as integers: -0.0 + 0.0 would lose the sign
        wide = value.astype(reduce_op.working_dtype(np.dtype(value.dtype)))
        bits = lax.bitcast_convert_type(wide, f"uint{8 * wide.dtype.itemsize}")
        sent = lax.bitcast_convert_type(broadcast(bits, root), wide.dtype)
        return sent.astype(value.dtype)
    return lax.psum(jnp.where(lax.axis_index(AXIS) == root, value, jnp.zeros_like(value)), AXIS)


def reduce_scatter(value: Any, op: Reduction) -> Any:
    """Return this replica's part of the reduction; the parts have one length."""
    if value.shape[0] == 0:
        return value
    length = value.shape[0] // lax.psum(1, AXIS)
    if op is ReduceOp.SUM and not reduce_op.is_half(np.dtype(value.dtype)):
        return lax.psum_scatter(value, AXIS, tiled=True)
    return lax.dynamic_slice_in_dim(all_reduce(value, op), lax.axis_index(AXIS) * length, length)


def replica_id() -> Any:
    """Return the id of the replica, a traced int32."""
    return lax.axis_index(AXIS)


def spmd(function: Any, mesh: Any) -> Any:
    """Return a function of the arrays of each replica as one of global arrays, not yet compiled.

    Its arrays, and its results, have a whole copy on each device; the copies may differ.
    """
    everywhere = jax.sharding.PartitionSpec()
    return jax.shard_map(
        function, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False
    )
