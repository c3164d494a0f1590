"""``python -m dvkernels checkpoint``: what a checkpoint holds, and whether it is whole."""

from __future__ import annotations

import argparse
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
from dvkernels.checkpoint.restoring import reader as reading
from dvkernels.checkpoint.restoring.reader import CheckpointReader
from dvkernels.checkpoint.storage import atomic_folder
from dvkernels.errors import CheckpointDamagedError
from dvkernels.user_errors import shown

__all__: list[str] = []

HELP = "show what a checkpoint holds, or verify that every byte of it is as it was written"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("action", choices=("show", "verify"))
    parser.add_argument("path", type=Path, help="a checkpoint, or a folder of a CheckpointManager")


def run(arguments: argparse.Namespace) -> int:
    """Show or verify one checkpoint, or all of a folder; 1 if one of them is damaged."""
    status = 0
    where = atomic_folder.absolute_path(arguments.path, "checkpoint")
    for path in step_names.within(where) or (where,):
        try:
            with reading.opened(path) as reader:
                if arguments.action == "show":
                    print("\n".join(map(_printable, _lines(reader))))
                else:
                    reader.check(reader.manifest.tensors)
                    print(f"PASS {path}: {_summary(reader)}")
        except CheckpointDamagedError as error:
            if path != where and path not in step_names.within(where):  # by a run that goes on
                print(_printable(f"GONE {path}: removed meanwhile"))
                continue
            said = str(error)
            print(_printable(f"FAIL {said if str(path) in said else f'{path}: {said}'}"))
            status = 1
    return status


def _printable(line: str) -> str:
    """Return a line that cannot steer the terminal: names are what anybody may have written."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in line)


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
            yield f"{path}: {shown(node.value, 200)}"
        case GeneratorNode():
            yield f"{path}: generator {node.type:.80}"
        case StateNode():
            yield f"{path}: state of a {node.type:.80} {json.dumps(node.value):.200}"
            for of, slots in node.slots.items():
                for name, tensor in slots.items():
                    yield f"{path}: {name} of {of} {_tensor(reader, tensor)}"


def _tensor(reader: CheckpointReader, name: str) -> str:
    entry = reader.manifest.tensors[name]
    return f"{entry.dtype}{list(entry.shape)}"
