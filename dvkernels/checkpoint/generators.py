"""States of random generators as plain data, so that a restored one draws the same numbers.

States come from untrusted files, and NumPy's setters do not check them: a generator would read
beyond its table at a position out of range. So a state must have the structure of the generator's
current state, and every position must be in range.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dvkernels.errors import CheckpointError
from dvkernels.user_errors import brief

__all__: list[str] = []


class _StateAccess(NamedTuple):
    """Getter and setter of the state of one class of generators."""

    get: Callable[[Any], Any]
    set: Callable[[Any, Any], None]


def _set_bits(generator: Any, state: Any) -> None:
    generator.bit_generator.state = state


def _set_own(generator: Any, state: Any) -> None:
    generator.state = state


_STATE_ACCESS: dict[type, _StateAccess] = {
    np.random.Generator: _StateAccess(lambda generator: generator.bit_generator.state, _set_bits),
    np.random.RandomState: _StateAccess(
        lambda generator: generator.get_state(legacy=False),
        lambda generator, state: generator.set_state(state),
    ),
    np.random.BitGenerator: _StateAccess(lambda generator: generator.state, _set_own),
    random.Random: _StateAccess(
        lambda generator: generator.getstate(),
        lambda generator, state: generator.setstate(state),
    ),
}

# Largest valid values of the fields that a generator uses as an index or a flag.
_MAX_VALUES = {"pos": 624, "buffer_pos": 4, "has_uint32": 1, "has_gauss": 1}
_MAX_INTEGER = 2**128 - 1  # in the state of PCG64; the other generators have smaller ones


def is_generator(value: Any) -> bool:
    """Return whether a value is a random generator whose state can be saved."""
    return _find_access(value) is not None


def state(generator: Any) -> Any:
    """Return the state of a generator as plain data and arrays."""
    return _access(generator).get(generator)


def kind(generator: Any) -> str:
    """Return the name of the generator's algorithm, which a state must share."""
    inner = getattr(generator, "bit_generator", generator)
    return type(inner).__name__


def check(generator: Any, given: Any, where: str) -> None:
    """Raise :class:`CheckpointError` unless a state is valid for the generator."""
    _compare(state(generator), given, where)


def set_state(generator: Any, given: Any) -> None:
    """Set the state of a generator; the state has been checked."""
    _access(generator).set(generator, given)


def _find_access(value: Any) -> _StateAccess | None:
    if isinstance(value, random.SystemRandom):  # it has no state
        return None
    return next((each for kind, each in _STATE_ACCESS.items() if isinstance(value, kind)), None)


def _access(generator: Any) -> _StateAccess:
    found = _find_access(generator)
    assert found is not None
    return found


def _compare(current: Any, given: Any, where: str) -> None:
    fits = type(current) is type(given) or {type(current), type(given)} <= {type(None), float}
    if fits and isinstance(current, dict):
        fits = current.keys() == given.keys()
    elif fits and isinstance(current, tuple):
        fits = len(current) == len(given)
    elif fits and isinstance(current, np.ndarray):
        fits = current.dtype == given.dtype and current.shape == given.shape
    elif fits and isinstance(current, str):
        fits = current == given
    elif fits and type(current) is int:
        fits = 0 <= given <= _MAX_INTEGER
    if not fits:
        raise CheckpointError(
            f"{where}: expected the state of a generator like this one, {brief(current)}; got "
            f"{brief(given)}; create the generator as it was created before the save"
        )
    if isinstance(current, dict):
        for name in current:
            limit = _MAX_VALUES.get(name, _MAX_INTEGER)
            if type(given[name]) is int and given[name] > limit:
                raise CheckpointError(
                    f"{where}, {name}: expected at most {limit}; got {brief(given[name])}; the "
                    f"file is damaged"
                )
            _compare(current[name], given[name], f"{where}, {name}")
    elif isinstance(current, tuple):
        for mine, theirs in zip(current, given, strict=True):
            _compare(mine, theirs, where)
