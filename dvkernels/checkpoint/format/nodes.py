"""Nodes of the tree of saved objects in a manifest, one class per kind of object.

A node names the tensors of an object and holds its other data, but no arrays.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from dvkernels.checkpoint.format import json_codec, json_validation
from dvkernels.errors import CheckpointDamagedError
from dvkernels.user_errors import brief

__all__: list[str] = []


@dataclass(frozen=True)
class VariableNode:
    """A variable: one tensor, or one per copy where the copies are independent."""

    kind = "variable"
    tensors: tuple[str, ...]
    synchronization: str
    aggregation: str

    def to_json(self) -> dict[str, Any]:
        """Return the node as JSON values."""
        return {
            "kind": self.kind,
            "tensors": list(self.tensors),
            "synchronization": self.synchronization,
            "aggregation": self.aggregation,
        }


@dataclass(frozen=True)
class ArrayNode:
    """A NumPy array."""

    kind = "array"
    tensor: str

    def to_json(self) -> dict[str, Any]:
        """Return the node as JSON values."""
        return {"kind": self.kind, "tensor": self.tensor}


@dataclass(frozen=True)
class DataNode:
    """Plain data."""

    kind = "data"
    value: Any  # decoded, unlike that of the nodes below

    def to_json(self) -> dict[str, Any]:
        """Return the node as JSON values."""
        return {"kind": self.kind, "value": json_codec.encode(self.value, self.kind)}


@dataclass(frozen=True)
class GeneratorNode:
    """A random generator."""

    kind = "generator"
    type: str
    value: Any  # encoded, since it may refer to tensors

    def to_json(self) -> dict[str, Any]:
        """Return the node as JSON values."""
        return {"kind": self.kind, "type": self.type, "value": self.value}


@dataclass(frozen=True)
class StateNode:
    """An object with ``state_dict`` and ``load_state_dict``; an optimizer also has slots."""

    kind = "state"
    type: str
    value: Any  # encoded, since it may refer to tensors
    # The tensor of each slot by its name, by the path of the variable.
    slots: dict[str, dict[str, str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the node as JSON values."""
        slots = {"slots": self.slots} if self.slots else {}
        return {"kind": self.kind, "type": self.type, "value": self.value, **slots}


@dataclass(frozen=True)
class NestNode:
    """A container of more than plain data."""

    kind = "nest"
    type: str
    items: dict[str, Node]

    def to_json(self) -> dict[str, Any]:
        """Return the node as JSON values."""
        items = {name: node.to_json() for name, node in self.items.items()}
        return {"kind": self.kind, "type": self.type, "items": items}


Node = VariableNode | ArrayNode | DataNode | GeneratorNode | StateNode | NestNode
_KINDS = {"variable", "array", "data", "generator", "state", "nest"}


def read(value: Any, where: str, tensors: Collection[str], depth: int = 0) -> Node:
    """Read a node from JSON values, which may refer to the names in ``tensors`` only."""
    if depth > json_codec.MAX_DEPTH:
        raise CheckpointDamagedError(f"{where}: nested deeper than {json_codec.MAX_DEPTH} levels")

    def tensor(name: Any, here: str) -> str:
        if json_validation.text(name, here) not in tensors:
            raise CheckpointDamagedError(f"{here}: there is no tensor named {brief(name, 200)}")
        return str(name)

    def checked(encoded: Any) -> Any:
        """Decode once, to find errors before anything is restored."""
        json_codec.decode(encoded, where, lambda name: tensor(name, where))
        return encoded

    given = dict(json_validation.items(value, where))
    kind = json_validation.one_of(given.get("kind"), f"{where}, kind", _KINDS)

    def fields(*names: str, optional: frozenset[str] = frozenset()) -> dict[str, Any]:
        return json_validation.fields(given, where, {"kind", *names}, optional)

    match kind:
        case "variable":
            found = fields("tensors", "synchronization", "aggregation")
            names = json_validation.array(found["tensors"], f"{where}, tensors")
            if not names:
                raise CheckpointDamagedError(f"{where}, tensors: expected at least one; got none")
            return VariableNode(
                tuple(tensor(name, f"{where}, tensors") for name in names),
                json_validation.text(found["synchronization"], f"{where}, synchronization"),
                json_validation.text(found["aggregation"], f"{where}, aggregation"),
            )
        case "array":
            return ArrayNode(tensor(fields("tensor")["tensor"], f"{where}, tensor"))
        case "data":
            return DataNode(json_codec.decode(fields("value")["value"], where))
        case "generator":
            found = fields("type", "value")
            return GeneratorNode(
                json_validation.text(found["type"], f"{where}, type"), checked(found["value"])
            )
        case "state":
            found = fields("type", "value", optional=frozenset({"slots"}))
            slots = {
                path: {
                    name: tensor(each, f"{where}, slots of {brief(path, 200)}")
                    for name, each in json_validation.items(by_name, f"{where}, slots")
                }
                for path, by_name in json_validation.items(
                    found.get("slots", {}), f"{where}, slots"
                )
            }
            return StateNode(
                json_validation.text(found["type"], f"{where}, type"),
                checked(found["value"]),
                slots,
            )
        case _:
            found = fields("type", "items")
            return NestNode(
                json_validation.text(found["type"], f"{where}, type"),
                {
                    name: read(each, f"{where}/{name:.200}", tensors, depth + 1)
                    for name, each in json_validation.items(found["items"], f"{where}, items")
                },
            )
