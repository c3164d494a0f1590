"""Reads of a variable: its value, and NumPy's functions, indexing and arithmetic on it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np

from dvkernels.devices.array_spec import HostArray
from dvkernels.errors import BufferMismatchError
from dvkernels.values.distributed import PerReplica
from dvkernels.variables.access import calling_replica
from dvkernels.variables.copies import Copies
from dvkernels.variables.rows import checked_out, checked_rows, gather, gather_first
from dvkernels.variables.synchronization import SYNC_MODES

__all__: list[str] = []

# The NumPy functions that write their first argument.
_NUMPY_WRITERS = {
    np.copyto, np.put, np.place, np.putmask, np.put_along_axis, np.fill_diagonal,
}  # fmt: skip


def read(value: Any) -> Any:
    """Return the value of a variable; another value as it is."""
    return value.read_value() if isinstance(value, VariableReads) else value


def refuse_to_write(out: Any, what: str, remedy: str = "") -> None:
    """Raise if ``out`` is a variable: NumPy would write one copy and bypass the modes."""
    if isinstance(out, VariableReads):
        calls = ["v.assign(x)", "v.assign_add(x)", "v.assign_sub(x)", *filter(None, [remedy])]
        name = out._copies.name
        raise TypeError(
            f"variable {name!r} is written by its methods, which keep the copies of all replicas "
            f"consistent, not by {what}; use {', '.join(calls[:-1])} or {calls[-1]}"
        )


_Operator: TypeAlias = Callable[[Any, Any], Any]


def _binary(fn: _Operator) -> tuple[_Operator, _Operator]:
    """Return an operator on values of variables, and its reflected form."""

    def forward(self: VariableReads, other: Any) -> Any:
        return fn(self.read_value(), read(other))

    def backward(self: VariableReads, other: Any) -> Any:
        return fn(other, self.read_value())

    return forward, backward


def _comparison(fn: _Operator) -> _Operator:
    return _binary(fn)[0]


def _in_place(sign: str) -> _Operator:
    """Return an in-place operator, which raises.

    Without it Python would run ``v = v + x`` for ``v += x`` and bind the name to an array.
    """

    def in_place(self: VariableReads, other: Any) -> Any:
        remedy = "" if sign in "+-" else f"v.assign(v {sign} x)"  # those two have methods
        refuse_to_write(self, f"v {sign}= x", remedy)

    return in_place


def _unary(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda self: fn(self.read_value())


class VariableReads:
    """Reads of a variable: operators act on ``read_value()``, and the in-place forms raise."""

    __slots__ = ()
    _copies: Copies

    def read_value(self) -> Any:
        """Return the value as a read-only view, valid until the next write.

        Returns
        -------
        array of shape ``variable.shape``, or PerReplica of such
            In replica context, the replica's own copy. In cross-replica context, the first copy
            (ON_WRITE), the aggregate of the copies (ON_READ), or a ``PerReplica`` of all copies
            (NONE). Under a parameter-server strategy a copy, which later writes do not change.

        Raises
        ------
        SynchronizationError
            Cross-replica read of an ON_READ variable with aggregation NONE.
        ContextError
            Another strategy's scope or run is current.

        Notes
        -----
        Over several workers a cross-replica read of an ON_READ variable communicates, so every
        worker must make it.
        """
        replica = calling_replica(self._copies, "read_value", write=False)
        mode = SYNC_MODES[self._copies.mode]
        if replica is None:
            return mode.read_across(self._copies)
        return mode.read_in_replica(self._copies, replica)

    def gather_rows(self, indices: Any, *, out: Any = None) -> Any:
        """Return rows of the value as a new array.

        Parameters
        ----------
        indices : array-like of int, of any shape
            Positions along axis 0; repetitions are allowed. Negative indices raise.
        out : array of shape ``indices.shape + variable.shape[1:]``, optional
            Of this variable's dtype, writable: gets the rows, and is returned. A ``PerReplica`` of
            such arrays where :meth:`read_value` returns one.

        Returns
        -------
        array of shape ``indices.shape + variable.shape[1:]``
            Owned by the caller; a ``PerReplica`` of such arrays where :meth:`read_value` returns
            one.

        Raises
        ------
        IndexError
            An index is out of range.
        NotABufferError, BufferMismatchError
            The indices are not integers; the variable is 0-d; ``out`` does not fit. Nothing has
            been written.

        Notes
        -----
        Many rows are copied by compiled code on all cores, and other threads run meanwhile.

        Examples
        --------
        >>> import dvkernels as dv
        >>> table = dv.Variable([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> table.gather_rows([2, 0])
        array([[5., 6.],
               [1., 2.]])
        """
        copies, verb = self._copies, "gather_rows"
        replica, number = calling_replica(copies, verb, write=False), None
        if replica is not None and replica.trace is not None:
            return replica.trace.gather_rows(copies, replica.own(indices), out)
        if replica is not None:
            indices, number = replica.own(indices), replica.replica_id_in_sync_group
            out = replica.own(out)
        rows = checked_rows(copies, verb, indices, number)
        server = copies.server
        if server is not None:
            target = None if out is None else checked_out(copies, rows, out, number)
            taken = server.ask(verb, gather_first, copies, rows, target)
            return taken if out is None else out
        value = self.read_value()
        if not isinstance(value, PerReplica):
            target = None if out is None else checked_out(copies, rows, out, number)
            taken = gather(copies, value, rows, target)
            return taken if out is None else out
        if out is None:
            each = [gather(copies, array, rows) for array in value.values]
            return PerReplica(each, devices=value.devices, owner=value.owner)
        if not isinstance(out, PerReplica):
            raise BufferMismatchError(
                f"{verb} of variable {copies.name!r} expected as out a PerReplica with an array "
                f"for each copy, got a {type(out).__name__}"
            )
        outs = copies.components(out, verb)
        targets = [checked_out(copies, rows, each, k) for k, each in enumerate(outs)]
        for array, target in zip(value.values, targets, strict=True):
            gather(copies, array, rows, target)
        return out

    def numpy(self) -> HostArray:
        """Return the value as a NumPy array.

        Returns
        -------
        numpy.ndarray of shape ``variable.shape``
            New, owned by the caller. For a variable on a GPU this waits for the GPU.

        Raises
        ------
        TypeError
            A NONE variable of several replicas in cross-replica context: it has several values.
        """
        return np.array(self._on_host())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> HostArray:
        return np.array(self._on_host(), dtype=dtype, copy=copy)

    def _single(self) -> Any:
        """Return the value; for a NONE variable of a single replica, its only copy."""
        copies = self._copies
        is_of_jax = copies.memory.is_immutable
        value = copies.on_host(self.read_value) if is_of_jax else self.read_value()
        if isinstance(value, PerReplica) and self._copies.placement.num_replicas == 1:
            return value.at(0)
        return value

    def _on_host(self) -> Any:
        """Return the value in host memory; this waits for a GPU."""
        value = self._single()
        return value if isinstance(value, PerReplica) else self._copies.memory.to_host(value)

    def __bool__(self) -> bool:
        return bool(self._single())

    def __float__(self) -> float:
        return float(self._single())

    def __int__(self) -> int:
        return int(self._single())

    def __index__(self) -> int:
        return operator.index(self._single())

    def __complex__(self) -> complex:
        return complex(self._single())

    # -- functions and operators ----------------------------------------------------------------

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

    def __iter__(self) -> Iterator[Any]:
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

    __iadd__ = _in_place("+")
    __isub__ = _in_place("-")
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
