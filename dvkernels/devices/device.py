"""Device: a kind (CPU, CUDA, or one of JAX) and an index."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dvkernels import html_table
from dvkernels.errors import DeviceError

__all__ = ["Device"]

_NAME = re.compile(r"((?:jax:)?[a-z]+):(0|[1-9][0-9]*)")


@dataclass(frozen=True, order=True)
class Device:
    """Device on which arrays lie and replicas compute; prints and parses as ``"cpu:0"``.

    Parameters
    ----------
    kind : str
        ``"cpu"``, ``"cuda"``, or of JAX ``"jax:tpu"`` or ``"jax:cpu"``.
    index : int
        Its number among the devices of that kind, from 0.

    Examples
    --------
    >>> import dvkernels as dv
    >>> dv.Device.parse("cpu:3").index
    3
    """

    kind: str
    index: int

    _repr_html_ = html_table.of_attributes(kind="kind", index="index")

    @classmethod
    def parse(cls, name: str) -> Device:
        """Return the device of this name; raise ``DeviceError`` if the name is malformed."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise DeviceError(
                f'expected a device name such as "cpu:0", "cuda:1" or "jax:tpu:0", got {name!r}'
            )
        return cls(match[1], int(match[2]))

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}"
