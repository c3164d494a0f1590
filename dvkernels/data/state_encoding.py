"""JSON encoding of the states of readers: arrays, tensors and bytes too, without pickle.

JSON's own types stay as they are. Any other value becomes a dict whose key ``"dvkernels"`` names
its type; decoding restores the value, and constructs no types but those listed here.
"""

from __future__ import annotations

import base64
import importlib
import math
from typing import Any

import numpy as np

from dvkernels.devices import interop
from dvkernels.devices.array_spec import HostArray
from dvkernels.errors import DatasetError
from dvkernels.user_errors import brief

__all__: list[str] = []

_TAG = "dvkernels"


def encode(value: Any, where: str) -> Any:
    """Return a value in the types of JSON; error messages call the value ``where``.

    Raises
    ------
    DatasetError
        A part of it is none of None, bool, int, float, str, bytes, a NumPy array or scalar, a
        PyTorch tensor, or a list, tuple or dict of these. The message names the part.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [encode(part, f"{where}[{k}]") for k, part in enumerate(value)]
    if isinstance(value, tuple):
        return {_TAG: "tuple", "items": encode(list(value), where)}
    if isinstance(value, dict):
        parts = [(key, encode(part, f"{where}[{brief(key)}]")) for key, part in value.items()]
        if _TAG not in value and all(isinstance(key, str) for key in value):
            return dict(parts)
        return {_TAG: "dict", "items": [[encode(key, where), part] for key, part in parts]}
    if isinstance(value, bytes | bytearray):
        return {_TAG: "bytes", "base64": _base64(value)}
    if isinstance(value, np.ndarray | np.generic) and not isinstance(value, np.ma.MaskedArray):
        array = np.asarray(value)
        if array.dtype == _dtype_named(_dtype_name(array.dtype)):
            kind = "scalar" if isinstance(value, np.generic) else "array"
            return {_TAG: kind, **_encode_array(array)}
    if type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach"):
        tensor = value.detach().cpu().contiguous()
        bits = np.asarray(tensor.reshape(-1).view(_torch().uint8))
        name = str(tensor.dtype).removeprefix("torch.")
        return {_TAG: "tensor", "dtype": name, "shape": [*tensor.shape], "base64": _base64(bits)}
    raise DatasetError(
        f"state_dict: expected {where} to hold numbers, text, bytes, arrays, and lists, tuples and "
        f"dicts of them; got {brief(value)}, a {type(value).__name__}; leave it out of the state, "
        "or save values from which it can be rebuilt"
    )


def decode(value: Any) -> Any:
    """Return the value that :func:`encode` was given; :class:`DatasetError` if it is damaged."""
    if isinstance(value, list):
        return [decode(part) for part in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: decode(part) for key, part in value.items()}
    try:
        return _DECODERS[value[_TAG]](value)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise DatasetError(
            f"load_state_dict: expected an encoded part of a reader's state; got {brief(value)} "
            f"({type(error).__name__}: {error}); the state is damaged"
        ) from error


def _base64(data: Any) -> str:
    return base64.b64encode(data).decode("ascii")


def _decode_bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _encode_array(array: HostArray) -> dict[str, Any]:
    little = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
    data = _base64(little.reshape(-1).view(np.uint8)) if array.size else ""
    return {"dtype": _dtype_name(array.dtype), "shape": [*array.shape], "base64": data}


def _decode_array(encoded: dict[str, Any]) -> HostArray:
    dtype, shape, data = (
        _dtype_named(encoded["dtype"]),
        encoded["shape"],
        _decode_bytes(encoded["base64"]),
    )
    if dtype is None or len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(data)} bytes are no {encoded['dtype']} of shape {shape}")
    array = np.frombuffer(data, dtype.newbyteorder("<")).reshape(shape)
    return array.astype(dtype)  # a writable copy


def _decode_tensor(encoded: dict[str, Any]) -> Any:
    torch = _torch()
    dtype, data = getattr(torch, encoded["dtype"]), bytearray(_decode_bytes(encoded["base64"]))
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{encoded['dtype']} is no dtype of PyTorch")
    if not data:
        return torch.empty(encoded["shape"], dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(encoded["shape"])


def _torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise DatasetError(
            "load_state_dict: the state holds a tensor, and PyTorch is not installed here; install "
            "it, or start afresh"
        ) from error


def _dtype_name(dtype: np.dtype[Any]) -> str:
    return dtype.name if dtype.kind == "V" else dtype.str  # V: bfloat16 and other extension types


def _dtype_named(name: str) -> np.dtype[Any] | None:
    """Return the dtype of numbers, dates or text with this name, None if there is none."""
    try:
        found = interop.dtype_named(name)
    except (TypeError, ImportError):
        return None
    return None if found.hasobject or found.names else found


_DECODERS: dict[str, Any] = {
    "tuple": lambda encoded: tuple(decode(encoded["items"])),
    "dict": lambda encoded: {decode(key): decode(part) for key, part in encoded["items"]},
    "bytes": lambda encoded: _decode_bytes(encoded["base64"]),
    "array": _decode_array,
    "scalar": lambda encoded: _decode_array(encoded)[()],
    "tensor": _decode_tensor,
}
