"""Operands of collectives: pytrees and the components of distributed values, as arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dvkernels import pytree
from dvkernels.communicators.base import Workers
from dvkernels.devices import array_memory, interop
from dvkernels.devices.array_memory import ArrayMemory
from dvkernels.devices.array_spec import Array, Spec, refuse_masked, spec
from dvkernels.errors import BufferMismatchError, NotABufferError
from dvkernels.user_errors import brief, text_of
from dvkernels.values import regroup
from dvkernels.values.distributed import DistributedValues, Mirrored, PerReplica
from dvkernels.values.placement import Placement
from dvkernels.values.scalar_checks import is_integer

__all__: list[str] = []

_ARGUMENTS = regroup.PLAIN | {PerReplica, Mirrored}
_NUMBERS = (float, int, complex, np.generic)
# The name in specs of strings of any width: they are gathered with the widest width.
_STRINGS = {"U": "str", "S": "bytes"}


class ArrayLeaves(NamedTuple):
    """The leaves of a pytree as NumPy arrays or, on GPUs, CuPy arrays."""

    arrays: list[Array]
    structure: pytree.Structure | None  # None: a single array, no pytree
    specs: Spec | tuple[Spec, ...]  # of the single array, or one per array
    originals: Sequence[Any] | None  # the leaves as passed, if any is another library's array

    def restored(self, results: Sequence[Array]) -> Any:
        """Return results as a pytree of this structure, each of the array type of its leaf."""
        if self.originals is not None:
            results = [*map(in_library_of, results, self.originals)]
        return results[0] if self.structure is None else pytree.unflatten(self.structure, results)


def leaves_of(
    value: Any, verb: str, replica: int, own_of: Callable[[Any], Any], memory: ArrayMemory
) -> ArrayLeaves:
    """Return the leaves of a pytree as arrays; a distributed leaf gives this replica's component.

    ``replica`` is the id of the replica, for messages; ``own_of`` returns its component of a leaf;
    ``memory`` is the memory in which arrays of other libraries may lie.
    """
    leaves, structure = pytree.flatten(value)
    own = [own_of(leaf) for leaf in leaves]
    arrays = [as_array(leaf, verb, replica, memory) for leaf in own]
    specs = tuple(spec(array) for array in arrays)
    originals = own if any(interop.is_foreign(leaf) for leaf in own) else None
    if len(leaves) == 1 and leaves[0] is value:
        return ArrayLeaves(arrays, None, specs[0], originals)
    return ArrayLeaves(arrays, structure, specs, originals)


def as_array(value: Any, verb: str, replica: int, memory: ArrayMemory = array_memory.HOST) -> Array:
    """Return a leaf as an array; objects and ragged lists raise ``NotABufferError``."""
    if type(value) is not np.ndarray and not isinstance(value, _NUMBERS):
        if interop.is_foreign(value):
            viewed: Array = memory.view(
                verb, value, f"the {type(value).__name__} of replica {replica}"
            )
            return viewed
        refuse_masked(value, f"{verb}: the value of replica {replica}")
    try:
        array = np.asarray(value)
    except Exception as error:
        raise NotABufferError(
            f"{verb}: replica {replica} passed a {type(value).__name__} that is not an array or a "
            f"number ({text_of(error)})"
        ) from error
    if array.dtype.hasobject and isinstance(value, np.ndarray):
        raise NotABufferError(
            f"{verb}: expected numbers, or strings of fixed width, replica {replica} passed an "
            f"array of {array.dtype}, which holds references; convert it with .astype first"
        )
    if array.dtype.hasobject:
        raise NotABufferError(
            f"{verb}: expected an array or a number, replica {replica} passed {brief(value, 60)} "
            f"of type {type(value).__name__}"
        )
    return array


def targets_of(
    out: Any, value: ArrayLeaves, verb: str, replica: int, memory: ArrayMemory
) -> list[Array]:
    """Return the arrays of ``out``; raise unless they fit the leaves of a replica's value."""
    targets, structure = pytree.flatten(out)
    if len(targets) != len(value.arrays) or value.structure not in (None, structure):
        expected = (
            "one array" if value.structure is None else pytree.describe_structure(value.structure)
        )
        raise BufferMismatchError(
            f"{verb}: out must have the structure of value on replica {replica}: "
            f"expected {expected}, got {pytree.describe_structure(structure)}"
        )
    return [
        _target(leaf, array, verb, replica, memory)
        for leaf, array in zip(targets, value.arrays, strict=True)
    ]


