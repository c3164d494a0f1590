"""Damaged and malicious files: an error that names the fault, or the data as it was saved."""

from __future__ import annotations

import ast
import copy
import json
import os
import random
import shutil
import tracemalloc
from pathlib import Path

import faults
import numpy as np
import pytest

import dvkernels as dv
from dvkernels import checkpoint
from dvkernels.checkpoint.format import shards
from dvkernels.checkpoint.storage import parallel_io
from dvkernels.devices import cpu
from dvkernels.errors import CheckpointDamagedError, CheckpointError

MEMORY = 32 << 20  # bytes: far more than any of these files, far less than they may claim


class Box:
    """User's object with a state of plain data and an array."""

    def __init__(self):
        self.state = {"n": 1, "x": np.arange(5)}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        if not isinstance(state, dict) or set(state) != {"n", "x"}:
            raise ValueError("another state")
        self.state = state


def make(fill):
    """Return objects of every kind, all filled with one number."""
    weight = dv.Variable(np.full((40, 5), float(fill)))
    optimizer = dv.optimizers.SGD(0.1, 0.9)
    optimizer.slots(weight)[0].assign(np.full((40, 5), float(fill)))
    return {
        "model": {"weight": weight, "bias": dv.Variable(np.full(3, fill, np.float32))},
        "optimizer": optimizer,
        "rng": np.random.default_rng(fill),
        "twister": np.random.Generator(np.random.MT19937(fill)),
        "philox": np.random.Generator(np.random.Philox(fill)),
        "box": Box(),
        "data": {"step": fill, "history": [0.5] * fill, "pair": (1, "x")},
        "array": np.full(7, fill + 1j),
    }


def comparable(value):
    if isinstance(value, dict):
        return {key: comparable(each) for key, each in value.items()}
    return (value.dtype, value.tobytes()) if isinstance(value, np.ndarray) else repr(value)


def content(objects):
    """Return the state that a restore may change, in comparable form."""
    weight = objects["model"]["weight"]
    return (
        weight.numpy().tobytes(),
        objects["model"]["bias"].numpy().tobytes(),
        objects["optimizer"].slots(weight)[0].numpy().tobytes(),
        objects["optimizer"].iterations,
        *(comparable(objects[name].bit_generator.state) for name in ("rng", "twister", "philox")),
        comparable(objects["box"].state),
        comparable(objects["data"]),
        objects["array"].tobytes(),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    least = pytest.MonkeyPatch()
    with least.context() as patch:  # several shards, though they are small
        patch.setattr("dvkernels.checkpoint.saving.save._LEAST_SHARD_NBYTES", 1000)
        patch.setattr(cpu, "usable_cores", lambda: 3)
        dv.Checkpoint(**make(2)).save(folder / "two", metadata={"note": "x"})
        dv.Checkpoint(**make(3)).save(folder / "three", metadata={"note": "x"})
    assert len(os.listdir(folder / "two")) == 4
    return folder


def sign(folder, manifest):
    """Write a manifest with a valid checksum."""
    body = json.dumps(manifest).encode()[1:]
    digest = parallel_io.checksum(body).encode()
    (folder / "manifest.json").write_bytes(b'{"xxh3_64":"%s",\n' % digest + body)


def read(folder):
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["xxh3_64"]
    return manifest


def restore(folder, partial=True):
    """Restore into objects of other content; an error must leave them as they were."""
    objects = make(5)
    before = content(objects)
    tracemalloc.start()
    try:
        dv.Checkpoint(**objects).restore(folder, partial=partial)
    except CheckpointError:
        assert content(objects) == before
        raise
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEMORY
    return content(objects)


# -- bytes that have changed ---------------------------------------------------------------------


def flip(rng, folder, other):
    path = folder / rng.choice(os.listdir(folder))
    for _ in range(rng.choice([1, 1, 1, 2, 5, 50])):
        faults.flip_bit(path, rng.randrange(8 * path.stat().st_size))


def cut(rng, folder, other):
    path = folder / rng.choice(os.listdir(folder))
    faults.truncate(path, rng.randrange(path.stat().st_size))


def lengthen(rng, folder, other):
    with open(folder / rng.choice(os.listdir(folder)), "ab") as file:
        file.write(rng.randbytes(rng.choice([1, 8, 1000])))


def zero(rng, folder, other):
    """Zero a block, as a disk may that has lost it."""
    path = folder / rng.choice(os.listdir(folder))
    begin = rng.randrange(path.stat().st_size)
    with open(path, "r+b") as file:
        file.seek(begin)
        file.write(bytes(min(512, path.stat().st_size - begin)))


def remove(rng, folder, other):
    (folder / rng.choice(os.listdir(folder))).unlink()


def swap(rng, folder, other):
    one, two = rng.sample(sorted(os.listdir(folder)), 2)
    os.rename(folder / one, folder / "x")
    os.rename(folder / two, folder / one)
    os.rename(folder / "x", folder / two)


def exchange(rng, folder, other):
    name = rng.choice(os.listdir(folder))
    shutil.copy(other / name, folder / name)


def link(rng, folder, other):
    path = folder / rng.choice(os.listdir(folder))
    path.unlink()
    path.symlink_to(rng.choice(["/dev/zero", "/etc/passwd", other / path.name, "."]))


def pipe(rng, folder, other):
    path = folder / rng.choice(os.listdir(folder))
    path.unlink()
    os.mkfifo(path)


def batches(each):
    """Return seeds and numbers of files: some for every day, ten large batches for ``-m slow``."""
    slow = [pytest.param(seed, each, marks=pytest.mark.slow) for seed in range(1, 11)]
    return [(0, 100), *slow]


DAMAGES = [flip, flip, flip, cut, cut, lengthen, zero, remove, swap, exchange, link, pipe]


@pytest.mark.parametrize(("seed", "number"), batches(each=600))
def test_changed_bytes_are_found(saved, tmp_path, seed, number):
    rng = random.Random(seed)
    good = restore(saved / "two", partial=False)
    found = 0
    for _ in range(number):
        folder = tmp_path / "c"
        shutil.copytree(saved / "two", folder)
        damage = rng.choice(DAMAGES)
        damage(rng, folder, saved / "three")
        try:
            assert restore(folder) == good  # two flips may meet, a zero may be one already
        except CheckpointDamagedError:
            found += 1
        assert os.listdir(tmp_path) == ["c"]
        shutil.rmtree(folder)
    assert found > 0.9 * number


# -- false manifests with valid checksums --------------------------------------------------------

JUNK = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**400, 0.5, 1e308, -0.0, "", "x", "../x",
    "/etc/passwd", "shard-00000.safetensors", "shard-99999.safetensors", "float64", "bfloat16",
    "object", "0" * 16, "\ud800", [], {}, [[]], [0], [2**62], [2**31, 2**31, 2**31], [-1, -1],
    [1] * 65, [0, 2**62], {"$tuple": []}, {"$array": "array"}, {"$array": "none"}, {"$dict": [[1]]},
    {"$scalar": ["float64", "x"]}, {"$bytes": "!"}, {"$float": "x"}, {"$complex": [1]}, {"$x": 1},
    {"$tuple": 1, "a": 2}, {"kind": "data", "value": None}, {"kind": "nest", "items": {}},
]  # fmt: skip


