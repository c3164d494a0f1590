"""Arrays of Numba's CUDA simulator with the operators and functions of CuPy's arrays.

They lie in host memory, and NumPy computes. Like CuPy, they refuse an implicit conversion to NumPy
arrays and operations with NumPy arrays: so a program that runs in the simulator does not depend on
implicit transfers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

__all__ = ["kind_of"]


def kind_of(base: Any) -> Any:
    """Return the array class; ``base`` is the simulator's, which its kernels accept."""

    class SimulatedArray(NDArrayOperatorsMixin, base):  # type: ignore[misc]
        """Array of the simulator with the operators and functions of NumPy."""

        __hash__ = None  # type: ignore[assignment]
        _ary: Any

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

        def get(self) -> Any:
            """Return a copy on the host."""
            return self._ary.copy()

        def reshape(self, *shape: Any, **named: Any) -> Any:
            """Return the array with another shape."""
            return _wrapped(self._ary.reshape(*shape, **named))

        def view(self, *dtype: Any, **named: Any) -> Any:
            """Return a view of the array."""
            return _wrapped(self._ary.view(*dtype, **named))

        def ravel(self, *order: Any, **named: Any) -> Any:
            """Return the flattened array."""
            return _wrapped(self._ary.ravel(*order, **named))

        def transpose(self, *axes: Any) -> Any:
            """Return the array with its axes in another order."""
            return _wrapped(self._ary.transpose(*axes))

        def __getitem__(self, key: Any) -> Any:
            return _wrapped(self._ary[_unwrap(key)])

        def __setitem__(self, key: Any, value: Any) -> None:
            _refuse_numpy(value)
            self._ary[_unwrap(key)] = _unwrap(value)

        def __len__(self) -> int:
            return len(self._ary)

        def __bool__(self) -> bool:
            return bool(self._ary)

        def __int__(self) -> int:
            return int(self._ary)

        def __float__(self) -> float:
            return float(self._ary)

        def __complex__(self) -> complex:
            return complex(self._ary)

        def __repr__(self) -> str:
            return repr(self._ary)

        def __format__(self, form: str) -> str:
            return format(self._ary, form)

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
