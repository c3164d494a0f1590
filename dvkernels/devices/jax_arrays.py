"""Memory of JAX devices: arrays that nobody can write, and NumPy's functions on them.

JAX's arrays take no part in NEP 13 and NEP 18, by which NumPy's functions dispatch CuPy's arrays.
An operand with these protocols stands for each of them while a function is applied, and looks the
function up by name in ``jax.numpy``. So nothing above this module has a twin for JAX, and the same
functions can be traced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, final

import jax
import jax.numpy as jnp
import numpy as np

from dvkernels.devices import interop, jax_devices
from dvkernels.devices.array_spec import HostArray
from dvkernels.devices.device import Device
from dvkernels.errors import BufferMismatchError

__all__: list[str] = []

_ALIGNMENT = 64  # bytes


class _Operand(np.lib.mixins.NDArrayOperatorsMixin):
    """Operand of NumPy's functions that stands for an array of JAX.

    The ``out`` of a function is ignored: results are new arrays.
    """

    __slots__ = ("array",)

    def __init__(self, array: Any) -> None:
        self.array = array

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        kwargs.pop("out", None)
        function = getattr(jnp, ufunc.__name__)
        if method != "__call__":
            function = getattr(function, method)
        return _operand(function(*_bare(inputs), **_bare(kwargs)))

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        kwargs.pop("out", None)
        place = jnp.linalg if func.__module__ == "numpy.linalg" else jnp
        return _operand(getattr(place, func.__name__)(*_bare(args), **_bare(kwargs)))

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.array, name)
        if not callable(found) or name == "dtype":
            return _operand(found)
        return lambda *args, **kwargs: _operand(found(*_bare(args), **_bare(kwargs)))

    def __getitem__(self, key: Any) -> Any:
        return _operand(self.array[_bare(key)])

    def __len__(self) -> int:
        return len(self.array)

    def __float__(self) -> float:
        return float(self.array)


def _operand(value: Any) -> Any:
    if isinstance(value, jax.Array):
        return _Operand(value)
    return type(value)(map(_operand, value)) if type(value) in (list, tuple) else value


def _bare(value: Any) -> Any:
    """Return a value, or a list, tuple or dict of values, without operands."""
    if type(value) is _Operand:
        return value.array
    if type(value) in (list, tuple):
        return type(value)(map(_bare, value))
    if type(value) is dict:
        return {key: _bare(each) for key, each in value.items()}
    return value


def unshared(content: Any) -> Any:
    """Return a copy of an array of NumPy, and any other content as it is.

    JAX takes memory of NumPy as it is if it is aligned, whatever it is told, and reads other memory
    when it comes to it, both while its owner may write it again. So it gets memory that nobody else
    has; aligned, so that there is no second copy.
    """
    if not isinstance(content, np.ndarray):
        return content
    if content.dtype.hasobject or not content.dtype.itemsize:
        return np.array(content)
    memory = np.empty(content.nbytes + _ALIGNMENT, np.uint8)
    begin = -memory.__array_interface__["data"][0] % _ALIGNMENT
    copy = memory[begin : begin + content.nbytes].view(content.dtype).reshape(content.shape)
    copy[...] = content
    return copy


def unshared_array(value: Any) -> Any:
    """Return a value as an array of JAX, traced in a trace, that shares no memory of NumPy."""
    return jnp.asarray(unshared(value))


def _copied_to(content: Any, device: Any) -> Any:
    return jax.device_put(unshared(content), device, may_alias=False)


def is_traced(array: object) -> bool:
    """Return whether an array stands for that of a program that JAX traces."""
    return isinstance(array, jax.core.Tracer)


def are_of_one_trace(one: Any, other: Any) -> bool:
    """Return whether traced arrays belong to one trace, and not to one within the other."""
    # A private name, and there is no public one: without it JAX notices most of what leaks.
    return getattr(one, "_trace", None) is getattr(other, "_trace", None)


@final
class _JaxMemory:
    """Memory of JAX devices. Arrays of the host may come in; arrays of JAX stay where they are."""

    is_immutable = True

    def view(self, verb: str, buffer: Any, label: str) -> Any:
        if not interop.is_of_jax(buffer):
            return interop.view(verb, buffer, label)
        if not is_traced(buffer) and len(buffer.devices()) > 1:
            raise BufferMismatchError(
                f"{verb} needs an array on one device: {label} lies on {len(buffer.devices())}; "
                f"pass the replica's own part of it"
            )
        return buffer

    def like(self, result: Any, original: Any) -> Any:
        if interop.is_of_jax(result):
            return result
        return (
            unshared_array(result)
            if interop.is_of_jax(original)
            else interop.like(result, original)
        )

    def new(self, content: Any, device: Device) -> Any:
        return _copied_to(content, jax_devices.own(device))

    def on(self, array: Any, device: Device) -> Any:
        return (
            array if is_traced(array) else jax.device_put(unshared(array), jax_devices.own(device))
        )

    def to_device_of(self, array: Any, other: Any) -> Any:
        if is_traced(array) or isinstance(other, np.ndarray) or is_traced(other):
            return array
        (device,) = other.devices()
        return jax.device_put(unshared(array), device)

    def copy_to_device_of(self, array: Any, other: Any) -> Any:
        if isinstance(other, np.ndarray):
            return np.array(array)
        (device,) = other.devices()
        return _copied_to(array, device)

    def read_only(self, array: Any) -> Any:
        return array

    def is_writable(self, array: Any) -> bool:
        return isinstance(array, np.ndarray) and array.flags.writeable

    def kept_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        kept: np.dtype[Any] = np.dtype(jax.dtypes.canonicalize_dtype(dtype))
        return kept

    def apply(self, function: Callable[..., Any], array: Any, *others: Any) -> Any:
        return _bare(function(*map(_operand, (array, *others))))

    def accumulate(self, function: Any, rows: Any, positions: Any, updates: Any) -> Any:
        # In host memory: its loop applies the updates one after another, as on CPU devices.
        content = np.array(_bare(rows))
        function.at(content, positions, np.asarray(_bare(updates)))
        return self.copy_to_device_of(content, _bare(rows))

    def overwrite(self, targets: Sequence[Any], values: Sequence[Any]) -> NoReturn:
        raise BufferMismatchError("arrays of JAX cannot be written; take the result instead")

    def overwrite_rows(
        self, targets: Sequence[Any], rows: Sequence[Any], values: Sequence[Any]
    ) -> NoReturn:
        self.overwrite(targets, values)

    def to_host(self, array: Any) -> HostArray:
        return np.asarray(array)


MEMORY = _JaxMemory()
