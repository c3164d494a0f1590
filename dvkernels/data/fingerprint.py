"""Fingerprint of the data of a pipeline, and outline of the kinds of its elements."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from dvkernels import reduce_op
from dvkernels.data.array_nest import Element, as_array, outline
from dvkernels.data.node import Node
from dvkernels.pytree import flatten, leaf_names

__all__: list[str] = []

_CHUNK_BYTES = 2**24  # hashed at a time, which bounds the copy of an array not contiguous


def fingerprint(node: Node) -> str:
    """Return the digests of what :meth:`Node.sample` yields of each source of a pipeline.

    They are computed once per source. The transforms are compared by ``Node.pipeline``.
    """
    return "/".join(_of_source(link) for link in node.links() if not link.sources)


def kinds_of(element: Element) -> str:
    """Return the kinds of the leaves of an element, the same text for all elements of a dataset."""
    return outline(element, "element", _kind)


def _kind(dtype: np.dtype[Any], shape: tuple[int, ...]) -> str:
    kind = reduce_op.kind(dtype)
    return "numbers" if kind in "biufc" else {"S": "bytes", "U": "text"}.get(kind, str(dtype))


def _of_source(node: Node) -> str:
    known = vars(node).get("fingerprint")
    if known is None:
        digest = hashlib.blake2b(digest_size=16)
        try:
            for part in node.sample():
                _add(digest, part)
        except Exception as error:  # raised again to whoever reads that element
            digest.update(type(error).__qualname__.encode())
        known = vars(node)["fingerprint"] = digest.hexdigest()
    return str(known)


def _add(digest: Any, element: Element) -> None:
    leaves, _ = flatten(element)
    for name, leaf in zip(leaf_names(element, "element"), leaves, strict=True):
        array = as_array(leaf, "fingerprint", name)
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        if array.dtype.hasobject:  # its bytes are addresses
            digest.update(type(leaf).__qualname__.encode())
            continue
        rows = array.reshape(1) if array.ndim == 0 else array
        count = max(1, _CHUNK_BYTES // max(1, rows.nbytes // max(1, len(rows))))
        for start in range(0, len(rows), count):
            chunk = np.ascontiguousarray(rows[start : start + count])
            digest.update(chunk.reshape(-1).view(np.uint8).data)