def _target(leaf: Any, array: Array, verb: str, replica: int, memory: ArrayMemory) -> Array:
    who = f"out of replica {replica}"
    refuse_masked(leaf, f"{verb}: {who}")
    if not isinstance(leaf, np.ndarray):
        if not interop.is_foreign(leaf):
            raise NotABufferError(
                f"{verb}: out must hold arrays, replica {replica} passed a {type(leaf).__name__}"
            )
        leaf = memory.view(verb, leaf, who)
    is_writable = array_memory.holding(leaf).is_writable(leaf)
    if interop.is_of_jax(leaf):
        raise BufferMismatchError(
            f"{verb}: out must be writable, {spec(array)}; replica {replica} passed an array of "
            f"JAX, which nobody can write: take the result, without out"
        )
    if (leaf.shape, leaf.dtype) != (array.shape, array.dtype) or not is_writable:
        raise BufferMismatchError(
            f"{verb}: out must be writable, {spec(array)}; replica "
            f"{replica} passed {spec(leaf)}, "
            f"{'writable' if is_writable else 'read-only'}"
        )
    target: Array = leaf
    return target


def in_library_of(result: Array, original: Any) -> Array:
    """Return a result as an array of the library that ``original`` comes from."""
    if type(original) is np.ndarray or isinstance(original, _NUMBERS):
        return result
    converted: Array = array_memory.holding(result).like(result, original)
    return converted


# -- components of distributed values ------------------------------------------------------------


def component_arrays(verb: str, leaf: Any, placement: Placement) -> tuple[list[Array], Any]:
    """Return the components of a distributed value as arrays, and the first one as it is.

    There is one per local replica; plain values raise.
    """
    if not isinstance(leaf, DistributedValues):
        raise ValueError(
            f"{verb}: expected one value per replica (PerReplica, Mirrored or Variable), got a "
            f"plain {type(leaf).__name__}; it is the same on all replicas, so there is nothing "
            f"to {verb}"
        )
    values = leaf.values
    regroup.check_fits(leaf, placement, f"{verb}: ")
    if len(values) < placement.num_local:
        values = values * placement.num_local
    memory = placement.memory
    numbered = enumerate(values, placement.first_replica)
    return [as_array(value, verb, replica, memory) for replica, value in numbered], values[0]


def components(
    tree: Any,
    verb: str,
    placement: Placement,
    *,
    variables: bool = False,
    num_copies: int | None = None,
) -> list[Any]:
    """Return one pytree per local replica, with its component of each distributed value.

    ``num_copies`` asks for one pytree per copy of a variable instead. Variables are replaced only
    if ``variables`` is true.
    """
    leaves: Sequence[Any]
    structure: pytree.Structure | None
    if type(tree) is tuple and _ARGUMENTS.issuperset(map(type, tree)):  # the common case
        leaves, structure = tree, None
    else:
        leaves, structure = pytree.flatten(tree)
    columns: list[tuple[Any, ...]] = []  # of each leaf its components, or the plain value
    for leaf in leaves:
        is_plain = not isinstance(leaf, DistributedValues)
        if is_plain or (regroup.is_variable(leaf) and not variables):
            columns.append((leaf,))
            continue
        values = leaf.values
        if len(values) != num_copies:
            regroup.check_fits(leaf, placement, f"{verb}: ")
        else:
            regroup.check_owner(leaf, placement, f"{verb}: ")
        columns.append(values)
    trees = [
        [column[rank if len(column) > 1 else 0] for column in columns]
        for rank in range(placement.num_local if num_copies is None else num_copies)
    ]
    if structure is None:
        return [*map(tuple, trees)]
    return [pytree.unflatten(structure, each) for each in trees]


# -- arrays to concatenate -----------------------------------------------------------------------


def prepare_gather(
    verb: str, arrays: Sequence[Array], axis: int, replica: int
) -> tuple[list[Array], list[int], tuple[Spec, ...]]:
    """Return arrays to concatenate, the non-negative axis of each, and the specs that must agree.

    0-d arrays become arrays of length 1. In the specs the length along the axis is ``"any"``, and
    strings have no width.
    """
    if not is_integer(axis):
        raise ValueError(f"{verb}: axis must be an integer, got {axis!r}")
    ready, axes, described = [], [], []
    for array in arrays:
        stacked: Any = array
        if array.ndim == 0:
            stacked = stacked.reshape(1)
        if not -stacked.ndim <= axis < stacked.ndim:
            raise ValueError(
                f"{verb}: axis {axis} is out of range for {spec(array)} of replica {replica}"
            )
        position = int(axis) % stacked.ndim
        shape = (*stacked.shape[:position], "any", *stacked.shape[position + 1 :])
        ready.append(stacked)
        axes.append(position)
        described.append(Spec(shape, _STRINGS.get(array.dtype.kind, array.dtype)))
    return ready, axes, tuple(described)


def with_common_dtype(column: Sequence[Array], workers: Workers) -> Sequence[Array]:
    """Return arrays to concatenate with one dtype: strings get the widest width of all workers.

    Every worker must call this: the workers exchange their widths.
    """
    if column[0].dtype.kind not in _STRINGS:
        return column
    dtype = np.result_type(*(array.dtype for array in column))
    widest = max(workers.exchange(dtype.itemsize))
    if dtype.itemsize < widest:
        dtype = np.dtype((dtype.type, widest // np.dtype((dtype.type, 1)).itemsize))
    strings: Sequence[Any] = column
    return [array.astype(dtype, copy=False) for array in strings]
