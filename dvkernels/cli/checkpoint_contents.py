"""``python -m dvkernels checkpoint``: contents and integrity of checkpoints."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

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

HELP = "show the contents of a checkpoint, or verify that every byte is as it was written"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("action", choices=("show", "verify"))
    parser.add_argument("path", type=Path, help="a checkpoint, or a folder of a CheckpointManager")


def run(arguments: argparse.Namespace) -> int:
    """Show or verify one checkpoint, or all of a folder; return 1 if one of them is damaged."""
    status = 0
    root = atomic_folder.absolute_path(arguments.path, "checkpoint")
    for path in step_names.within(root) or (root,):
        try:
            with contextlib.closing(open_reader(path)) as reader:
                if arguments.action == "show":
                    print("\n".join(map(_printable, _lines(reader))))
                else:
                    reader.check(reader.manifest.tensors)
                    print(f"PASS {path}: {_summary(reader)}")
        except CheckpointDamagedError as error:
            if path != root and path not in step_names.within(root):  # a running job removed it
                print(_printable(f"GONE {path}: removed meanwhile"))
                continue
            message = str(error)
            print(_printable(f"FAIL {message if str(path) in message else f'{path}: {message}'}"))
            status = 1
    return status


def _printable(line: str) -> str:
    """Return a line without control sequences: the names in a checkpoint are not trusted."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)


def _summary(reader: CheckpointReader) -> str:
    tensors = reader.manifest.tensors.values()
    num_files = len(reader.manifest.files)
    nbytes = sum(entry.nbytes for entry in tensors)
    return f"{len(tensors)} tensors, {nbytes} bytes in {num_files} files"


def _lines(reader: CheckpointReader) -> Iterator[str]:
    manifest = reader.manifest
    step = "" if manifest.step is None else f", step {manifest.step}"
    yield f"{reader.path}: {_summary(reader)}{step}, written by dvkernels {manifest.library}"
    if manifest.metadata:
        yield f"  metadata {json.dumps(json_codec.encode(manifest.metadata, 'metadata'))}"
    for name, node in manifest.objects.items():
        yield from (f"  {line}" for line in _node_lines(reader, node, child("", name)))


def _node_lines(reader: CheckpointReader, node: Node, path: str) -> Iterator[str]:
    match node:
        case NestNode():
            for name, each in node.items.items():
                yield from _node_lines(reader, each, child(path, name))
        case VariableNode():
            copies = f" x {len(node.tensors)}" if len(node.tensors) > 1 else ""
            modes = f"{node.synchronization}/{node.aggregation}"
            yield f"{path}: variable {_tensor(reader, node.tensors[0])}{copies}, {modes}"
        case ArrayNode():
            yield f"{path}: array {_tensor(reader, node.tensor)}"
        case DataNode():
            yield f"{path}: {brief(node.value, 200)}"
        case GeneratorNode():
            yield f"{path}: generator {node.type:.80}"
        case StateNode():
            yield f"{path}: state of a {node.type:.80} {json.dumps(node.value):.200}"
            for variable, slots in node.slots.items():
                for name, tensor in slots.items():
                    yield f"{path}: {name} of {variable} {_tensor(reader, tensor)}"


def _tensor(reader: CheckpointReader, name: str) -> str:
    entry = reader.manifest.tensors[name]
    return f"{entry.dtype}{list(entry.shape)}"
