"""Operators of variables: NumPy's functions, indexing and arithmetic on the value of a variable."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

__all__: list[str] = []

# The NumPy functions that write their first argument.
_NUMPY_WRITERS = {
    np.copyto, np.put, np.place, np.putmask, np.put_along_axis, np.fill_diagonal,
}  # fmt: skip


def read(value: Any) -> Any:
    """Return the value of a variable; another value as it is."""
    return value.read_value() if isinstance(value, ArrayOperators) else value


def refuse_to_write(out: Any, what: str, remedy: str = "") -> None:
    """Raise if ``out`` is a variable: NumPy would write one copy and bypass the modes."""
    if isinstance(out, ArrayOperators):
        calls = ["v.assign(x)", "v.assign_add(x)", "v.assign_sub(x)", *filter(None, [remedy])]
        raise TypeError(
            f"variable {out.name!r} is written by its methods, which keep the copies of all "
            f"replicas consistent, not by {what}; use {', '.join(calls[:-1])} or {calls[-1]}"
        )


def _binary(
    fn: Callable[[Any, Any], Any],
) -> tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]:
    """Return an operator on values of variables, and its reflected form."""

    def forward(self: ArrayOperators, other: Any) -> Any:
        return fn(self.read_value(), read(other))

    def backward(self: ArrayOperators, other: Any) -> Any:
        return fn(other, self.read_value())

    return forward, backward


def _comparison(fn: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return _binary(fn)[0]


def _in_place(sign: str, *, has_method: bool = False) -> Callable[[Any, Any], Any]:
    """Return an in-place operator, which raises.

    Without it Python would run ``v = v + x`` for ``v += x`` and bind the name to an array.
    """

    def in_place(self: ArrayOperators, other: Any) -> Any:
        remedy = "" if has_method else f"v.assign(v {sign} x)"
        refuse_to_write(self, f"v {sign}= x", remedy)

    return in_place


def _unary(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda self: fn(self.read_value())


class ArrayOperators:
    """Operators of a variable: each acts on ``read_value()``, and the in-place forms raise."""

    __slots__ = ()

    def read_value(self) -> Any:
        """Return the value; a variable overrides this method."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """The name; a variable overrides this property."""
        raise NotImplementedError

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        # ``at`` writes its first operand.
        written = inputs[:1] if method == "at" else kwargs.get("out", ())
        for out in written:
            refuse_to_write(out, f"the out of np.{ufunc.__name__}")
        return getattr(ufunc, method)(*map(read, inputs), **kwargs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        target = given[0] if func in _NUMPY_WRITERS else kwargs.get("out")
        for out in target if isinstance(target, tuple) else (target,):
            refuse_to_write(out, f"the output of np.{func.__name__}")
        # As NumPy does for objects that have __array__ but no __array_function__.
        return func._implementation(*args, **kwargs)

    def __getitem__(self, key: Any) -> Any:
        return self.read_value()[read(key)]

    def __setitem__(self, key: Any, value: Any) -> None:
        refuse_to_write(self, "v[...] = x", "v.scatter_update(rows, x) for some rows")

    def __len__(self) -> int:
        return len(self.read_value())

    def __iter__(self) -> Any:
        return iter(self.read_value())

    __add__, __radd__ = _binary(operator.add)
    __sub__, __rsub__ = _binary(operator.sub)
    __mul__, __rmul__ = _binary(operator.mul)
    __truediv__, __rtruediv__ = _binary(operator.truediv)
    __floordiv__, __rfloordiv__ = _binary(operator.floordiv)
    __mod__, __rmod__ = _binary(operator.mod)
    __pow__, __rpow__ = _binary(operator.pow)
    __matmul__, __rmatmul__ = _binary(operator.matmul)
    __lshift__, __rlshift__ = _binary(operator.lshift)
    __rshift__, __rrshift__ = _binary(operator.rshift)
    __and__, __rand__ = _binary(operator.and_)
    __or__, __ror__ = _binary(operator.or_)
    __xor__, __rxor__ = _binary(operator.xor)
    __divmod__, __rdivmod__ = _binary(divmod)

    __iadd__ = _in_place("+", has_method=True)
    __isub__ = _in_place("-", has_method=True)
    __imul__ = _in_place("*")
    __itruediv__ = _in_place("/")
    __ifloordiv__ = _in_place("//")
    __imod__ = _in_place("%")
    __ipow__ = _in_place("**")
    __imatmul__ = _in_place("@")
    __ilshift__ = _in_place("<<")
    __irshift__ = _in_place(">>")
    __iand__ = _in_place("&")
    __ior__ = _in_place("|")
    __ixor__ = _in_place("^")

    __lt__ = _comparison(operator.lt)
    __le__ = _comparison(operator.le)
    __gt__ = _comparison(operator.gt)
    __ge__ = _comparison(operator.ge)
    __eq__ = _comparison(operator.eq)
    __ne__ = _comparison(operator.ne)

    __neg__ = _unary(operator.neg)
    __pos__ = _unary(operator.pos)
    __abs__ = _unary(operator.abs)
    __invert__ = _unary(operator.invert)
