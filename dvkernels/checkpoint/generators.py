"""States of random generators as plain data, so that a restored one draws the same numbers.

States come from untrusted files, and NumPy's setters do not check them: a generator would read
beyond its table at a position out of range. So a state must have the structure of the generator's
current state, and every position must be in range.
"""

from __future__ import annotations

import random
from typing import Any, TypeAlias, TypeGuard

import numpy as np

from dvkernels.errors import CheckpointError
from dvkernels.user_errors import brief

__all__: list[str] = []


RandomGenerator: TypeAlias = (
    np.random.Generator | np.random.RandomState | np.random.BitGenerator | random.Random
)
# Largest valid values of the fields that a generator uses as an index or a flag.
_MAX_VALUES = {"pos": 624, "buffer_pos": 4, "has_uint32": 1, "has_gauss": 1}
_MAX_INTEGER = 2**128 - 1  # in the state of PCG64; the other generators have smaller ones


def is_generator(value: object) -> TypeGuard[RandomGenerator]:
    """Return whether a value is a random generator whose state can be saved."""
    return isinstance(value, RandomGenerator) and not isinstance(value, random.SystemRandom)


def state(generator: RandomGenerator) -> Any:
    """Return the state of a generator as plain data and arrays."""
    match generator:
        case np.random.Generator():
            return generator.bit_generator.state
        case np.random.RandomState():
            return generator.get_state(legacy=False)
        case np.random.BitGenerator():
            return generator.state
    return generator.getstate()


def kind(generator: RandomGenerator) -> str:
    """Return the name of the generator's algorithm, which a state must share."""
    inner = getattr(generator, "bit_generator", generator)
    return type(inner).__name__


def check(generator: RandomGenerator, given: Any, where: str) -> None:
    """Raise :class:`CheckpointError` unless a state is valid for the generator."""
    _compare(state(generator), given, where)


def set_state(generator: RandomGenerator, given: Any) -> None:
    """Set the state of a generator; the state has been checked."""
    match generator:
        case np.random.Generator():
            generator.bit_generator.state = given
        case np.random.RandomState():
            generator.set_state(given)
        case np.random.BitGenerator():
            generator.state = given
        case _:
            generator.setstate(given)


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
