"""Gradient clipping by the global norm."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dvkernels import pytree, reduce_op
from dvkernels.devices import array_memory, interop
from dvkernels.errors import UnsupportedDTypeError
from dvkernels.values.operands import as_array
from dvkernels.values.scalar_checks import within

__all__ = ["clip_by_global_norm"]

_BLOCK = 1 << 15  # elements: 256 KiB of float64


def clip_by_global_norm(gradients: Any, clip_norm: float) -> tuple[Any, float]:
    """Scale all gradients by one factor, so that their global norm is at most ``clip_norm``.

    Parameters
    ----------
    gradients : pytree of array, each of any shape and of a floating-point or complex dtype
        Unchanged.
    clip_norm : float
        Above 0.

    Returns
    -------
    pytree of array
        New arrays of the same shapes and dtypes; with the same bits if the norm is at most
        ``clip_norm``. All NaN if the norm is not finite, so that the failure is visible.
    float
        The norm before scaling: the square root of the sum of all squares, accumulated in float64.

    Raises
    ------
    ValueError
        ``clip_norm`` is not a positive number.
    UnsupportedDTypeError, NotABufferError
        Gradients of integers, or not arrays.

    Notes
    -----
    No communication; for gradients on a GPU the host waits for the norm. Gradients of JAX, which
    may be traced, are accumulated in float32 or wider; a traced norm stays an array. To clip the
    mean of the replicas' gradients, reduce first, and pass the clipped result to
    ``apply_gradients``: the mean of equal gradients is the gradient itself.

    Examples
    --------
    >>> import dvkernels as dv
    >>> import numpy as np
    >>> dv.optimizers.clip_by_global_norm([np.array([3.0, 0.0]), np.array([4.0])], 1.0)
    ([array([0.6, 0. ]), array([0.8])], 5.0)
    """
    limit = within(clip_norm, "clip_norm", 0)
    if limit == 0:
        raise ValueError(f"clip_norm must be above 0; got {clip_norm!r}")
    leaves, structure = pytree.flatten(gradients)
    if any(map(interop.is_of_jax, leaves)):  # perhaps traced: Python does not know the norm
        from dvkernels.optimizers import functional_step

        clipped, total = functional_step.clipped([*map(_floating, leaves)], limit)
        return pytree.unflatten(structure, clipped), total
    arrays = [
        _floating(as_array(leaf, "clip_by_global_norm", 0, array_memory.of_value(leaf)))
        for leaf in leaves
    ]
    norm = math.hypot(*(array_memory.holding(array).apply(_norm, array) for array in arrays))
    factor = (1.0 if norm <= limit else limit / norm) if math.isfinite(norm) else math.nan
    clipped = [
        array_memory.holding(array).apply(_scaled, array, array.dtype.type(factor))
        for array in arrays
    ]
    return pytree.unflatten(structure, clipped), norm


def _norm(array: Any) -> float:
    """Return the 2-norm of an array, converted to float64 block by block within the cache."""
    flat = array.reshape(-1)
    wide = np.complex128 if array.dtype.kind == "c" else np.float64
    length = _BLOCK if isinstance(array, np.ndarray) else max(1, flat.size)
    blocks = (flat[k : k + length].astype(wide) for k in range(0, flat.size, length))
    return math.hypot(*(float(np.linalg.norm(block)) for block in blocks))


def _scaled(array: Any, factor: Any) -> Any:
    return np.multiply(array, factor, out=np.empty_like(array))


def _floating(array: Any) -> Any:
    if reduce_op.kind(array.dtype) not in "fc":
        raise UnsupportedDTypeError(
            f"clip_by_global_norm needs floating-point gradients; got {array.dtype}"
        )
    return array
