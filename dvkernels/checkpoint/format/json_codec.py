"""JSON codec for plain data, which round-trips exactly.

Plain data are None, bool, int, float, complex, str, bytes, NumPy scalars, and lists, tuples and
dicts of them. A value that JSON lacks is encoded as an object with one key that begins with "$":
``{"$tuple": [1, 2]}``.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from dvkernels.checkpoint.format import json_validation
from dvkernels.checkpoint.format.shards import DTYPES
from dvkernels.devices.array_spec import HostArray
from dvkernels.errors import CheckpointDamagedError, CheckpointError
from dvkernels.user_errors import brief

__all__: list[str] = []

MAX_DEPTH = 100
MAX_COUNT = 1 << 24
_MAX_BITS = 14284  # 4300 digits, the default of sys.set_int_max_str_digits
_TOO_DEEP = MAX_DEPTH + 1
_NOT_PLAIN = 1 << 30
_ATOMS = (type(None), bool, int, str)
_KEYS = (bool, int, str)
LoadArray: TypeAlias = Callable[[str], object]
_SPECIAL_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def is_plain(value: Any, heights: dict[int, int]) -> bool:
    """Return whether a value is plain data at every level, and at most MAX_DEPTH levels deep.

    ``heights`` has what is known of containers, by id; those that are visited are added.
    """
    return _height(value, 0, heights) <= MAX_DEPTH


def _height(value: Any, depth: int, heights: dict[int, int]) -> int:
    """Return the number of levels of plain data; more than MAX_DEPTH if it is not plain."""
    kind = type(value)
    if kind in (*_ATOMS, float, complex, bytes):
        return 0
    if kind not in (list, tuple, dict):
        return 0 if _is_scalar(value) else _NOT_PLAIN
    if id(value) in heights:
        return heights[id(value)]
    if depth > MAX_DEPTH:
        return _TOO_DEEP
    heights[id(value)] = _NOT_PLAIN  # while its children are visited: one that holds it is a cycle
    if kind is dict and any(type(key) not in _KEYS for key in value):
        return _NOT_PLAIN
    height = 0
    for each in value.values() if kind is dict else value:
        height = max(height, 1 + _height(each, depth + 1, heights))
        if height > MAX_DEPTH:
            if height < _NOT_PLAIN:  # too deep below the first value of the call, not in itself
                del heights[id(value)]
            return height
    heights[id(value)] = height
    return height


def _is_scalar(value: Any) -> bool:
    return isinstance(value, np.generic) and value.dtype.name in DTYPES


def encode(value: Any, where: str, save_array: Callable[[HostArray], str] | None = None) -> Any:
    """Encode plain data as JSON values.

    ``save_array``, if given, allows arrays: it stores an array and returns its name. An object
    that occurs several times is encoded once, and the occurrences share the result.
    """
    return _Encoder(where, save_array).encode(value, 0)


class _Encoded(NamedTuple):
    """Result of encoding a container."""

    json: Any
    height: int  # levels
    size: int  # values in it, counted at each occurrence
    kept: Any  # references to the value and its children, so that no other object gets their ids


class _Encoder:
    def __init__(self, where: str, save_array: Callable[[HostArray], str] | None) -> None:
        self._where = where
        self._save_array = save_array
        self._known: dict[int, _Encoded | None] = {}  # by id; None: its children are being encoded

    def encode(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind is int and value.bit_length() > _MAX_BITS:
            raise CheckpointError(
                f"{self._where}: expected whole numbers of at most {_MAX_BITS} bits; got one of "
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
        if _is_scalar(value):
            item = value.item() if value.dtype.name != "bfloat16" else float(value)
            return {"$scalar": [value.dtype.name, self.encode(item, depth)]}
        if isinstance(value, np.ndarray) and self._save_array is not None:
            return {"$array": self._save_array(value)}
        allowed = "arrays, " if self._save_array is not None else ""
        raise CheckpointError(
            f"{self._where}: expected {allowed}numbers, strings, bytes, None, or lists, tuples and "
            f"dicts of them; got {brief(value)}, a {kind.__name__}; keep it out of the checkpoint, "
            f"or save the data that it can be rebuilt from"
        )

    def _container(self, value: Any, depth: int) -> Any:
        if id(value) not in self._known:
            self._known[id(value)] = None
            self._known[id(value)] = self._encode_container(value, depth)
        known = self._known[id(value)]
        if known is None:
            raise CheckpointError(
                f"{self._where}: a {type(value).__name__} in it contains itself; "
                f"keep it out of the checkpoint"
            )
        if depth + known.height > _TOO_DEEP:
            raise CheckpointError(f"{self._where}: nested deeper than {MAX_DEPTH} levels")
        return known.json

    def _encode_container(self, value: Any, depth: int) -> _Encoded:
        if depth > MAX_DEPTH:
            raise CheckpointError(
                f"{self._where}: nested deeper than {MAX_DEPTH} levels, or contains itself"
            )
        children = list(value.values() if isinstance(value, dict) else value)
        json: Any = [self.encode(each, depth + 1) for each in children]
        below = [found for each in children if (found := self._known.get(id(each))) is not None]
        height = 1 + max((found.height for found in below), default=0)
        size = len(children) + sum(found.size for found in below)
        if size > MAX_COUNT:
            raise CheckpointError(
                f"{self._where}: expected at most {MAX_COUNT} values, counted at each place where "
                f"they occur; got more; keep large data in arrays, and refer to a large object "
                f"from one place only"
            )
        if isinstance(value, dict):
            json = self._encode_dict(list(value), json)
        elif type(value) is tuple:
            json = {"$tuple": json}
        return _Encoded(json, height, size, (value, children))

    def _encode_dict(self, keys: list[Any], values: list[Any]) -> Any:
        """Return a JSON object where all keys allow it, otherwise a list of key-value pairs."""
        for key in keys:
            if type(key) not in _KEYS:
                raise CheckpointError(
                    f"{self._where}: expected the keys of a dict to be strings or whole numbers; "
                    f"got {brief(key)}, a {type(key).__name__}"
                )
        pairs = zip(keys, values, strict=True)
        if all(type(key) is str and not key.startswith("$") for key in keys):
            return dict(pairs)
        return {"$dict": [[self.encode(key, 0), each] for key, each in pairs]}


def decode(value: Any, where: str, load_array: LoadArray | None = None) -> Any:
    """Decode plain data from the untrusted JSON values that :func:`encode` returned.

    ``load_array`` returns the array of a name.
    """
    return _decode(value, where, load_array, 0)


def _decode(value: Any, where: str, load: LoadArray | None, depth: int) -> Any:
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
    ((tag, content),) = given.items()
    here = f"{where}, {tag:.20}"
    match tag:
        case "$float":
            return _SPECIAL_FLOATS[json_validation.one_of(content, here, _SPECIAL_FLOATS)]
        case "$complex":
            return complex(*_floats(content, here, depth))
        case "$bytes":
            try:
                return base64.b64decode(json_validation.text(content, here), validate=True)
            except (binascii.Error, ValueError) as error:
                raise CheckpointDamagedError(f"{here}: expected base64: {error}") from None
        case "$tuple":
            items = json_validation.array(content, here)
            return tuple(_decode(each, where, load, depth + 1) for each in items)
        case "$dict":
            return _decode_dict(content, here, load, depth)
        case "$scalar":
            return _decode_scalar(content, here, depth)
        case "$array" if load is not None:
            return load(json_validation.text(content, here))
    raise CheckpointDamagedError(f"{where}: got the unknown name {brief(tag)}")


def _floats(value: Any, where: str, depth: int) -> list[float]:
    parts = [_decode(each, where, None, depth + 1) for each in json_validation.array(value, where)]
    if len(parts) != 2 or any(type(part) is not float for part in parts):
        raise CheckpointDamagedError(f"{where}: expected two numbers; got {brief(parts)}")
    return parts


def _decode_dict(value: Any, where: str, load: LoadArray | None, depth: int) -> Any:
    found: dict[Any, Any] = {}
    for pair in json_validation.array(value, where):
        if len(json_validation.array(pair, where)) != 2 or type(pair[0]) not in _KEYS:
            raise CheckpointDamagedError(
                f"{where}: expected pairs of a key and a value; got {brief(pair)}"
            )
        if pair[0] in found:
            raise CheckpointDamagedError(f"{where}: the key {brief(pair[0])} occurs twice")
        found[pair[0]] = _decode(pair[1], where, load, depth + 1)
    return found


def _decode_scalar(value: Any, where: str, depth: int) -> Any:
    given = json_validation.array(value, where)
    if len(given) != 2:
        raise CheckpointDamagedError(f"{where}: expected a dtype and a number; got {brief(given)}")
    dtype = DTYPES[json_validation.one_of(given[0], f"{where}, dtype", DTYPES)]
    item = _decode(given[1], where, None, depth + 1)
    kinds = {"b": bool, "i": int, "u": int, "c": complex}
    if type(item) is not kinds.get(dtype.kind, float):
        raise CheckpointDamagedError(f"{where}: expected a number of {dtype}; got {brief(item)}")
    try:
        with np.errstate(over="raise"):
            return dtype.type(item)
    except (OverflowError, FloatingPointError) as error:
        raise CheckpointDamagedError(f"{where}: expected a number of {dtype}: {error}") from None
