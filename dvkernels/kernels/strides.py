"""Coalescing of axes: the fewest loops that walk arrays of one shape together."""

from __future__ import annotations

from collections.abc import Sequence

from dvkernels.devices.array_spec import HostArray

__all__ = ["merge_axes"]


def merge_axes(arrays: Sequence[HostArray]) -> list[tuple[int, tuple[int, ...]]]:
    """Return (extent, stride in each array) of the fewest axes that walk all arrays together.

    The outermost axis comes first. An elementwise operation allows any order of the elements, so
    axes are sorted by stride, and two that continue each other in every array are merged.
    """
    shape = arrays[0].shape
    order = sorted(range(len(shape)), key=lambda axis: -abs(arrays[0].strides[axis]))
    merged: list[tuple[int, tuple[int, ...]]] = []
    for axis in order:
        extent, strides = shape[axis], tuple(array.strides[axis] for array in arrays)
        if extent == 1:
            continue
        if merged and merged[-1][1] == tuple(extent * stride for stride in strides):
            merged[-1] = (merged[-1][0] * extent, strides)
        else:
            merged.append((extent, strides))
    return merged
