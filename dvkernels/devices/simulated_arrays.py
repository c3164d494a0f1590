"""Arrays of Numba's CUDA simulator with the operators and functions of CuPy's, and their library.

They lie in host memory, and NumPy computes. Like CuPy, they refuse an implicit conversion to NumPy
arrays and operations with NumPy arrays: so a program that runs in the simulator does not depend on
implicit transfers.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from dvkernels.devices.array_spec import HostArray

__all__ = ["SimulatedArrays"]


class SimulatedArrays:
    """The :class:`dvkernels.devices.cuda.ArrayLibrary` of the simulator: work is done at once.

    Parameters
    ----------
    base : type
        The array class of Numba's simulator, which its kernels accept.
    """

    def __init__(self, base: Any) -> None:
        self._kind = _kind_of(base)

    def empty(
        self, device: int, shape: tuple[int, ...], dtype: Any, stream: int | None = None
    ) -> Any:
        return self._kind(np.empty(shape, dtype))

    def copy(self, target: Any, source: Any, stream: Any = None) -> None:
        into, content = (getattr(array, "_ary", array) for array in (target, source))
        np.copyto(into, content, casting="no")

    def stream(self, device: int, *, joins_default: bool = False) -> Any:
        return _CompletedStream()

    def stream_at(self, device: int, address: int) -> Any:
        return _CompletedStream()

    def event(self, device: int) -> Any:
        return _CompletedStream()

    def identity(self, device: int) -> str:
        return f"simulated by process {os.getpid()}"

    def over(self, described: HostArray, device: int, owner: Any) -> Any:
        return owner if isinstance(owner, self._kind) else self._kind(owner._ary)

    def device_of(self, array: Any) -> int:
        return 0

    def current(self, device: int) -> Any:
        return _CompletedStream()

    def pinned(self, nbytes: int) -> Any:
        return np.empty(nbytes, np.uint8)

    def at(self, device: int, stream: Any = None) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def to_host(self, array: Any) -> Any:
        return array._ary.copy()

    def read_only(self, array: Any) -> Any:
        view = array._ary.view()
        view.flags.writeable = False
        return self._kind(view)

    def is_writable(self, array: Any) -> bool:
        return bool(array._ary.flags.writeable)

    def overwrite(
        self, device: int, stream: int, targets: Sequence[Any], sources: Sequence[Any]
    ) -> None:
        into, contents = ([array._ary for array in arrays] for arrays in (targets, sources))
        deque(map(operator.setitem, into, itertools.repeat(...), contents), maxlen=0)


class _CompletedStream:
    """Stand-in for a stream or an event whose work is complete."""

    ptr = 0
    done = True

    def __enter__(self) -> _CompletedStream:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


def _kind_of(base: Any) -> Any:
    """Return the array class, derived from the simulator's."""

    def _forwarded(name: str) -> Callable[..., Any]:
        """Return the method of NumPy's arrays of this name, over the array of a simulated one."""

        def method(self: Any, *args: Any, **named: Any) -> Any:
            return _wrapped(getattr(self._ary, name)(*args, **named))

        return method

    class SimulatedArray(NDArrayOperatorsMixin, base):  # type: ignore[misc]
        """Array of the simulator with the operators and functions of NumPy."""

        __hash__ = None  # type: ignore[assignment]
        _ary: HostArray

        @property
        def shape(self) -> tuple[int, ...]:
            """The shape, as a tuple: the simulator's own refuses negative indices."""
            return tuple(self._ary.shape)

        @property
        def T(self) -> Any:
            """The transposed array."""
            return _wrapped(self._ary.T)

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(f"arrays of the simulator have no {name}")
            found = getattr(self._ary, name)
            return _on_bare_arrays(found) if callable(found) else _wrapped(found)

        def get(self) -> HostArray:
            """Return a copy on the host."""
            return self._ary.copy()

        # The simulator's arrays have some of these with fewer parameters.
        reshape = _forwarded("reshape")
        view = _forwarded("view")
        ravel = _forwarded("ravel")
        transpose = _forwarded("transpose")
        __len__ = _forwarded("__len__")
        __bool__ = _forwarded("__bool__")
        __int__ = _forwarded("__int__")
        __float__ = _forwarded("__float__")
        __complex__ = _forwarded("__complex__")
        __repr__ = _forwarded("__repr__")
        __format__ = _forwarded("__format__")

        def __getitem__(self, key: Any) -> Any:
            return _wrapped(self._ary[_unwrap(key)])

        def __setitem__(self, key: Any, value: Any) -> None:
            _refuse_numpy(value)
            self._ary[_unwrap(key)] = _unwrap(value)

        def __array__(self, *_: Any, **__: Any) -> Any:
            raise TypeError(
                "an array on a GPU does not become a NumPy array by itself; call its get()"
            )

        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 0

        def __dlpack__(self, **_: Any) -> Any:
            raise BufferError("arrays of the simulator are not exported")

        def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **named: Any) -> Any:
            return _on_bare_arrays(getattr(ufunc, method))(*inputs, **named)

        def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
            return _on_bare_arrays(function)(*args, **kwargs)

    def _wrapped(value: Any) -> Any:
        if isinstance(value, np.generic):
            return SimulatedArray(np.asarray(value))
        if isinstance(value, np.ndarray):
            return SimulatedArray(value)
        if type(value) in (list, tuple):
            return type(value)(map(_wrapped, value))
        return value

    def _on_bare_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            _refuse_numpy((args, named))
            out = named.get("out")
            found = function(*_unwrap(args), **_unwrap(named))
            if out is not None:  # return the caller's array itself
                return out[0] if isinstance(out, tuple) else out
            return _wrapped(found)

        return call

    return SimulatedArray


def _unwrap(value: Any) -> Any:
    """Return simulated arrays as NumPy arrays, at any depth of lists, tuples and dicts."""
    if type(value) in (list, tuple):
        return type(value)(map(_unwrap, value))
    if type(value) is dict:
        return {key: _unwrap(each) for key, each in value.items()}
    return vars(value)["_ary"] if "_ary" in getattr(value, "__dict__", ()) else value


def _refuse_numpy(value: Any) -> None:
    """Raise ``TypeError`` if an operand is a NumPy array."""
    if isinstance(value, np.ndarray) and value.ndim:
        raise TypeError(
            "an array on a GPU and a NumPy array do not mix: copy the latter to the GPU first"
        )
    if type(value) in (list, tuple):
        for each in value:
            _refuse_numpy(each)
    elif type(value) is dict:
        for each in value.values():
            _refuse_numpy(each)
