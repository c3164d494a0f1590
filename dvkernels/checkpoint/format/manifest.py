"""Manifest of a checkpoint: its shards, tensors, objects and metadata, under a checksum.

``docs/reference/checkpoint-format.md`` is its specification; the two change together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dvkernels._version import __version__
from dvkernels.checkpoint.format import json_codec, json_validation, nodes, shards
from dvkernels.checkpoint.format.nodes import Node
from dvkernels.checkpoint.storage import parallel_io
from dvkernels.checkpoint.storage.atomic_folder import SHARD
from dvkernels.errors import CheckpointDamagedError, CheckpointError
from dvkernels.user_errors import brief

__all__: list[str] = []

FORMAT = "dvkernels checkpoint"
VERSION = 1
MAX_NBYTES = 256 << 20
_FIELDS = {"format", "version", "library", "step", "files", "tensors", "objects", "metadata"}
# The checksum is that of all bytes after the first line.
_FIRST_LINE = re.compile(rb'\{"xxh3_64":"([0-9a-f]{16})",\n')
_CHECKSUM = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class FileEntry:
    """Manifest entry of a shard."""

    name: str
    nbytes: int
    header: str  # checksum of the bytes before the tensors


@dataclass(frozen=True)
class TensorEntry:
    """Manifest entry of a tensor."""

    file: int  # index of its shard
    dtype: str
    shape: tuple[int, ...]
    checksums: tuple[str, ...]  # of its pieces

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return shards.nbytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Manifest:
    """Content of a manifest."""

    step: int | None
    files: tuple[FileEntry, ...]
    tensors: dict[str, TensorEntry]
    objects: dict[str, Node]
    metadata: Any
    library: str


def write(
    step: int | None,
    files: Iterable[FileEntry],
    tensors: Mapping[str, TensorEntry],
    objects: Mapping[str, Any],
    metadata: Any,
) -> bytes:
    """Return the bytes of a manifest file; ``objects`` and ``metadata`` are JSON values."""
    rest = _dumped(
        {
            "format": FORMAT,
            "version": VERSION,
            "library": __version__,
            "step": step,
            "files": [vars(entry) for entry in files],
            "tensors": {name: vars(entry) for name, entry in tensors.items()},
            "objects": objects,
            "metadata": metadata,
        }
    )
    body = rest[1:].encode()
    content = b'{"xxh3_64":"%s",\n' % parallel_io.checksum(body).encode() + body
    if len(content) > MAX_NBYTES:
        raise CheckpointError(
            f"the manifest would have {len(content)} bytes; at most {MAX_NBYTES} are allowed; "
            f"keep large data in arrays"
        )
    return content


def _dumped(given: dict[str, Any]) -> str:
    try:
        return json.dumps(given, separators=(",", ":"), allow_nan=False)
    except ValueError as error:  # an integer of more digits than this program allows
        raise CheckpointError(f"the objects cannot be written as JSON: {error}") from error


def read(content: bytes, where: str) -> Manifest:
    """Parse and validate the bytes of a manifest file."""
    first = _FIRST_LINE.match(content)
    if first is None:
        raise CheckpointDamagedError(
            f"{where}: expected a first line with the checksum of the rest; got "
            f"{content[:40]!r}; the file is damaged, or not a checkpoint's manifest"
        )
    if parallel_io.checksum(memoryview(content)[first.end() :]) != first[1].decode():
        raise CheckpointDamagedError(f"{where}: its checksum does not match; the file is damaged")
    given = dict(json_validation.items(json_validation.parse(content, where), where))
    given.pop("xxh3_64")
    json_validation.one_of(given.get("format"), f"{where}, format", [FORMAT])
    version = json_validation.count(given.get("version"), f"{where}, version")
    if version != VERSION:
        raise CheckpointError(
            f"{where}, version: expected {VERSION}; got {version}; another version of dvkernels "
            f"wrote it, {brief(given.get('library'), 40)}: use that one"
        )
    json_validation.fields(given, where, _FIELDS)
    step = given["step"]
    files = tuple(
        _file(entry, index, f"{where}, file {index}")
        for index, entry in enumerate(json_validation.array(given["files"], f"{where}, files"))
    )
    tensors = {
        name: _tensor(entry, len(files), f"{where}, tensor {brief(name, 200)}")
        for name, entry in json_validation.items(given["tensors"], f"{where}, tensors")
    }
    return Manifest(
        None if step is None else json_validation.count(step, f"{where}, step"),
        files,
        tensors,
        {
            name: nodes.read(node, f"{where}, object {name:.200}", tensors)
            for name, node in json_validation.items(given["objects"], f"{where}, objects")
        },
        json_codec.decode(given["metadata"], f"{where}, metadata"),
        json_validation.text(given["library"], f"{where}, library"),
    )


def _file(value: Any, index: int, where: str) -> FileEntry:
    given = json_validation.fields(value, where, {"name", "nbytes", "header"})
    name = json_validation.text(given["name"], f"{where}, name")
    # The name follows from the index, so that it is unique and cannot leave the folder.
    if not SHARD.fullmatch(name) or int(name[6:11]) != index:
        raise CheckpointDamagedError(
            f"{where}, name: expected {shard_name(index)!r}; got {brief(name, 200)}; "
            "the file is damaged"
        )
    nbytes = json_validation.count(given["nbytes"], f"{where}, nbytes")
    return FileEntry(name, nbytes, _checksum(given["header"], f"{where}, header"))


def shard_name(index: int) -> str:
    """Return the name of a shard."""
    return f"shard-{index:05d}.safetensors"


def _tensor(value: Any, num_files: int, where: str) -> TensorEntry:
    given = json_validation.fields(value, where, {"file", "dtype", "shape", "checksums"})
    file = json_validation.count(given["file"], f"{where}, file", num_files - 1)
    dtype = json_validation.one_of(given["dtype"], f"{where}, dtype", shards.DTYPES)
    shape = json_validation.counts(given["shape"], f"{where}, shape", shards.MAX_NDIM)
    # Without axes of length 0: NumPy limits the product of the others, too.
    if shards.nbytes(dtype, [size for size in shape if size]) > shards.MAX_NBYTES:
        raise CheckpointDamagedError(f"{where}, shape: {list(shape)} is too large for any machine")
    listed = json_validation.array(given["checksums"], f"{where}, checksums")
    expected = -(-shards.nbytes(dtype, shape) // parallel_io.PIECE_NBYTES)
    if len(listed) != expected:
        raise CheckpointDamagedError(
            f"{where}, checksums: expected {expected}, one per {parallel_io.PIECE_NBYTES} "
            f"bytes; got {len(listed)}; the file is damaged"
        )
    return TensorEntry(
        file, dtype, shape, tuple(_checksum(each, f"{where}, checksums") for each in listed)
    )


def _checksum(value: Any, where: str) -> str:
    if not _CHECKSUM.fullmatch(json_validation.text(value, where)):
        raise CheckpointDamagedError(f"{where}: expected 16 hexadecimal digits; got {brief(value)}")
    return str(value)
