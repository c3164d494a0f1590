"""Random generators: the place each is at, as plain data, so that it goes on with the same numbers.

States come from files that anybody may have written, and NumPy's own setters trust them: a
position beyond the end of a table would be read from beyond it. So a state must look like the one
that the generator has now, and every position must be in range.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dvkernels.errors import CheckpointError
from dvkernels.user_errors import shown

__all__: list[str] = []


class _Row(NamedTuple):
    """How a kind of generator tells its state, and is told one."""

    get: Callable[[Any], Any]
    set: Callable[[Any, Any], None]


def _set_bits(generator: Any, state: Any) -> None:
    generator.bit_generator.state = state


def _set_own(generator: Any, state: Any) -> None:
    generator.state = state


_ROWS: dict[type, _Row] = {
    np.random.Generator: _Row(lambda generator: generator.bit_generator.state, _set_bits),
    np.random.RandomState: _Row(
        lambda generator: generator.get_state(legacy=False),
        lambda generator, state: generator.set_state(state),
    ),
    np.random.BitGenerator: _Row(lambda generator: generator.state, _set_own),
    random.Random: _Row(
        lambda generator: generator.getstate(),
        lambda generator, state: generator.setstate(state),
    ),
}

# The largest value of what a generator uses as an index, or as yes or no.
_MOST = {"pos": 624, "buffer_pos": 4, "has_uint32": 1, "has_gauss": 1}
_MOST_INTEGER = 2**128 - 1  # of PCG64, the largest that any of them has


def is_generator(value: Any) -> bool:
    """Say whether this is a random generator whose state can be saved."""
    return _row(value) is not None


def state(generator: Any) -> Any:
    """Return where a generator is: plain data and arrays."""
    return _known(generator).get(generator)


def kind(generator: Any) -> str:
    """Return what must be the same for a state to fit."""
    inner = getattr(generator, "bit_generator", generator)
    return type(inner).__name__


def check(generator: Any, given: Any, where: str) -> None:
    """Raise :class:`CheckpointError` unless it is a state that the generator can take."""
    _compare(state(generator), given, where)


def set_state(generator: Any, given: Any) -> None:
    """Take a generator to a place; the state has been checked."""
    _known(generator).set(generator, given)


def _row(value: Any) -> _Row | None:
    if isinstance(value, random.SystemRandom):  # it has no state
        return None
    return next((row for kind, row in _ROWS.items() if isinstance(value, kind)), None)


def _known(generator: Any) -> _Row:
    row = _row(generator)
    assert row is not None
    return row


def _compare(own: Any, given: Any, where: str) -> None:
    fits = type(own) is type(given) or {type(own), type(given)} <= {type(None), float}
    if fits and isinstance(own, dict):
        fits = own.keys() == given.keys()
    elif fits and isinstance(own, tuple):
        fits = len(own) == len(given)
    elif fits and isinstance(own, np.ndarray):
        fits = own.dtype == given.dtype and own.shape == given.shape
    elif fits and isinstance(own, str):
        fits = own == given
    elif fits and type(own) is int:
        fits = 0 <= given <= _MOST_INTEGER
    if not fits:
        raise CheckpointError(
            f"{where}: expected the state of a generator like this one, {shown(own)}; got "
            f"{shown(given)}; make the generator as it was made when it was saved"
        )
    if isinstance(own, dict):
        for name in own:
            most = _MOST.get(name, _MOST_INTEGER)
            if type(given[name]) is int and given[name] > most:
                raise CheckpointError(
                    f"{where}, {name}: expected at most {most}; got {shown(given[name])}; the file "
                    f"is damaged"
                )
            _compare(own[name], given[name], f"{where}, {name}")
    elif isinstance(own, tuple):
        for mine, theirs in zip(own, given, strict=True):
            _compare(mine, theirs, where)
