"""Interpreter of the oracle's programs on dvkernels."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import numpy as np
from oracle_programs import SCATTERS, WRITES, decoded, encoded

import dvkernels as dv

# Variants that must give the same answers: arguments of MirroredStrategy, or options of a Machine.
VARIANTS: dict[str, dict[str, Any]] = {
    "direct": {"cross_device_ops": "direct"},
    "ring": {"cross_device_ops": "ring"},
    "buckets": {"bytes_per_bucket": 8},
    "asynchronous": {},
    "shared": {},
    "in place": {},
    "copied variable": {},
    "debug mode": {},
}


def answer(program: dict[str, Any], variant: str = "") -> list[dict[str, Any]]:
    """Return the outcomes up to the first error; of an error, its class and base classes."""
    devices = [f"cpu:{k}" for k in range(program["replicas"])]
    kind = program["strategy"]
    if kind == "mirrored":
        strategy = dv.MirroredStrategy(devices, **VARIANTS.get(variant, {}))
    elif kind == "one_device":
        strategy = dv.OneDeviceStrategy(devices[0])
    else:
        strategy = dv.CentralStorageStrategy(devices, devices[0])
    outcomes: list[dict[str, Any]] = []
    with strategy, dv.debug(variant == "debug mode"):
        machine = Machine(strategy, variant)
        for operation in (None, *program["operations"]):
            try:
                if operation is None:
                    result = machine.create(program["variable"])
                else:
                    result = machine.perform(operation)
                outcomes.append({"result": tree(result), "copies": machine.copies()})
            except Exception as error:
                outcomes.append({"error": [base.__name__ for base in type(error).__mro__]})
                break
    return outcomes


def tree(result: Any) -> Any:
    if result is None:
        return None
    if isinstance(result, dict):
        return {"dict": {name: tree(item) for name, item in result.items()}}
    if isinstance(result, (list, tuple)):
        return {"list": [tree(item) for item in result]}
    if isinstance(result, dv.Mirrored):
        return {"mirrored": [tree(part) for part in result.values]}
    if isinstance(result, dv.PerReplica):
        return {"per_replica": [tree(part) for part in result.values]}
    return encoded(result)


class Machine:
    def __init__(self, strategy: dv.Strategy, variant: str) -> None:
        self.strategy = strategy
        self.variant = variant

    def create(self, variable: dict[str, Any]) -> None:
        within = self.strategy.scope() if variable.get("scope", True) else contextlib.nullcontext()
        with within:
            self.variable = dv.Variable(
                decoded(variable["initial"]),
                synchronization=variable["synchronization"],
                aggregation=variable["aggregation"],
            )
        if self.variant == "copied variable":
            self.variable = copy.deepcopy(self.variable)

    def copies(self) -> list[Any]:
        return [encoded(part) for part in self.variable.values]

    def perform(self, operation: dict[str, Any]) -> Any:
        if operation["context"] == "replica":
            return self.strategy.run(lambda: self.in_replica(operation))
        with self.strategy.scope():
            return self.across(operation)

    def value(self, value: dict[str, Any], rank: int | None) -> Any:
        form = value["form"]
        if form == "array" and rank is not None:
            return decoded(value["parts"][rank])
        if form == "array":
            return self.strategy.distribute_values_from_function(
                lambda ctx: decoded(value["parts"][ctx.replica_id_in_sync_group])
            )
        if form == "each":
            return self.value(value["values"][rank], rank)
        if form == "nest":
            return {name: self.value(item, rank) for name, item in value["items"].items()}
        return {
            "plain": lambda: decoded(value["part"]),
            "literal": lambda: value["number"],
            "variable": lambda: self.variable,
            "none": lambda: None,
        }[form]()

    def write(self, operation: dict[str, Any], rank: int | None) -> None:
        op = operation["op"]
        if op in WRITES:
            getattr(self.variable, op)(self.value(operation["value"], rank))
        else:
            getattr(self.variable, op)(
                self.value(operation["indices"], rank), self.value(operation["updates"], rank)
            )

    def in_replica(self, operation: dict[str, Any]) -> Any:
        ctx = dv.get_replica_context()
        rank, op = ctx.replica_id_in_sync_group, operation["op"]
        if op == "step":
            return [self.in_replica(inner) for inner in operation["operations"]]
        if op in WRITES or op in SCATTERS:
            return self.write(operation, rank)
        if op == "read":
            return np.array(self.variable.read_value())
        if op == "enter_scope":
            with self.strategy.scope():
                return None
        if op not in ("return", "all_reduce", "all_gather", "merge_call", "create_inside"):
            return self.across(operation)
        value = self.value(operation["value"], rank)
        if op == "create_inside":
            return np.array(dv.Variable(value).read_value())
        if op == "return":
            return value
        if op == "all_reduce":
            return self.all_reduce(ctx, operation["reduce_op"], value)
        if op == "all_gather":
            return ctx.all_gather(value, operation["axis"])
        assert op == "merge_call"
        return ctx.merge_call(self.merged(operation), args=(value,))

    def all_reduce(self, ctx: dv.ReplicaContext, op: str, value: Any) -> Any:
        if self.variant == "asynchronous":
            return ctx.all_reduce_async(op, value).wait()
        if self.variant == "in place" and isinstance(value, np.ndarray):
            return ctx.all_reduce(op, value, out=value)
        return ctx.all_reduce(op, value, shared=self.variant == "shared")

    def merged(self, operation: dict[str, Any]) -> Callable[..., Any]:
        def fn(strategy: dv.Strategy, value: Any) -> Any:
            if operation["fn"] == "identity":
                return value
            if operation["fn"] == "read":
                read = self.variable.read_value()
                return read if isinstance(read, dv.PerReplica) else np.array(read)
            if operation["fn"] == "run":
                return strategy.run(self.summed, args=(value,))
            reduced = strategy.reduce(operation["reduce_op"], value, axis=None)
            if operation["fn"] == "assign_reduced":
                self.variable.assign(reduced)
                return None
            return reduced

        return fn

    def summed(self, value: Any) -> Any:
        return dv.get_replica_context().all_reduce("sum", value)

    def across(self, operation: dict[str, Any]) -> Any:
        op, strategy = operation["op"], self.strategy
        if op in WRITES or op in SCATTERS:
            return self.write(operation, None)
        if op == "read":
            return self.variable.read_value()
        if op in ("batches", "own_batches"):
            return self.batches(operation)
        value = self.value(operation["value"], None)
        if op == "values":
            return value
        if op == "run_again":
            return strategy.run(np.copy, args=(value,))
        if op == "reduce":
            return strategy.reduce(operation["reduce_op"], value, axis=operation["axis"])
        if op == "gather":
            return strategy.gather(value, operation["axis"])
        if op == "local_results":
            return strategy.local_results(value)
        if op == "reduce_to":
            return strategy.reduce_to(operation["reduce_op"], value, self.variable)
        if op == "broadcast_to":
            return strategy.broadcast_to(value, self.variable)
        assert op == "update"

        def fn(own: Any, argument: Any) -> Any:
            getattr(own, operation["verb"])(argument)
            return np.array(own.read_value())

        return strategy.update(self.variable, fn, args=(value,), group=operation["group"])

    def batches(self, operation: dict[str, Any]) -> list[Any]:
        dataset = dv.Dataset.range(operation["elements"])
        if operation["batch"] is not None:
            dataset = dataset.batch(operation["batch"], drop_remainder=operation["drop_remainder"])
        if operation["op"] == "own_batches":
            distributed = self.strategy.distribute_datasets_from_function(lambda _: dataset)
        else:
            distributed = self.strategy.distribute_dataset(dataset)
        with iter(distributed) as batches:
            return list(batches)
