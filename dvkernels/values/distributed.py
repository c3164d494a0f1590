"""Distributed values: one component per replica, without behaviour of their own."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any, Generic, NoReturn, Self, TypeVar

import numpy as np

from dvkernels import html_table
from dvkernels.devices import array_memory, array_spec, interop, registry
from dvkernels.devices.device import Device
from dvkernels.errors import DeviceError
from dvkernels.user_errors import brief
from dvkernels.values.placement import Placement
from dvkernels.values.scalar_checks import is_integer

__all__ = ["DistributedValues", "Mirrored", "PerReplica"]

T = TypeVar("T")

_FIRST_CPU = Device("cpu", 0)
_MAX_SHOWN = 60  # characters of one component in a repr


class DistributedValues(Generic[T]):
    """One component per replica: base class of ``PerReplica``, ``Mirrored`` and ``Variable``.

    A distributed value has no arithmetic, no truth value and no iteration: their meaning would
    depend on whether the caller wants the sum of the components, their concatenation, or one of
    them.

    Examples
    --------
    >>> import dvkernels as dv
    >>> values = dv.PerReplica([1, 2])
    >>> isinstance(values, dv.DistributedValues), values.values
    (True, (1, 2))
    """

    __slots__ = ()
    __hash__ = object.__hash__

    @property
    def values(self) -> tuple[T, ...]:
        """The components of the replicas of this process, in replica order."""
        raise NotImplementedError

    @property
    def devices(self) -> tuple[Device, ...]:
        """The device of each component, in replica order."""
        raise NotImplementedError

    @property
    def owner(self) -> Placement | None:
        """The placement of the strategy that made this value; None for one made by the user."""
        raise NotImplementedError

    @property
    def first_replica(self) -> int:
        """The replica id of the first component: 0, unless other processes hold lower ids."""
        return 0 if self.owner is None else self.owner.first_replica

    def on(self, replica_id: int) -> T:
        """Return the component of one replica.

        Parameters
        ----------
        replica_id : int
            The id of the replica, counted over all processes.

        Raises
        ------
        IndexError
            There is no such replica, or another process holds it; the message names its worker.
        TypeError
            ``replica_id`` is not an integer.
        """
        if not is_integer(replica_id):
            raise TypeError(f"a replica id is an integer, got {replica_id!r}")
        return self.at(int(replica_id) - self.first_replica)

    def at(self, rank: int) -> T:
        """Return the component of a local rank: a position among the replicas of this process."""
        values = self.values
        if not 0 <= rank < len(values):
            raise IndexError(self._missing(rank + self.first_replica, len(values)))
        return values[rank]

    def copy_to(self, device: Device | str) -> PerReplica[T] | Mirrored[T]:
        """Copy every component of this process to ``device``.

        Parameters
        ----------
        device : Device or str
            The target of all copies.

        Returns
        -------
        PerReplica or Mirrored
            A value of the same class, for a variable a ``PerReplica``. Arrays are new and owned by
            the caller; other components are the same objects. Nothing is communicated or reduced.

        Raises
        ------
        DeviceError
            The device does not exist.
        """
        target = registry.resolve(device)
        copies = [_copied(value, target) for value in self.values]
        kind = type(self) if isinstance(self, PerReplica | Mirrored) else PerReplica
        return kind(copies, devices=[target] * len(copies), owner=self.owner)

    def _missing(self, replica: int, count: int) -> str:
        first, owner = self.first_replica, self.owner
        here = f"this {type(self).__name__} has replicas {first} to {first + count - 1}"
        if owner is not None and 0 <= replica < owner.num_replicas != count:
            worker = owner.share.worker_of(replica)
            return (
                f"replica {replica} is one of worker {worker}, and here, on worker "
                f"{owner.workers.rank}, {here}; use gather or reduce to combine them"
            )
        return f"there is no replica {replica}: {here}"


class _Frozen(DistributedValues[T]):
    """Implementation of ``PerReplica`` and ``Mirrored``: storage, indexing, printing, refusals."""

    # The slots override the properties of the base class.
    __slots__ = ("__weakref__", "_global_array", "devices", "owner", "values")

    _global_array: Any  # see with_global_array; most values have none

    # The calls to use instead; shown when an operation is refused.
    _remedy = ""

    def __init__(
        self,
        values: Iterable[T],
        *,
        devices: Iterable[Device | str] | None = None,
        owner: Placement | None = None,
    ) -> None:
        is_listed = type(values) in (list, tuple)  # the check of abstract classes takes 0.5 us
        # Text is no sequence of values, and mappings and sets have no order of replicas.
        if not is_listed and isinstance(values, (str, bytes, Mapping, Set)):
            raise TypeError(
                f"a {type(self).__name__} needs a sequence of values, one per replica, got a "
                f"{type(values).__name__}; write [{brief(values, 40)}, ...]"
            )
        components = tuple(values)
        if not components:
            raise ValueError(f"a {type(self).__name__} needs one value per replica, got none")
        if devices is None:
            where = (_FIRST_CPU,) * len(components)
        elif owner is not None and devices is owner.replica_devices:  # the common case, as they are
            where = owner.replica_devices
        else:
            where = tuple(
                device if type(device) is Device else registry.resolve(device) for device in devices
            )
        if len(where) != len(components):
            raise DeviceError(
                f"a {type(self).__name__} of {len(components)} values needs "
                f"{len(components)} devices, got {len(where)}"
            )
        object.__setattr__(self, "values", components)
        object.__setattr__(self, "devices", where)
        object.__setattr__(self, "owner", owner)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, replica_id: int) -> T:
        return self.on(replica_id)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a {type(self).__name__} is frozen; make a new one")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a {type(self).__name__} is frozen; make a new one")

    def __copy__(self) -> Self:
        return self  # frozen

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        values = copy.deepcopy(self.values, memo)
        return type(self)(values, devices=self.devices, owner=self.owner)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.values,)

    def __format__(self, how: str) -> str:
        return self._refuse() if how else str(self)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # probes of protocols, by NumPy and others
            raise AttributeError(name)
        raise AttributeError(
            f"a {type(self).__name__} has no {name!r}: it holds one value for each replica; "
            f"{self._remedy}"
        )

    def __repr__(self) -> str:
        numbered = enumerate(self.values, self.first_replica)
        shown = ", ".join(f"{i}: {_short(value)}" for i, value in numbered)
        return f"{type(self).__name__}({shown})"

    def _repr_html_(self) -> str:
        numbered = zip(self.devices, self.values, strict=True)
        rows = (
            (i, str(device), _short(value))
            for i, (device, value) in enumerate(numbered, self.first_replica)
        )
        return html_table.table(type(self).__name__, ("replica", "device", "value"), rows)

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} is not a number or an array: it holds one value for each of "
            f"{len(self.values)} replicas; {self._remedy}"
        )

    def __iter__(self) -> Iterator[T]:
        self._refuse()

    __bool__ = __float__ = __int__ = __complex__ = __index__ = __contains__ = _refuse
    __array__ = __array_ufunc__ = __array_function__ = _refuse
    __add__ = __sub__ = __mul__ = __truediv__ = __floordiv__ = __mod__ = __pow__ = _refuse
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rfloordiv__ = __rmod__ = __rpow__ = _refuse
    __matmul__ = __rmatmul__ = __and__ = __or__ = __xor__ = __lshift__ = __rshift__ = _refuse
    __rand__ = __ror__ = __rxor__ = __rlshift__ = __rrshift__ = _refuse
    __divmod__ = __rdivmod__ = __reversed__ = _refuse
    __neg__ = __pos__ = __abs__ = __invert__ = __round__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = _refuse

    def __eq__(self, other: object) -> bool:
        return self is other if isinstance(other, DistributedValues) else self._refuse()

    __hash__ = object.__hash__


class PerReplica(_Frozen[T]):
    """One value per replica, in replica order; the values may differ.

    Parameters
    ----------
    values : iterable
        One value per replica: arrays of any shape and dtype, or any other objects.
    devices : iterable of Device or str, optional
        The device of each value; ``"cpu:0"`` for all if not given.

    Raises
    ------
    TypeError
        ``values`` is not iterable, or is text, a mapping or a set.
    ValueError
        There are no values.
    DeviceError
        The number of devices differs, or a device does not exist.

    Notes
    -----
    Frozen: ``len()``, ``[replica_id]`` and ``.on(replica_id)`` read it. Arithmetic, NumPy
    functions, iteration and truth raise a ``TypeError`` that names the call to use. ``==`` compares
    identity.

    Examples
    --------
    >>> import dvkernels as dv
    >>> losses = dv.PerReplica([0.5, 0.25])
    >>> losses
    PerReplica(0: 0.5, 1: 0.25)
    >>> losses.on(1)
    0.25
    """

    __slots__ = ()
    _remedy = (
        "in cross-replica context use strategy.reduce(op, value), strategy.gather(value) or "
        "strategy.local_results(value); in a replica use .on(replica_id)"
    )


class Mirrored(_Frozen[T]):
    """One value per replica, all equal.

    Parameters, errors and operations are those of :class:`PerReplica`. The caller is responsible
    for the equality of the values; nothing is compared or communicated.

    Examples
    --------
    >>> import dvkernels as dv
    >>> dv.Mirrored(["a", "a"]).values
    ('a', 'a')
    """

    __slots__ = ()
    _remedy = "take one of its equal copies with .values[0]"


def with_global_array(value: PerReplica[T], array: Any) -> PerReplica[T]:
    """Return a value, which nobody has seen yet, with its components as one global array of JAX.

    Compiled steps take and give these.
    """
    object.__setattr__(value, "_global_array", array)
    return value


def global_array_of(value: PerReplica[Any]) -> Any:
    """Return the global array that a value was given, or None."""
    return getattr(value, "_global_array", None)


def _copied(value: Any, device: Device) -> Any:
    array_spec.refuse_masked(value, f"copy_to {device}: a component")
    is_of_numpy = isinstance(value, (np.ndarray, np.generic))
    is_array = is_of_numpy or interop.is_on_gpu(value) or interop.is_of_jax(value)
    return array_memory.copied(value, device) if is_array else value


def _short(value: object) -> str:
    is_on_gpu = interop.is_on_gpu(value)  # its content would have to be copied to the host
    if is_on_gpu or (isinstance(value, np.ndarray) and value.size > 4):
        array: Any = value
        return f"{array.dtype}{list(array.shape)}"
    try:
        text = " ".join(repr(value).split())
    except Exception:
        return brief(value)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 1] + "…"
