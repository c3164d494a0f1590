"""Arrays whatever their library: their protocol, shape and dtype, and the refusal of masks."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from dvkernels.errors import NotABufferError

__all__: list[str] = []

HostArray: TypeAlias = np.ndarray[Any, Any]
"""An array of NumPy, of any shape and dtype."""


class Array(Protocol):
    """An array of NumPy, CuPy, JAX, PyTorch or the simulator, on the host or on a device.

    This is what all of them have. What depends on the library (strides, the device, a view of the
    memory) stands in ``devices/interop.py`` and ``devices/cuda_arrays.py``.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    @property
    def ndim(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def __getitem__(self, key: Any, /) -> Any: ...

    @property
    def reshape(self) -> Any: ...


class Spec(NamedTuple):
    """Shape and dtype, written as ``float32[2, 3]`` in messages."""

    shape: tuple[Any, ...]
    dtype: Any

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(str(length) for length in self.shape)}]"

    def __repr__(self) -> str:
        return str(self)


def spec(array: Any) -> Spec:
    """Return shape and dtype of an array."""
    return Spec(array.shape, array.dtype)


def refuse_masked(value: Any, label: str) -> None:
    """Raise ``NotABufferError`` where ``np.asarray(value)`` would drop a mask, at any depth.

    ``label`` names the value in the message.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise NotABufferError(
            f"{label} is a MaskedArray, whose mask would be ignored; pass .filled(value) or .data"
        )
    if isinstance(value, (list, tuple)) and _contains_masked(value, 0):
        raise NotABufferError(
            f"{label} holds a MaskedArray, whose mask would be ignored; "
            "pass .filled(value) or .data"
        )


def _contains_masked(value: Any, depth: int) -> bool:
    if isinstance(value, (list, tuple)):  # no array has more axes than 64
        return depth < 64 and any(_contains_masked(item, depth + 1) for item in value)
    return isinstance(value, np.ma.MaskedArray)
