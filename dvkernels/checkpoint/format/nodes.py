"""Nodes of the tree of saved objects in a manifest, one class per kind of object.

A node names the tensors of an object and holds its other data, but no arrays. Its attributes are
the fields of its JSON object, after the field ``kind``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

from dvkernels.checkpoint.format import json_codec, json_validation
from dvkernels.errors import CheckpointDamagedError
from dvkernels.user_errors import brief

__all__: list[str] = []


class _JsonNode:
    kind: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """Return the node as JSON values."""
        return {"kind": self.kind, **vars(self)}


@dataclass(frozen=True)
class VariableNode(_JsonNode):
    """A variable: one tensor, or one per copy where the copies are independent."""

    kind = "variable"
    tensors: tuple[str, ...]
    synchronization: str
    aggregation: str


@dataclass(frozen=True)
class ArrayNode(_JsonNode):
    """A NumPy array."""

    kind = "array"
    tensor: str


@dataclass(frozen=True)
class DataNode(_JsonNode):
    """Plain data."""

    kind = "data"
    value: Any  # decoded, unlike that of the nodes below

    def to_json(self) -> dict[str, Any]:
        """Return the node as JSON values, which share nothing that can change with the data."""
        return {"kind": self.kind, "value": json_codec.encode(self.value, self.kind)}


@dataclass(frozen=True)
class GeneratorNode(_JsonNode):
    """A random generator."""

    kind = "generator"
    type: str
    value: Any  # encoded, since it may refer to tensors


@dataclass(frozen=True)
class StateNode(_JsonNode):
    """An object with ``state_dict`` and ``load_state_dict``; an optimizer also has slots."""

    kind = "state"
    type: str
    value: Any  # encoded, since it may refer to tensors
    # The tensor of each slot by its name, by the path of the variable.
    slots: dict[str, dict[str, str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the node as JSON values; without the field ``slots`` where there are none."""
        return {name: each for name, each in super().to_json().items() if name != "slots" or each}


@dataclass(frozen=True)
class NestNode(_JsonNode):
    """A container of more than plain data."""

    kind = "nest"
    type: str
    items: dict[str, Node]

    def to_json(self) -> dict[str, Any]:
        """Return the node as JSON values."""
        items = {name: node.to_json() for name, node in self.items.items()}
        return super().to_json() | {"items": items}


Node = VariableNode | ArrayNode | DataNode | GeneratorNode | StateNode | NestNode
_CLASSES: dict[str, type[Node]] = {node_class.kind: node_class for node_class in get_args(Node)}
_OPTIONAL = {"slots"}


def read(value: Any, where: str, tensors: Collection[str], depth: int = 0) -> Node:
    """Read a node from JSON values, which may refer to the names in ``tensors`` only."""
    if depth > json_codec.MAX_DEPTH:
        raise CheckpointDamagedError(f"{where}: nested deeper than {json_codec.MAX_DEPTH} levels")

    def tensor(name: Any, here: str) -> str:
        if json_validation.text(name, here) not in tensors:
            raise CheckpointDamagedError(f"{here}: there is no tensor named {brief(name, 200)}")
        return str(name)

    def read_field(name: str, content: Any) -> Any:
        here = f"{where}, {name}"
        match name:
            case "tensor":
                return tensor(content, here)
            case "tensors":
                names = json_validation.array(content, here)
                if not names:
                    raise CheckpointDamagedError(f"{here}: expected at least one; got none")
                return tuple(tensor(each, here) for each in names)
            case "value" if node_class is DataNode:
                return json_codec.decode(content, where)
            case "value":  # decoded once, to find errors before anything is restored
                json_codec.decode(content, where, lambda name: tensor(name, where))
                return content
            case "slots":
                return {
                    path: {
                        slot: tensor(each, f"{here} of {brief(path, 200)}")
                        for slot, each in json_validation.items(by_name, here)
                    }
                    for path, by_name in json_validation.items(content, here)
                }
            case "items":
                return {
                    each: read(node, f"{where}/{each:.200}", tensors, depth + 1)
                    for each, node in json_validation.items(content, here)
                }
        return json_validation.text(content, here)

    given = dict(json_validation.items(value, where))
    kind = json_validation.one_of(given.get("kind"), f"{where}, kind", _CLASSES)
    node_class = _CLASSES[kind]
    names = {each.name for each in dataclasses.fields(node_class)}
    json_validation.fields(given, where, {"kind"} | names - _OPTIONAL, names & _OPTIONAL)
    del given["kind"]
    return node_class(**{name: read_field(name, content) for name, content in given.items()})
