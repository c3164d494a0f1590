"""Plain data as JSON and back, exactly: what has no identity, so that a copy is as good.

None, bool, int, float, complex, str, bytes, NumPy's scalars, and lists, tuples and dicts of them.
What JSON lacks is an object with one name that begins with "$": ``{"$tuple": [1, 2]}``.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dvkernels.checkpoint.format import json_validation
from dvkernels.checkpoint.format.shards import DTYPES
from dvkernels.errors import CheckpointDamagedError, CheckpointError
from dvkernels.user_errors import shown

__all__: list[str] = []

MAX_DEPTH = 100
MAX_COUNT = 1 << 24
_MOST_BITS = 14284  # 4300 digits, the most that Python reads unless it is told otherwise
_TOO_HIGH = MAX_DEPTH + 1
_ATOMS = (type(None), bool, int, str)
_KEYS = (bool, int, str)
_SPECIAL_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def is_plain(value: Any) -> bool:
    """Say whether a value is plain data through and through, and not too deep."""
    return _height(value, 0, {}) <= MAX_DEPTH


def _height(value: Any, depth: int, known: dict[int, int]) -> int:
    """Return how many levels of plain data there are; too many for what is none, or a circle."""
    kind = type(value)
    if kind in (*_ATOMS, float, complex, bytes):
        return 0
    if kind not in (list, tuple, dict):
        is_scalar = isinstance(value, np.generic) and value.dtype.name in DTYPES
        return 0 if is_scalar else _TOO_HIGH
    if id(value) in known or depth > MAX_DEPTH:
        return known.get(id(value), _TOO_HIGH)
    known[id(value)] = _TOO_HIGH  # until it is known: what it holds must not hold it
    if kind is dict and any(type(key) not in _KEYS for key in value):
        return _TOO_HIGH
    height = 0
    for each in value.values() if kind is dict else value:
        height = max(height, 1 + _height(each, depth + 1, known))
        if height > MAX_DEPTH:
            return _TOO_HIGH
    known[id(value)] = height
    return height


def encode(value: Any, where: str, save_array: Callable[[Any], str] | None = None) -> Any:
    """Return plain data as JSON can hold it.

    ``save_array`` allows arrays in it: it takes one and returns the name that stands for it. What
    stands at several places is gone through once, and the result stands at several places.
    """
    return _Encoder(where, save_array).encode(value, 0)


class _Encoded(NamedTuple):
    """What a container has become."""

    json: Any
    height: int  # levels
    size: int  # values in it, once for each place
    kept: Any  # the value and what it gave: so that their identities stay theirs


class _Encoder:
    def __init__(self, where: str, save_array: Callable[[Any], str] | None) -> None:
        self._where = where
        self._save_array = save_array
        self._known: dict[int, _Encoded | None] = {}  # None: what it holds is being encoded

    def encode(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind is int and value.bit_length() > _MOST_BITS:
            raise CheckpointError(
                f"{self._where}: expected whole numbers of at most {_MOST_BITS} bits; got one of "
                f"{value.bit_length()}; save it as bytes: number.to_bytes(..., signed=True)"
            )
        if kind in _ATOMS:
            return value
        if kind is float:
            return value if math.isfinite(value) else {"$float": str(value)}
        if kind is complex:
            return {"$complex": [self.encode(part, depth) for part in (value.real, value.imag)]}
        if kind is bytes:
            return {"$bytes": base64.b64encode(value).decode()}
        if kind in (list, tuple) or isinstance(value, dict):
            return self._container(value, depth)
        if isinstance(value, np.generic) and value.dtype.name in DTYPES:
            item = value.item() if value.dtype.name != "bfloat16" else float(value)
            return {"$scalar": [value.dtype.name, self.encode(item, depth)]}
        if isinstance(value, np.ndarray) and self._save_array is not None:
            return {"$array": self._save_array(value)}
        allowed = "arrays, " if self._save_array is not None else ""
        raise CheckpointError(
            f"{self._where}: expected {allowed}numbers, strings, bytes, None, or lists, tuples and "
            f"dicts of them; got {shown(value)}, a {kind.__name__}; keep it out of the checkpoint, "
            f"or save what it can be made from"
        )

    def _container(self, value: Any, depth: int) -> Any:
        if id(value) not in self._known:
            self._known[id(value)] = None
            self._known[id(value)] = self._opened(value, depth)
        known = self._known[id(value)]
        if known is None:
            raise CheckpointError(
                f"{self._where}: a {type(value).__name__} in it is in a circle, and holds itself; "
                f"keep it out of the checkpoint"
            )
        if depth + known.height > _TOO_HIGH:
            raise CheckpointError(f"{self._where}: nested deeper than {MAX_DEPTH} levels")
        return known.json

    def _opened(self, value: Any, depth: int) -> _Encoded:
        if depth > MAX_DEPTH:
            raise CheckpointError(
                f"{self._where}: nested deeper than {MAX_DEPTH} levels, or in a circle"
            )
        held = list(value.values() if isinstance(value, dict) else value)
        json: Any = [self.encode(each, depth + 1) for each in held]
        below = [found for each in held if (found := self._known.get(id(each))) is not None]
        height = 1 + max((found.height for found in below), default=0)
        size = len(held) + sum(found.size for found in below)
        if size > MAX_COUNT:
            raise CheckpointError(
                f"{self._where}: expected at most {MAX_COUNT} values, each counted once for each "
                f"place where it stands; got more; keep large data in arrays, and let what is "
                f"large stand at one place"
            )
        if isinstance(value, dict):
            json = self._named(list(value), json)
        elif type(value) is tuple:
            json = {"$tuple": json}
        return _Encoded(json, height, size, (value, held))

    def _named(self, keys: list[Any], values: list[Any]) -> Any:
        """Return a dict of any kind as an object, or as pairs where names are not enough."""
        for key in keys:
            if type(key) not in _KEYS:
                raise CheckpointError(
                    f"{self._where}: expected the keys of a dict to be strings or whole numbers; "
                    f"got {shown(key)}, a {type(key).__name__}"
                )
        pairs = zip(keys, values, strict=True)
        if all(type(key) is str and not key.startswith("$") for key in keys):
            return dict(pairs)
        return {"$dict": [[self.encode(key, 0), each] for key, each in pairs]}


def decode(value: Any, where: str, load_array: Callable[[str], Any] | None = None) -> Any:
    """Return the plain data that :func:`encode` has encoded, from JSON that anybody may have made.

    ``load_array`` returns the array that a name stands for.
    """
    return _decode(value, where, load_array, 0)


def _decode(value: Any, where: str, load: Callable[[str], Any] | None, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise CheckpointDamagedError(f"{where}: nested deeper than {MAX_DEPTH} levels")
    if type(value) in _ATOMS:
        return value
    if type(value) is float:
        if not math.isfinite(value):  # 1e999 is JSON
            raise CheckpointDamagedError(f"{where}: expected a number in the range of float64")
        return value
    if type(value) is list:
        return [_decode(each, where, load, depth + 1) for each in value]
    given = dict(json_validation.items(value, where))
    if not any(key.startswith("$") for key in given):
        return {key: _decode(each, where, load, depth + 1) for key, each in given.items()}
    if len(given) != 1:
        raise CheckpointDamagedError(
            f"{where}: expected one name that begins with '$'; got {len(given)}"
        )
    ((tag, held),) = given.items()
    here = f"{where}, {tag:.20}"
    match tag:
        case "$float":
            return _SPECIAL_FLOATS[json_validation.one_of(held, here, _SPECIAL_FLOATS)]
        case "$complex":
            return complex(*_floats(held, here, depth))
        case "$bytes":
            try:
                return base64.b64decode(json_validation.text(held, here), validate=True)
            except (binascii.Error, ValueError) as error:
                raise CheckpointDamagedError(f"{here}: expected base64: {error}") from None
        case "$tuple":
            listed = json_validation.array(held, here)
            return tuple(_decode(each, where, load, depth + 1) for each in listed)
        case "$dict":
            return _decode_dict(held, here, load, depth)
        case "$scalar":
            return _decode_scalar(held, here, depth)
        case "$array" if load is not None:
            return load(json_validation.text(held, here))
    raise CheckpointDamagedError(f"{where}: got the unknown name {shown(tag)}")


def _floats(value: Any, where: str, depth: int) -> list[float]:
    parts = [_decode(each, where, None, depth + 1) for each in json_validation.array(value, where)]
    if len(parts) != 2 or any(type(part) is not float for part in parts):
        raise CheckpointDamagedError(f"{where}: expected two numbers; got {shown(parts)}")
    return parts


def _decode_dict(value: Any, where: str, load: Callable[[str], Any] | None, depth: int) -> Any:
    found: dict[Any, Any] = {}
    for pair in json_validation.array(value, where):
        if len(json_validation.array(pair, where)) != 2 or type(pair[0]) not in _KEYS:
            raise CheckpointDamagedError(
                f"{where}: expected pairs of a key and a value; got {shown(pair)}"
            )
        if pair[0] in found:
            raise CheckpointDamagedError(f"{where}: the key {shown(pair[0])} stands there twice")
        found[pair[0]] = _decode(pair[1], where, load, depth + 1)
    return found


def _decode_scalar(value: Any, where: str, depth: int) -> Any:
    given = json_validation.array(value, where)
    if len(given) != 2:
        raise CheckpointDamagedError(f"{where}: expected a dtype and a number; got {shown(given)}")
    dtype = DTYPES[json_validation.one_of(given[0], f"{where}, dtype", DTYPES)]
    item = _decode(given[1], where, None, depth + 1)
    kinds = {"b": bool, "i": int, "u": int, "c": complex}
    if type(item) is not kinds.get(dtype.kind, float):
        raise CheckpointDamagedError(f"{where}: expected a number of {dtype}; got {shown(item)}")
    try:
        with np.errstate(over="raise"):
            return dtype.type(item)
    except (OverflowError, FloatingPointError) as error:
        raise CheckpointDamagedError(f"{where}: expected a number of {dtype}: {error}") from None