def places(value):
    """Yield (container, key) for every value below."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in list(pairs):
        yield value, key
        if isinstance(each, dict | list):
            yield from places(each)


def lie(rng, manifest):
    """Change some values of a manifest."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        everywhere = list(places(manifest))
        if not everywhere:
            return
        container, key = rng.choice(everywhere)
        action = rng.randrange(4)
        if action == 0 and isinstance(container, dict):
            container[rng.choice(["x", "$array", "../../x", "kind", key + "x"])] = container.pop(
                key
            )
        elif action == 1:
            del container[key]
        elif action == 2:
            source, which = rng.choice(everywhere)
            container[key] = copy.deepcopy(source[which])
        else:
            value = copy.deepcopy(rng.choice(JUNK))
            if rng.random() < 0.1:
                for _ in range(rng.choice([50, 150, 5000])):
                    value = rng.choice([[value], {"$tuple": [value]}, {"a": value}])
            container[key] = value


def header_of(path):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def lie_in_a_header(rng, folder):
    """Change a shard's header, and the manifest accordingly."""
    manifest = read(folder)
    place = rng.randrange(len(manifest["files"]))
    path = folder / manifest["files"][place]["name"]
    header, data = header_of(path)
    lie(rng, header)
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    raw = len(text).to_bytes(8, "little") + text
    path.write_bytes(raw + data)
    manifest["files"][place]["header"] = parallel_io.checksum(raw)
    manifest["files"][place]["nbytes"] = len(raw + data)
    sign(folder, manifest)


@pytest.mark.parametrize(("seed", "number"), batches(each=400))
def test_false_manifests_are_errors_or_harmless(saved, tmp_path, seed, number):
    rng = random.Random(seed)
    refused = 0
    for _ in range(number):
        folder = tmp_path / "c"
        shutil.copytree(saved / "two", folder)
        try:
            if rng.random() < 0.2:
                lie_in_a_header(rng, folder)
            else:
                manifest = read(folder)
                lie(rng, manifest)
                sign(folder, manifest)
        except RecursionError:  # too deep for json to write
            shutil.rmtree(folder)
            continue
        try:
            restore(folder)
        except CheckpointError:
            refused += 1
        assert os.listdir(tmp_path) == ["c"]
        shutil.rmtree(folder)
    assert refused > 0.5 * number


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved / "two", tmp_path / "c")
    return tmp_path / "c"


