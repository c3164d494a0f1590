"""NVTX ranges: the spans of a trace, for NVIDIA's tools, by the optional package ``nvtx``."""

from __future__ import annotations

import importlib
from typing import Any

__all__: list[str] = []


class NvtxRanges:
    """Stack of NVTX ranges of each thread, in the domain ``dvkernels``."""

    def __init__(self) -> None:
        try:
            nvtx: Any = importlib.import_module("nvtx")
        except ImportError as error:
            raise ImportError(
                "trace(nvtx=True) needs the package nvtx: python -m pip install nvtx, or leave "
                "nvtx out"
            ) from error
        self._domain = nvtx.Domain("dvkernels")
        self._attributes: dict[str, Any] = {}  # by name; made once

    def push(self, name: str) -> None:
        """Begin a range on this thread."""
        attributes = self._attributes.get(name)
        if attributes is None:
            attributes = self._attributes[name] = self._domain.get_event_attributes(message=name)
        self._domain.push_range(attributes)

    def pop(self) -> None:
        """End the range that this thread has begun last."""
        self._domain.pop_range()
