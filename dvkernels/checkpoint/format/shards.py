"""Layout of a shard, a safetensors file.

Eight bytes with the length of the header, the header (JSON), and the bytes of one tensor after
another. The package ``safetensors`` serializes the whole file in memory; here each tensor is
written from its own memory, block by block, while its checksum is computed.
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
from dvkernels.user_errors import brief

__all__: list[str] = []

# The dtypes and their safetensors codes. Complex numbers are stored as pairs of floats, because
# safetensors has no code for complex128: one more axis of length 2, the real part first.
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
MAX_HEADER_NBYTES = 100_000_000  # the limit of the package safetensors
MAX_NDIM = 64  # the limit of NumPy
MAX_NBYTES = 2**62
# Alignment of the first tensor, for readers that map the file into memory.
_ALIGNMENT = 64
_RESERVED = "__metadata__"


class SafetensorsSpec(NamedTuple):
    """Dtype code and shape of a tensor in a safetensors header."""

    code: str
    shape: tuple[int, ...]


class ByteRange(NamedTuple):
    """Byte range of a tensor in its shard; offsets count from the beginning of the file."""

    spec: SafetensorsSpec
    begin: int
    end: int


def check_machine() -> None:
    """Raise unless this machine has the byte order of the files."""
    if sys.byteorder != "little":
        raise CheckpointError("checkpoints are read and written on little-endian machines only")


def safetensors_spec(dtype: str, shape: Sequence[int]) -> SafetensorsSpec:
    """Return the dtype code and the shape under which a tensor is stored."""
    return SafetensorsSpec(_CODES[dtype], (*shape, 2) if dtype in _PAIRS else tuple(shape))


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the size of a tensor in bytes, as a Python integer, which cannot overflow."""
    return math.prod(shape) * DTYPES[dtype].itemsize


def balanced_groups(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Partition names into ``count`` groups of about the same total size.

    Greedy, largest first, each to the group with the least so far: at most 4/3 of the best
    possible largest group [1]_. The result depends on the sizes and their order alone.

    References
    ----------
    .. [1] R. L. Graham, SIAM J. Appl. Math. 17(2), 416-429 (1969), doi:10.1137/0117039.
    """
    groups: list[list[str]] = [[] for _ in range(count)]
    totals = [0] * count
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        smallest = totals.index(min(totals))
        groups[smallest].append(name)
        totals[smallest] += size
    return groups


def header(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Return the length and header of a shard, given (name, dtype, shape) of its tensors."""
    entries: dict[str, Any] = {}
    begin = 0
    for name, dtype, shape in tensors:
        code, stored_shape = safetensors_spec(dtype, shape)
        end = begin + nbytes(dtype, shape)
        entries[name] = {"dtype": code, "shape": stored_shape, "data_offsets": (begin, end)}
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
    """Return the size of the header and its length, from the first 8 bytes of the file."""
    length = int.from_bytes(first, "little")
    limit = min(file_nbytes - 8, MAX_HEADER_NBYTES)
    if len(first) < 8 or not 2 <= length <= limit:
        raise CheckpointDamagedError(
            f"{where}: expected a header of 2 to {max(limit, 2)} bytes, as the file has "
            f"{file_nbytes}; its first 8 bytes say {length}; the file is damaged"
        )
    return 8 + length


def read_header(text: bytes, file_nbytes: int, where: str) -> dict[str, ByteRange]:
    """Return the byte range of each tensor; they must fill the file without gap or overlap."""
    start = len(text)
    entries = json_validation.parse(text[8:], where)
    ranges: dict[str, ByteRange] = {}
    for name, entry in json_validation.items(entries, where):
        if name == _RESERVED:
            continue
        here = f"{where}, tensor {brief(name, 200)}"
        given = json_validation.fields(entry, here, {"dtype", "shape", "data_offsets"})
        code = json_validation.text(given["dtype"], f"{here}, dtype")
        shape = json_validation.counts(given["shape"], f"{here}, shape", MAX_NDIM)
        offsets = json_validation.counts(given["data_offsets"], f"{here}, data_offsets", 2)
        if len(offsets) != 2 or not offsets[0] <= offsets[1] <= file_nbytes - start:
            raise CheckpointDamagedError(
                f"{here}, data_offsets: expected two in order, up to {file_nbytes - start}; got "
                f"{list(offsets)}; the file is damaged"
            )
        spec = SafetensorsSpec(code, shape)
        ranges[name] = ByteRange(spec, start + offsets[0], start + offsets[1])
    end = start
    for name, found in sorted(ranges.items(), key=lambda item: (item[1].begin, item[1].end)):
        if found.begin != end:
            raise CheckpointDamagedError(
                f"{where}, tensor {brief(name, 200)}: expected its bytes to begin at {end}, where "
                f"those before it end; they begin at {found.begin}; the file is damaged"
            )
        end = found.end
    if end != file_nbytes:
        raise CheckpointDamagedError(
            f"{where}: expected the tensors to fill the file's {file_nbytes} bytes; they end at "
            f"{end}; the file is damaged"
        )
    return ranges
