"""Arrays of other libraries: NumPy views of them, and results returned in the caller's library.

DLPack exchanges the arrays without a copy. What DLPack does not exchange between NumPy and a
library (bfloat16, PyTorch tensors that require gradients, arrays that JAX must own) has its row in
a table. This module imports no library.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from dvkernels.devices.array_spec import Array, HostArray
from dvkernels.errors import BufferMismatchError, NotABufferError
from dvkernels.user_errors import text_of

__all__: list[str] = []

_CPU = (1, 3)  # DLPack's kDLCPU, and kDLCUDAHost: pinned memory of the host


def library_of(array: object) -> str:
    """Return the name of the package that an array's type comes from."""
    return type(array).__module__.partition(".")[0]


def is_of_jax(array: object) -> bool:
    """Return whether an array is one of JAX: immutable, and of no stream that others could name."""
    return library_of(array) in ("jax", "jaxlib")


def is_foreign(value: Any) -> bool:
    """Return whether a value is an array of another library than NumPy."""
    if isinstance(value, (np.ndarray, np.generic)):
        return False
    speaks = hasattr(value, "__dlpack__") or hasattr(value, "__cuda_array_interface__")
    # An array that JAX traces has no memory to exchange.
    return speaks or (type(value).__name__.endswith("Tracer") and is_of_jax(value))


def is_on_gpu(buffer: Any) -> bool:
    """Return whether an array lies in the memory of a CUDA device (DLPack kinds 2 and 13)."""
    if isinstance(buffer, np.ndarray):
        return False
    is_cuda = getattr(buffer, "is_cuda", None)  # PyTorch: its DLPack device would take 5 us
    if type(is_cuda) is bool:
        return is_cuda
    kind = type(buffer)
    if kind.__module__ == "cupy" and kind.__name__ == "ndarray":
        return True
    if getattr(buffer, "__cuda_ndarray__", False):  # Numba's, and those of its simulator
        return True
    dlpack_device = getattr(buffer, "__dlpack_device__", None)
    if dlpack_device is not None:
        try:
            return int(dlpack_device()[0]) in (2, 13)
        except BufferError:  # JAX: it has parts on several devices, which view() reports
            return False
    return hasattr(buffer, "__cuda_array_interface__")


def dtype_named(name: Any) -> np.dtype[Any]:
    """Return the NumPy dtype of a dtype's name in other libraries."""
    if name == "bfloat16":
        import ml_dtypes

        name = ml_dtypes.bfloat16
    dtype: np.dtype[Any] = np.dtype(name)
    return dtype


def view(verb: str, buffer: Any, label: str) -> HostArray:
    """Return a NumPy view of another library's array; ``label`` names it in messages.

    The view is writable where the library allows that: PyTorch does, JAX does not.
    """
    if getattr(buffer, "__cuda_ndarray__", False) or (
        hasattr(buffer, "__cuda_array_interface__") and not hasattr(buffer, "__dlpack_device__")
    ):
        raise BufferMismatchError(
            f"{verb} needs buffers of one kind of device: {label} is in GPU memory, and others are "
            "in host memory; copy it to the host, or the others to the GPU"
        )
    if not hasattr(buffer, "__dlpack__") or not hasattr(buffer, "__dlpack_device__"):
        raise NotABufferError(
            f"{verb} needs arrays: {label} is a {type(buffer).__name__}; "
            "convert it with np.asarray, and note that results are written into arrays"
        )
    try:
        kind = int(buffer.__dlpack_device__()[0])
    except (BufferError, TypeError, RuntimeError, ValueError) as error:
        raise NotABufferError(
            f"{verb} cannot tell where {label}, a {type(buffer).__name__}, lies: {text_of(error)}"
        ) from error
    if kind not in _CPU:
        raise BufferMismatchError(
            f"{verb} on the CPU needs arrays in CPU memory: {label} is on DLPack device kind "
            f"{kind}; copy it to the host first"
        )
    view_of: Callable[[Any], HostArray] = _VIEWS.get(library_of(buffer)) or np.from_dlpack
    try:
        return view_of(buffer)
    except (BufferError, TypeError, RuntimeError, ValueError) as error:
        raise NotABufferError(
            f"{verb} cannot view {label}, a {type(buffer).__name__}, through DLPack: "
            f"{text_of(error)}"
        ) from error


def like(result: Array, original: Any) -> Any:
    """Return ``result``, of NumPy or CuPy, in the library of ``original``, without a copy.

    Read-only arrays are copied for a library without read-only arrays.
    """
    if isinstance(original, np.ndarray) or not is_foreign(original):
        return result
    library = library_of(original)
    convert = _CONVERSIONS.get(library)
    if convert is not None:
        return convert(result)
    from_dlpack = getattr(sys.modules.get(library), "from_dlpack", None)
    return result if from_dlpack is None else from_dlpack(result)


def copy(array: Any) -> Any:
    """Return a copy of an array of another library, in the same library."""
    if is_of_jax(array):
        return array  # immutable
    clone = getattr(array, "clone", None) or getattr(array, "copy", None)
    return clone() if callable(clone) else like(np.array(view("copy", array, "it")), array)


def _view_of_tensor(tensor: Any) -> HostArray:
    torch = sys.modules["torch"]
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.dtype is torch.bfloat16:
        return np.from_dlpack(tensor.view(torch.int16)).view(dtype_named("bfloat16"))
    return np.from_dlpack(tensor)


def _as_tensor(array: Any) -> Any:
    torch = sys.modules["torch"]
    writable = array if getattr(array.flags, "writeable", True) else array.copy()
    if writable.dtype.name == "bfloat16":
        return torch.from_dlpack(writable.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(writable)


def _view_of_jax(array: Any) -> HostArray:
    return np.asarray(array)  # read-only, and not copied on the CPU


def _as_jax(array: Any) -> Any:
    jax_numpy = sys.modules["jax"].numpy
    if isinstance(array, np.ndarray):
        return jax_numpy.asarray(array)
    if array.dtype.name == "bfloat16":
        words: Any = array
        return jax_numpy.from_dlpack(words.view(np.uint16)).view("bfloat16")
    return jax_numpy.from_dlpack(array)


_VIEWS: dict[str, Callable[[Any], HostArray]] = {
    "torch": _view_of_tensor,
    "jax": _view_of_jax,
    "jaxlib": _view_of_jax,
}
_CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "torch": _as_tensor,
    "jax": _as_jax,
    "jaxlib": _as_jax,
}
