"""What tells the data of one dataset from those of another: values, or what they hold."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from dvkernels import reduce_op
from dvkernels.data.array_nest import as_array, flatten, leaf_names, outline
from dvkernels.data.node import Node

__all__ = ["fingerprint", "kinds_of"]

_PIECE_BYTES = 2**24  # hashed at a time, where an array has to be copied for it


def fingerprint(node: Node) -> str:
    """Return what differs, almost surely, where what :meth:`Node.sample` yields does.

    It is found once for each source; what the data become later is told by the pipeline.
    """
    return "/".join(_of_source(link) for link in node.links() if not link.sources)


def kinds_of(element: Any) -> str:
    """Say what an element holds, in words that are the same for all elements of a dataset."""
    return outline(element, "element", _kind)


def _kind(dtype: np.dtype[Any], shape: tuple[int, ...]) -> str:
    kind = reduce_op.kind(dtype)
    return "numbers" if kind in "biufc" else {"S": "bytes", "U": "text"}.get(kind, str(dtype))


def _of_source(node: Node) -> str:
    held = vars(node).get("fingerprint")
    if held is None:
        digest = hashlib.blake2b(digest_size=16)
        try:
            for part in node.sample():
                _add(digest, part)
        except Exception as error:  # which whoever reads that element will see
            digest.update(type(error).__qualname__.encode())
        held = vars(node)["fingerprint"] = digest.hexdigest()
    return str(held)


def _add(digest: Any, element: Any) -> None:
    leaves, _ = flatten(element)
    for name, leaf in zip(leaf_names(element, "element"), leaves, strict=True):
        array = as_array(leaf, "fingerprint", name)
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        if array.dtype.hasobject:  # whose bytes are addresses
            digest.update(type(leaf).__qualname__.encode())
            continue
        rows = array.reshape(1) if array.ndim == 0 else array
        count = max(1, _PIECE_BYTES // max(1, rows.nbytes // max(1, len(rows))))
        for start in range(0, len(rows), count):
            piece = np.ascontiguousarray(rows[start : start + count])
            digest.update(piece.reshape(-1).view(np.uint8).data)
