"""Custom reduction: a user's compiled function of two numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any, final

from dvkernels.user_errors import brief

__all__ = ["CustomReduction"]


@final
class CustomReduction:
    """Reduction by a user's function, accepted as ``op`` wherever a ``ReduceOp`` is.

    Parameters
    ----------
    fn : function compiled by ``numba.njit``
        Takes two numbers of the arrays' dtype and returns one. It must be associative and
        commutative, up to rounding: algorithms combine the replicas in different orders.
    identity : number
        The number with ``fn(identity, x) == x`` for every x: the result of an empty reduction.
    name : str
        Name in messages.

    Raises
    ------
    TypeError
        ``fn`` is not a function compiled by Numba, or ``name`` not a string.

    Notes
    -----
    The reduction supports integers, float32, float64, complex numbers and bool; half types must be
    widened first. Every replica ends with the same bits, and the direct algorithm applies ``fn``
    from left to right. ``fn`` is compiled at its first use on a dtype, in each process (about 0.5
    s), for the CPU or for a GPU, wherever the arrays lie; for a GPU that needs numba-cuda, and a
    product and a sum may be contracted there, rounding once. Create the reduction once, outside
    ``run``: all replicas must pass the same object.

    Examples
    --------
    >>> import numba
    >>> import numpy as np
    >>> import dvkernels as dv
    >>> larger = numba.njit(lambda a, b: a if abs(a) > abs(b) else b)
    >>> op = dv.CustomReduction(larger, 0, "largest magnitude")
    >>> dv.kernels.reduce([np.array([1.0, -5.0]), np.array([-3.0, 2.0])], op)
    array([-3., -5.])
    """

    __slots__ = ("__weakref__", "fn", "identity", "name")

    fn: Callable[[Any, Any], Any]
    identity: Any
    name: str

    def __init__(self, fn: Callable[[Any, Any], Any], identity: Any, name: str) -> None:
        is_compiled = callable(getattr(fn, "py_func", None)) and hasattr(fn, "signatures")
        if not is_compiled and not (_is_jit_disabled() and isinstance(fn, FunctionType)):
            raise TypeError(
                f"a CustomReduction needs a function compiled by numba.njit; got {brief(fn, 60)}: "
                f"decorate it"
            )
        if not isinstance(name, str):
            raise TypeError(f"the name of a CustomReduction is a string; got {name!r}")
        self.fn = fn
        self.identity = identity
        self.name = name

    @property
    def value(self) -> str:
        """Text that replicas compare: the name, and the identity of this object."""
        return f"{self.name}@{id(self):x}"

    def __repr__(self) -> str:
        return f"<CustomReduction {self.name!r}>"


def _is_jit_disabled() -> bool:
    """Return whether ``numba.njit`` returns functions uncompiled: NUMBA_DISABLE_JIT."""
    numba: Any = sys.modules.get("numba")
    return numba is not None and bool(numba.config.DISABLE_JIT)
