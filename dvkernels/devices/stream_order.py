"""Order between CUDA streams: the pairs of streams of which one must wait for the other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from dvkernels.errors import DeviceError
from dvkernels.user_errors import brief

__all__ = ["DeviceStream", "per_buffer", "stream_handle", "wait_pairs"]


class DeviceStream(NamedTuple):
    """CUDA stream and its device; the default stream of each device is 0."""

    device: int
    stream: int


def wait_pairs(
    waiting: Iterable[DeviceStream], awaited: Iterable[DeviceStream]
) -> list[tuple[DeviceStream, DeviceStream]]:
    """Return all pairs (waiting stream, awaited stream) of two different streams, each once."""
    waits, awaits = dict.fromkeys(waiting), dict.fromkeys(awaited)
    return [(first, second) for first in waits for second in awaits if first != second]


def per_buffer(verb: str, stream: Any, count: int) -> list[int] | None:
    """Return the stream of each of ``count`` buffers; None if the caller gave no streams."""
    if stream is None:
        return None
    if not isinstance(stream, (list, tuple)):
        return [stream_handle(verb, stream)] * count
    if len(stream) != count:
        raise DeviceError(
            f"{verb} takes one stream, or one for each of the {count} buffers; got {len(stream)}"
        )
    return [stream_handle(verb, each) for each in stream]


def stream_handle(verb: str, stream: Any) -> int:
    """Return the driver's handle of a stream of any library."""
    if isinstance(stream, int) and not isinstance(stream, bool):
        return stream
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        return int((protocol() if callable(protocol) else protocol)[1])
    for name in ("ptr", "cuda_stream"):  # CuPy's, PyTorch's
        address = getattr(stream, name, None)
        if isinstance(address, int):
            return address
    handle = getattr(stream, "handle", None)  # Numba's
    value = getattr(handle, "value", handle)
    if isinstance(value, int):
        return value
    raise DeviceError(
        f"{verb}: {brief(stream, 60)} is no CUDA stream: pass a stream of CuPy, PyTorch or Numba, "
        "its address, or None for the current streams"
    )
