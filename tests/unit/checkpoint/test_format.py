"""File format, compared with its specification and with the package safetensors."""

from __future__ import annotations

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import xxhash

import dvkernels as dv
from dvkernels.checkpoint.format import shards
from dvkernels.checkpoint.storage import parallel_io
from dvkernels.devices import cpu

safetensors_numpy = pytest.importorskip("safetensors.numpy")


def arrays():
    rng = np.random.default_rng(0)
    names = [name for name in shards.DTYPES if name not in ("bfloat16", "complex64", "complex128")]
    made = {name: (100 * rng.random((3, 5))).astype(name) for name in names}
    return made | {"scalar": np.full((), 3, np.float32), "empty": np.zeros((0, 4))}


def test_safetensors_reads_our_shards(tmp_path):
    given = arrays()
    dv.Checkpoint(**given).save(tmp_path / "c")
    found = safetensors_numpy.load_file(tmp_path / "c" / "shard-00000.safetensors")
    assert found.keys() == given.keys()
    for name, array in given.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def test_we_read_headers_of_safetensors():
    given = arrays()
    content = safetensors_numpy.save(given, metadata={"made": "elsewhere"})
    length = shards.header_nbytes(content[:8], len(content), "file")
    ranges = shards.read_header(content[:length], len(content), "file")
    assert ranges.keys() == given.keys()
    for name, array in given.items():
        assert ranges[name].spec == shards.safetensors_spec(array.dtype.name, array.shape)
        assert content[ranges[name].begin : ranges[name].end] == array.tobytes()


def read_by_the_book(folder):
    """Read a checkpoint as docs/reference/checkpoint-format.md says, without the package."""
    content = (folder / "manifest.json").read_bytes()
    manifest = json.loads(content)
    assert xxhash.xxh3_64_hexdigest(content[content.index(b"\n") + 1 :]) == manifest["xxh3_64"]
    assert (manifest["format"], manifest["version"]) == ("dvkernels checkpoint", 1)
    headers, files = [], []
    for entry in manifest["files"]:
        content = (folder / entry["name"]).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        assert len(content) == entry["nbytes"]
        assert xxhash.xxh3_64_hexdigest(content[: 8 + length]) == entry["header"]
        headers.append(json.loads(content[8 : 8 + length]))
        files.append(content[8 + length :])
    found = {}
    for name, entry in manifest["tensors"].items():
        begin, end = headers[entry["file"]][name]["data_offsets"]
        data = files[entry["file"]][begin:end]
        size = 16 * 2**20
        pieces = [data[k : k + size] for k in range(0, len(data), size)]
        assert [xxhash.xxh3_64_hexdigest(piece) for piece in pieces] == entry["checksums"]
        dtype = ml_dtypes.bfloat16 if entry["dtype"] == "bfloat16" else entry["dtype"]
        found[name] = np.frombuffer(data, dtype).reshape(entry["shape"])
    return manifest, found


def test_a_reader_written_from_the_specification(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "usable_cores", lambda: 3)
    rng = np.random.default_rng(0)
    given = {
        "large": rng.random(5_000_000),  # 40 MB: several pieces
        "other": rng.integers(0, 9, (7_000_000,)),
        "half": rng.random(9).astype(ml_dtypes.bfloat16),
        "complex": rng.random(4) + 1j * rng.random(4),
    }
    dv.Checkpoint(**given, epoch=3).save(tmp_path / "c", metadata={"note": "x"})
    manifest, found = read_by_the_book(tmp_path / "c")
    assert manifest["objects"]["epoch"] == {"kind": "data", "value": 3}
    assert manifest["metadata"] == {"note": "x"}
    assert len(manifest["files"]) == 3
    assert found.keys() == given.keys()
    for name, array in given.items():
        assert found[name].tobytes() == array.tobytes()
        assert found[name].shape == array.shape
    again = {name: np.zeros_like(array) for name, array in given.items()}
    dv.Checkpoint(**again, epoch=0).restore(tmp_path / "c")
    assert all((again[name] == given[name]).all() for name in given)


def test_the_data_of_a_shard_is_aligned(tmp_path):
    header = shards.header([("x", "float64", (3,)), ("y", "int8", (5,))])
    assert len(header) % 64 == 0


def test_memory_stays_bounded(tmp_path):
    tracemalloc = pytest.importorskip("tracemalloc")
    weight = dv.Variable(np.ones(8_000_000))  # 64 MB
    checkpoint = dv.Checkpoint(weight=weight)
    tracemalloc.start()
    try:
        checkpoint.save(tmp_path / "c")
        checkpoint.restore(tmp_path / "c")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_in_parallel_runs_all_items_and_raises_the_first_error():
    assert parallel_io.in_parallel(lambda k: k * k, range(100)) == [k * k for k in range(100)]
    assert parallel_io.in_parallel(lambda k: k, []) == []
    with pytest.raises(ZeroDivisionError):
        parallel_io.in_parallel(lambda k: 1 // (k - 50), range(100))
