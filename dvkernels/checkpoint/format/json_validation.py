"""Validation of untrusted JSON values, field by field.

Each function returns its argument, now known to have the type that the function names, or raises
:class:`CheckpointDamagedError` with the location, the expected value and the one found.

The package msgspec (0.23, tried in November 2026) cannot take this over: it takes the last of two
fields of one name, where a file of two meanings must be refused; its errors leave out the keys of
objects (``$.tensors[...].file``), so they do not name the tensor; and they do not show the value
that they refuse. Parsed by ``json`` first, for the sake of the former, hardly a line would go.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Set
from typing import Any, NoReturn, TypeVar

from dvkernels.errors import CheckpointDamagedError
from dvkernels.user_errors import brief

__all__: list[str] = []

T = TypeVar("T")


def parse(content: bytes, where: str) -> Any:
    """Parse JSON; a key that occurs twice in an object is an error."""
    try:
        return json.loads(
            content.decode(), object_pairs_hook=_without_duplicates, parse_constant=_refuse
        )
    # RecursionError: nested too deeply. ValueError: not JSON, not UTF-8, or a number of too many
    # digits.
    except (ValueError, RecursionError) as error:
        raise CheckpointDamagedError(f"{where}: expected JSON: {error!s:.200}") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {brief(name, 200)} occurs twice in an object")
        found[name] = value
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def fields(
    value: Any, where: str, required: Set[str], optional: Set[str] = frozenset()
) -> dict[str, Any]:
    """Return an object that has all required fields and no others but the optional ones."""
    found = dict(items(value, where))
    if missing := required - found.keys():
        _fail(where, f"the fields {_listed(required)}", f"none named {_listed(missing)}")
    if unknown := found.keys() - required - optional:
        _fail(where, f"the fields {_listed(required | optional)}", f"also {_listed(unknown)}")
    return found


def items(value: Any, where: str) -> Iterable[tuple[str, Any]]:
    """Return the names and values of an object."""
    return _instance(value, where, dict, "an object").items()


def array(value: Any, where: str) -> list[Any]:
    """Return an array."""
    return _instance(value, where, list, "an array")


def text(value: Any, where: str) -> str:
    """Return a string."""
    return _instance(value, where, str, "a string")


def _instance(value: Any, where: str, kind: type[T], expected: str) -> T:
    if not isinstance(value, kind):
        _fail(where, expected, _shown(value))
    return value


def count(value: Any, where: str, most: int = 2**63 - 1) -> int:
    """Return a whole number from 0 to ``most``."""
    if type(value) is not int or not 0 <= value <= most:  # true is an int, in Python
        _fail(where, f"a whole number from 0 to {most}", _shown(value))
    return value


def counts(value: Any, where: str, longest: int) -> tuple[int, ...]:
    """Return an array of whole numbers, at most ``longest`` of them."""
    given = array(value, where)
    if len(given) > longest:
        _fail(where, f"at most {longest} numbers", str(len(given)))
    return tuple(count(each, where) for each in given)


def one_of(value: Any, where: str, allowed: Iterable[Any]) -> Any:
    """Return a value that equals an allowed one and has its type."""
    known = list(allowed)
    if not any(type(value) is type(each) and value == each for each in known):
        _fail(where, f"one of {_listed(known)}", _shown(value))
    return value


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(sorted(_shown(name) for name in itertools.islice(names, 100)))


def _fail(where: str, expected: str, got: str) -> NoReturn:
    raise CheckpointDamagedError(f"{where}: expected {expected}; got {got}; the file is damaged")


def _shown(value: Any) -> str:
    return repr(value)[:200]
