"""Check that a distributed program computes the same on any number of replicas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dvkernels import pytree
from dvkernels.strategies.base import Strategy
from dvkernels.strategies.mirrored import MirroredStrategy
from dvkernels.strategies.one_device import OneDeviceStrategy
from dvkernels.values.distributed import DistributedValues
from dvkernels.variables.variable import Variable

__all__ = ["assert_same_on"]

# Sums over replicas add in another order: some rounding errors, which grow over the steps.
_RELATIVE = {"float64": 1e-9, "complex128": 1e-9, "float32": 1e-4, "complex64": 1e-4}
_RELATIVE_OF_HALVES = 2e-2


def assert_same_on(
    fn: Callable[[Strategy], Any],
    replicas: Sequence[int] = (1, 2, 3, 7),
    *,
    make: Callable[[int], Strategy] | None = None,
    rtol: float | None = None,
    atol: float = 0.0,
) -> None:
    """Assert that ``fn`` returns the same under any number of replicas as on one device.

    Parameters
    ----------
    fn : callable
        Called with a strategy; returns a pytree of arrays, numbers or variables. All components of
        a ``PerReplica`` or ``Mirrored`` in it must be equal. Called once per strategy, so it must
        start from fixed seeds.
    replicas : sequence of int
        Numbers of replicas to test.
    make : callable, optional
        Called with a number of replicas; returns a strategy. ``MirroredStrategy`` if not given.
    rtol, atol : float, optional
        Passed to ``numpy.testing.assert_allclose``. The default relative tolerance is 1e-9 for
        float64, 1e-4 for float32, 2e-2 for half types; integers must be equal.

    Raises
    ------
    AssertionError
        A result differs; the message names the number of replicas and the leaf of the pytree.

    Examples
    --------
    >>> import dvkernels as dv
    >>> import numpy as np
    >>> from dvkernels.testing import assert_same_on
    >>> def total(strategy):
    ...     data = strategy.distribute_dataset(dv.Dataset.from_arrays(np.arange(10.0)).batch(4))
    ...     return sum(strategy.reduce("sum", part, axis=0) for part in data)
    >>> assert_same_on(total)
    """
    with OneDeviceStrategy("cpu:0") as single:
        expected, structure = pytree.flatten(_as_arrays(fn(single), "one device"))
    for count in replicas:
        subject = f"{count} replicas"
        with (make or _mirrored)(count) as strategy:
            found, other = pytree.flatten(_as_arrays(fn(strategy), subject))
        assert other == structure, (
            f"{subject} returned {pytree.describe_structure(other)}, one device "
            f"{pytree.describe_structure(structure)}"
        )
        for leaf_index, (result, expected_leaf) in enumerate(zip(found, expected, strict=True)):
            got, wanted = np.asarray(result), np.asarray(expected_leaf)
            label = f"{subject}, leaf {leaf_index} of the result"
            mismatch = f"{label}: {got.dtype}{got.shape} instead of {wanted.dtype}{wanted.shape}"
            assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), mismatch
            tolerance = _tolerance(wanted.dtype) if rtol is None else rtol
            np.testing.assert_allclose(got, wanted, tolerance, atol, err_msg=label)


def _mirrored(num_replicas: int) -> Strategy:
    return MirroredStrategy([f"cpu:{k}" for k in range(num_replicas)])


def _as_arrays(nest: Any, subject: str) -> Any:
    """Return a pytree of arrays; all components of a distributed value must be equal."""

    def unwrap(leaf: Any) -> Any:
        if isinstance(leaf, Variable):
            return leaf.numpy()
        if not isinstance(leaf, DistributedValues):
            return leaf
        first, *others = leaf.values
        for replica, other in enumerate(others, start=1):
            message = f"{subject}: replica {replica} differs from replica 0 in {leaf!r}"
            np.testing.assert_array_equal(other, first, err_msg=message)
        return first

    return pytree.map_leaves(unwrap, nest)


def _tolerance(dtype: np.dtype[Any]) -> float:
    if dtype.kind not in "fcV":
        return 0.0
    return _RELATIVE.get(dtype.name, _RELATIVE_OF_HALVES)
