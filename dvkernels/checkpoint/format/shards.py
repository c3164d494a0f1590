"""The layout of a shard: a safetensors file, written and read by ourselves.

Eight bytes with the header's length, the header (JSON), and the tensors' bytes one after another.
The package ``safetensors`` writes such a file in one piece; here each tensor goes from where it
lies to the file, block by block, while its checksum is taken.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dvkernels.checkpoint.format import json_validation
from dvkernels.errors import CheckpointDamagedError, CheckpointError
from dvkernels.user_errors import shown

__all__: list[str] = []

# What safetensors calls our dtypes. Complex numbers are stored as pairs of floats, because it
# has no name for complex128: one more axis of length 2, the real part first.
_CODES = {
    "bool": "BOOL",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "F32",
    "complex128": "F64",
}
_PAIRS = {"complex64", "complex128"}
DTYPES = {name: np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name) for name in _CODES}
MAX_HEADER_NBYTES = 100_000_000  # that of the package safetensors
MAX_NDIM = 64  # that of NumPy
MAX_NBYTES = 2**62
# The tensors' bytes begin at a multiple of this, for those who map the file into memory.
_ALIGNMENT = 64
_RESERVED = "__metadata__"


class Stored(NamedTuple):
    """How a tensor lies in its shard."""

    code: str
    shape: tuple[int, ...]


class ByteRange(NamedTuple):
    """Where a tensor lies in its shard, from the beginning of the file."""

    stored: Stored
    begin: int
    end: int


def check_machine() -> None:
    """Raise unless numbers lie in memory as they do in the files."""
    if sys.byteorder != "little":
        raise CheckpointError("checkpoints are read and written on little-endian machines only")


def stored(dtype: str, shape: Sequence[int]) -> Stored:
    """Return how a tensor of a known dtype is stored."""
    return Stored(_CODES[dtype], (*shape, 2) if dtype in _PAIRS else tuple(shape))


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor of a known dtype, whatever the size of the numbers."""
    return math.prod(shape) * DTYPES[dtype].itemsize


def dealt(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Deal names with sizes to so many, about the same to each: the largest first, to the emptiest.

    Equal sizes, in an equal order, are dealt equally.
    """
    groups: list[list[str]] = [[] for _ in range(count)]
    fill = [0] * count
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        place = fill.index(min(fill))
        groups[place].append(name)
        fill[place] += size
    return groups


def header(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Return what comes before the bytes of tensors given as (name, dtype, shape)."""
    entries: dict[str, Any] = {}
    begin = 0
    for name, dtype, shape in tensors:
        code, held = stored(dtype, shape)
        end = begin + nbytes(dtype, shape)
        entries[name] = {"dtype": code, "shape": held, "data_offsets": (begin, end)}
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-(8 + len(text)) // _ALIGNMENT) * _ALIGNMENT - 8)
    if len(text) > MAX_HEADER_NBYTES:
        raise CheckpointError(
            f"a shard's header has {len(text)} bytes; safetensors allows {MAX_HEADER_NBYTES}; "
            f"save fewer or shorter names"
        )
    return len(text).to_bytes(8, "little") + text


def header_nbytes(first: bytes, file_nbytes: int, where: str) -> int:
    """Return how long the header is, with its length, from the first 8 bytes of the file."""
    length = int.from_bytes(first, "little")
    room = min(file_nbytes - 8, MAX_HEADER_NBYTES)
    if len(first) < 8 or not 2 <= length <= room:
        raise CheckpointDamagedError(
            f"{where}: expected a header of 2 to {max(room, 2)} bytes, as the file has "
            f"{file_nbytes}; its first 8 bytes say {length}; the file is damaged"
        )
    return 8 + length


def read_header(text: bytes, file_nbytes: int, where: str) -> dict[str, ByteRange]:
    """Return where each tensor lies; the tensors must fill the file, without gap or overlap."""
    start = len(text)
    entries = json_validation.parse(text[8:], where)
    ranges: dict[str, ByteRange] = {}
    for name, entry in json_validation.items(entries, where):
        if name == _RESERVED:
            continue
        here = f"{where}, tensor {shown(name, 200)}"
        given = json_validation.fields(entry, here, {"dtype", "shape", "data_offsets"})
        code = json_validation.text(given["dtype"], f"{here}, dtype")
        shape = json_validation.counts(given["shape"], f"{here}, shape", MAX_NDIM)
        offsets = json_validation.counts(given["data_offsets"], f"{here}, data_offsets", 2)
        if len(offsets) != 2 or not offsets[0] <= offsets[1] <= file_nbytes - start:
            raise CheckpointDamagedError(
                f"{here}, data_offsets: expected two in order, up to {file_nbytes - start}; got "
                f"{list(offsets)}; the file is damaged"
            )
        ranges[name] = ByteRange(Stored(code, shape), start + offsets[0], start + offsets[1])
    place = start
    for name, held in sorted(ranges.items(), key=lambda item: (item[1].begin, item[1].end)):
        if held.begin != place:
            raise CheckpointDamagedError(
                f"{where}, tensor {shown(name, 200)}: expected its bytes to begin at {place}, "
                "where "
                f"those before it end; they begin at {held.begin}; the file is damaged"
            )
        place = held.end
    if place != file_nbytes:
        raise CheckpointDamagedError(
            f"{where}: expected the tensors to fill the file's {file_nbytes} bytes; they end at "
            f"{place}; the file is damaged"
        )
    return ranges
