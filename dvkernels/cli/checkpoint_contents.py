"""Contents and integrity of checkpoints, as the command line shows them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dvkernels.checkpoint.format import json_codec, step_names
from dvkernels.checkpoint.format.nodes import (
    ArrayNode,
    DataNode,
    GeneratorNode,
    NestNode,
    Node,
    StateNode,
    VariableNode,
)
from dvkernels.checkpoint.objects import child
from dvkernels.checkpoint.restoring.reader import CheckpointReader, open_reader
from dvkernels.checkpoint.storage import atomic_folder
from dvkernels.errors import CheckpointDamagedError
from dvkernels.user_errors import brief

__all__: list[str] = []


def show(reader: CheckpointReader) -> dict[str, Any]:
    """Return a summary of a checkpoint, its metadata, and a line for each object."""
    manifest = reader.manifest
    return {
        **_summary(reader),
        "step": manifest.step,
        "library": manifest.library,
        "metadata": json_codec.encode(manifest.metadata, "metadata"),
        "objects": [
            {"name": name, "holds": text}
            for root, node in manifest.objects.items()
            for name, text in _nodes(reader, node, child("", root))
        ],
    }


def verify(reader: CheckpointReader) -> dict[str, Any]:
    """Return a summary of a checkpoint whose bytes are all as they were written; else raise."""
    reader.check(reader.manifest.tensors)
    return _summary(reader)


def examine(path: Path, action: str) -> Iterator[dict[str, Any]]:
    """Yield what is found of a checkpoint, or of each in a folder; its "outcome" may be FAIL."""
    examiner = {"show": show, "verify": verify}[action]
    root = atomic_folder.absolute_path(path, "checkpoint")
    for each in step_names.within(root) or (root,):
        found: dict[str, Any] = {"path": str(each)}
        try:
            with contextlib.closing(open_reader(each)) as reader:
                yield {**found, "outcome": "PASS", **examiner(reader)}
        except CheckpointDamagedError as error:
            if each != root and each not in step_names.within(root):  # a running job removed it
                yield {**found, "outcome": "GONE"}
            else:
                yield {**found, "outcome": "FAIL", "error": str(error)}


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of text that say what was found of a checkpoint."""
    path, outcome = found["path"], found["outcome"]
    if outcome == "GONE":
        yield f"GONE {path}: removed meanwhile"
    elif outcome == "FAIL":
        message = found["error"]
        yield f"FAIL {message if path in message else f'{path}: {message}'}"
    else:
        summary = f"{found['tensors']} tensors, {found['bytes']} bytes in {found['files']} files"
        if "objects" not in found:
            yield f"PASS {path}: {summary}"
            return
        step = "" if found["step"] is None else f", step {found['step']}"
        yield f"{path}: {summary}{step}, written by dvkernels {found['library']}"
        if found["metadata"]:
            yield f"  metadata {json.dumps(found['metadata'])}"
        yield from (f"  {each['name']}: {each['holds']}" for each in found["objects"])


def _summary(reader: CheckpointReader) -> dict[str, int]:
    tensors = reader.manifest.tensors.values()
    return {
        "tensors": len(tensors),
        "bytes": sum(entry.nbytes for entry in tensors),
        "files": len(reader.manifest.files),
    }


def _nodes(reader: CheckpointReader, node: Node, path: str) -> Iterator[tuple[str, str]]:
    """Yield the names below a node, and what each of them holds."""
    match node:
        case NestNode():
            for name, each in node.items.items():
                yield from _nodes(reader, each, child(path, name))
        case VariableNode():
            copies = f" x {len(node.tensors)}" if len(node.tensors) > 1 else ""
            modes = f"{node.synchronization}/{node.aggregation}"
            yield path, f"variable {_tensor(reader, node.tensors[0])}{copies}, {modes}"
        case ArrayNode():
            yield path, f"array {_tensor(reader, node.tensor)}"
        case DataNode():
            yield path, f"{brief(node.value, 200)}"
        case GeneratorNode():
            yield path, f"generator {node.type:.80}"
        case StateNode():
            yield path, f"state of a {node.type:.80} {json.dumps(node.value):.200}"
            for variable, slots in node.slots.items():
                for name, tensor in slots.items():
                    yield path, f"{name} of {variable} {_tensor(reader, tensor)}"


def _tensor(reader: CheckpointReader, name: str) -> str:
    entry = reader.manifest.tensors[name]
    return f"{entry.dtype}{list(entry.shape)}"
