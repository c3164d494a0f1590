"""Plain data as JSON and back, exactly: what has no identity, so that a copy is as good.

None, bool, int, float, complex, str, bytes, NumPy's scalars, and lists, tuples and dicts of them.
What JSON lacks is an object with one name that begins with "$": ``{"$tuple": [1, 2]}``.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from dvkernels.checkpoint import untrusted
from dvkernels.checkpoint.shards import DTYPES
from dvkernels.errors import CheckpointDamagedError, CheckpointError
from dvkernels.user_errors import shown

__all__: list[str] = []

MAX_DEPTH = 100
_ATOMS = (type(None), bool, int, str)
_KEYS = (bool, int, str)
_SPECIAL_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def is_plain(value: Any, depth: int = 0) -> bool:
    """Say whether a value is plain data through and through."""
    kind = type(value)
    if kind in (*_ATOMS, float, complex, bytes):
        return True
    if kind in (list, tuple):
        return depth < MAX_DEPTH and all(is_plain(each, depth + 1) for each in value)
    if kind is dict:
        return depth < MAX_DEPTH and all(
            type(key) in _KEYS and is_plain(each, depth + 1) for key, each in value.items()
        )
    return isinstance(value, np.generic) and value.dtype.name in DTYPES


def encode(value: Any, where: str, save_array: Callable[[Any], str] | None = None) -> Any:
    """Return plain data as JSON can hold it.

    ``save_array`` allows arrays in it: it takes one and returns the name that stands for it.
    """
    return _encode(value, where, save_array, 0)


def _encode(value: Any, where: str, save: Callable[[Any], str] | None, depth: int) -> Any:
    kind = type(value)
    if depth > MAX_DEPTH:
        raise CheckpointError(f"{where}: nested deeper than {MAX_DEPTH} levels, or in a circle")
    if kind in _ATOMS:
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if kind is complex:
        parts = (value.real, value.imag)
        return {"$complex": [_encode(part, where, save, depth + 1) for part in parts]}
    if kind is bytes:
        return {"$bytes": base64.b64encode(value).decode()}
    if kind in (list, tuple):
        listed = [_encode(each, where, save, depth + 1) for each in value]
        return listed if kind is list else {"$tuple": listed}
    if isinstance(value, dict):
        return _encode_dict(value, where, save, depth)
    if isinstance(value, np.generic) and value.dtype.name in DTYPES:
        item = value.item() if value.dtype.name != "bfloat16" else float(value)
        return {"$scalar": [value.dtype.name, _encode(item, where, save, depth + 1)]}
    if isinstance(value, np.ndarray) and save is not None:
        return {"$array": save(value)}
    allowed = "arrays, " if save is not None else ""
    raise CheckpointError(
        f"{where}: expected {allowed}numbers, strings, bytes, None, or lists, tuples and dicts of "
        f"them; got {shown(value)}, a {kind.__name__}; keep it out of the checkpoint, or save what "
        f"it can be made from"
    )


def _encode_dict(
    value: dict[Any, Any], where: str, save: Callable[[Any], str] | None, depth: int
) -> Any:
    """Return a dict of any kind as an object, or as a list of pairs where names are not enough."""
    for key in value:
        if type(key) not in _KEYS:
            raise CheckpointError(
                f"{where}: expected the keys of a dict to be strings or whole numbers; got "
                f"{shown(key)}, a {type(key).__name__}"
            )
    held = [(key, _encode(each, where, save, depth + 1)) for key, each in value.items()]
    if all(type(key) is str and not key.startswith("$") for key, _ in held):
        return dict(held)
    return {"$dict": [[key, each] for key, each in held]}


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
    given = dict(untrusted.items(value, where))
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
            return _SPECIAL_FLOATS[untrusted.one_of(held, here, _SPECIAL_FLOATS)]
        case "$complex":
            return complex(*_floats(held, here, depth))
        case "$bytes":
            try:
                return base64.b64decode(untrusted.text(held, here), validate=True)
            except (binascii.Error, ValueError) as error:
                raise CheckpointDamagedError(f"{here}: expected base64: {error}") from None
        case "$tuple":
            listed = untrusted.array(held, here)
            return tuple(_decode(each, where, load, depth + 1) for each in listed)
        case "$dict":
            return _decode_dict(held, here, load, depth)
        case "$scalar":
            return _decode_scalar(held, here, depth)
        case "$array" if load is not None:
            return load(untrusted.text(held, here))
    raise CheckpointDamagedError(f"{where}: got the unknown name {tag!r:.80}")


def _floats(value: Any, where: str, depth: int) -> list[float]:
    parts = [_decode(each, where, None, depth + 1) for each in untrusted.array(value, where)]
    if len(parts) != 2 or any(type(part) is not float for part in parts):
        raise CheckpointDamagedError(f"{where}: expected two numbers; got {parts!r:.80}")
    return parts


def _decode_dict(value: Any, where: str, load: Callable[[str], Any] | None, depth: int) -> Any:
    found: dict[Any, Any] = {}
    for pair in untrusted.array(value, where):
        if len(untrusted.array(pair, where)) != 2 or type(pair[0]) not in _KEYS:
            raise CheckpointDamagedError(
                f"{where}: expected pairs of a key and a value; got {pair!r:.80}"
            )
        if pair[0] in found:
            raise CheckpointDamagedError(f"{where}: the key {pair[0]!r:.80} stands there twice")
        found[pair[0]] = _decode(pair[1], where, load, depth + 1)
    return found


def _decode_scalar(value: Any, where: str, depth: int) -> Any:
    given = untrusted.array(value, where)
    if len(given) != 2:
        raise CheckpointDamagedError(f"{where}: expected a dtype and a number; got {given!r:.80}")
    dtype = DTYPES[untrusted.one_of(given[0], f"{where}, dtype", DTYPES)]
    item = _decode(given[1], where, None, depth + 1)
    kinds = {"b": bool, "i": int, "u": int, "c": complex}
    if type(item) is not kinds.get(dtype.kind, float):
        raise CheckpointDamagedError(f"{where}: expected a number of {dtype}; got {item!r:.80}")
    try:
        with np.errstate(over="raise"):
            return dtype.type(item)
    except (OverflowError, FloatingPointError) as error:
        raise CheckpointDamagedError(f"{where}: expected a number of {dtype}: {error}") from None
