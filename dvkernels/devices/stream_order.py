"""Which stream waits for which, so that work on arrays of several streams happens in order."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from dvkernels.errors import DeviceError
from dvkernels.user_errors import shown

__all__ = ["Joined", "Lane", "crossings", "join", "pointer"]


S = TypeVar("S", bound=Hashable)


class Joined(NamedTuple, Generic[S]):
    """Where work on some arrays goes, and what orders it."""

    home: S  # the stream that gets the work
    before: tuple[S, ...]  # home waits for these, before the work
    after: tuple[S, ...]  # these wait for home, after it


def join(streams: Sequence[S]) -> Joined[S]:
    """Return how work on arrays, one stream each, is ordered: it goes to the first stream.

    What each stream was given before comes before the work, and what it is given afterwards comes
    after it. The host waits for none of them.
    """
    others = tuple(dict.fromkeys(stream for stream in streams if stream != streams[0]))
    return Joined(streams[0], others, others)


class Lane(NamedTuple):
    """A stream, and the device whose work it carries: the default stream of each is called 0."""

    device: int
    stream: int


def crossings(waiting: Iterable[Lane], awaited: Iterable[Lane]) -> list[tuple[Lane, Lane]]:
    """Return pairs of a lane that waits and one that it waits for: each for each other, once."""
    behind, before = dict.fromkeys(waiting), dict.fromkeys(awaited)
    return [(one, other) for one in behind for other in before if one != other]


def given(verb: str, stream: Any, count: int) -> list[int] | None:
    """Return one stream for each of ``count`` buffers, as the caller gave them; None: none."""
    if stream is None:
        return None
    if not isinstance(stream, (list, tuple)):
        return [pointer(verb, stream)] * count
    if len(stream) != count:
        raise DeviceError(
            f"{verb} takes one stream, or one for each of the {count} buffers; got {len(stream)}"
        )
    return [pointer(verb, one) for one in stream]


def pointer(verb: str, stream: Any) -> int:
    """Return the address by which the driver knows a stream of any library."""
    if isinstance(stream, int) and not isinstance(stream, bool):
        return stream
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        return int((protocol() if callable(protocol) else protocol)[1])
    for name in ("ptr", "cuda_stream"):  # CuPy's, PyTorch's
        found = getattr(stream, name, None)
        if isinstance(found, int):
            return found
    handle = getattr(stream, "handle", None)  # Numba's
    value = getattr(handle, "value", handle)
    if isinstance(value, int):
        return value
    raise DeviceError(
        f"{verb}: {shown(stream, 60)} is no CUDA stream: pass one of CuPy, PyTorch or Numba, its "
        "address, or None for the current ones"
    )