@pytest.mark.parametrize(
    "name",
    ["../two/shard-00000.safetensors", "/etc/passwd", "manifest.json", "shard-1.safetensors", "",
     "shard-00001.safetensors", "shard-00000.safetensors/x", "shard-00000.safetensors\0"],
)  # fmt: skip
def test_shards_have_their_fixed_names(folder, name):
    manifest = read(folder)
    manifest["files"][0]["name"] = name
    sign(folder, manifest)
    with pytest.raises(CheckpointDamagedError, match="file 0, name: expected 'shard-00000"):
        restore(folder)


def test_malformed_manifests(folder):
    path = folder / "manifest.json"
    good = path.read_bytes()
    body = good[good.index(b"\n") + 1 :]
    deep = b"[" * 100_000
    for text in (
        body.replace(b'"step":null', b'"step":null,"step":3'),
        body.replace(b'"step":null', b'"step":NaN'),
        body.replace(b'"step":null', b'"step":' + b"9" * 10_000),
        body.replace(b'"step":null', b'"step":' + deep),
        body.replace(b'"step":null', b'"step":-1'),
        body.replace(b'"metadata":', b'"metadata":{"a":1e999},"more":'),
        body[:-1],
        body + b"x",
        b"\xff" + body,
        b"",
        b'"',
    ):
        path.write_bytes(b'{"xxh3_64":"%s",\n' % parallel_io.checksum(text).encode() + text)
        with pytest.raises(CheckpointDamagedError, match=r"manifest\.json"):
            restore(folder)
    for text in (b"", b"{}", b"null", good[1:], good.replace(b"\n", b" ", 1)):
        path.write_bytes(text)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            restore(folder)
    path.write_bytes(good)
    restore(folder)


def test_another_format_version_is_not_damage(folder):
    manifest = read(folder)
    manifest["version"] = 2
    manifest["new"] = 1
    sign(folder, manifest)
    with pytest.raises(CheckpointError, match="version: expected 1; got 2") as raised:
        restore(folder)
    assert not isinstance(raised.value, CheckpointDamagedError)


@pytest.mark.parametrize(
    ("generator", "key", "value"),
    [("twister", "pos", 625), ("twister", "pos", 10**9), ("philox", "buffer_pos", 2**31 - 1),
     ("rng", "has_uint32", 2), ("rng", "uinteger", 2**200), ("rng", "uinteger", -1)],
)  # fmt: skip
def test_positions_of_generators_are_checked(folder, generator, key, value):
    """NumPy's setters do not check: the generator would read beyond its table."""
    manifest = read(folder)
    state = manifest["objects"][generator]["value"]
    (state if key in state else state["state"])[key] = value
    sign(folder, manifest)
    with pytest.raises(CheckpointError, match=generator):
        restore(folder)


@pytest.mark.wide
def test_a_million_entries(folder):
    manifest = read(folder)
    manifest["metadata"] = [0] * 1_000_000
    sign(folder, manifest)
    dv.Checkpoint().restore(folder, partial=True)
    manifest["tensors"] |= {
        f"x{k}": {"file": 0, "dtype": "int8", "shape": [0], "checksums": []} for k in range(100_000)
    }
    sign(folder, manifest)
    with pytest.raises(CheckpointDamagedError, match="in the manifest or in a shard, and not in"):
        dv.Checkpoint().restore(folder, partial=True)


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 2**62]}, "data_offsets"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}, "data_offsets"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0]}, "data_offsets"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}, "shape"),
        ({"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}, "shape"),
        ({"dtype": 5, "shape": [2], "data_offsets": [0, 8]}, "dtype"),
        ({"dtype": "F32", "shape": [2]}, "fields"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [1, 8]}, "begin at"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 7]}, "end at"),
        ([], "object"),
    ],
)
def test_headers_of_shards(entry, fault):
    text = json.dumps({"x": entry}).encode()
    header = len(text).to_bytes(8, "little") + text
    with pytest.raises(CheckpointDamagedError, match=fault):
        shards.read_header(header, len(header) + 8, "here")


@pytest.mark.parametrize("length", [0, 1, 2**63, 2**64 - 1, 10**8 + 1, 93])
def test_lengths_of_headers(length):
    with pytest.raises(CheckpointDamagedError, match="header"):
        shards.header_nbytes(length.to_bytes(8, "little"), 100, "here")


def test_loading_cannot_run_code():
    """Modules that could run code are not imported: files are read as JSON and numbers only."""
    room = Path(checkpoint.__file__).parent
    names = {
        name
        for source in room.rglob("*.py")
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None), *(alias.name for alias in node.names)]
    }
    assert "json" in names
    assert not names & {"pickle", "cloudpickle", "marshal", "shelve", "importlib", "yaml"}
