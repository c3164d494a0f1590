"""Recorder of TensorFlow's answers to every program: ``python record.py`` where it is installed.

The comparison does not need TensorFlow: its answers are committed in answers.json. In TensorFlow a
failed collective breaks every later one of the process, and so does a collective over another
number of devices. So the programs run in one worker process per number of replicas, which is
replaced after each error that may have been a failed collective.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from oracle_programs import SCATTERS, WRITES, all_programs, decoded, encoded

ANSWERS = Path(__file__).with_name("answers.json")
DEVICES = 4
SECONDS = 120.0
# An error in one of these may have been a failed collective.
COLLECTIVE = ("all_reduce", "all_gather", "reduce", "gather", "merge_call", "reduce_to", "step")


class Machine:
    """Interpreter of programs on TensorFlow."""

    def __init__(self) -> None:
        import tensorflow as tf

        tf.get_logger().setLevel("ERROR")
        processor = tf.config.list_physical_devices("CPU")[0]
        logical = [tf.config.LogicalDeviceConfiguration()] * DEVICES
        tf.config.set_logical_device_configuration(processor, logical)
        self.tf = tf
        self.strategies: dict[tuple[str, int], Any] = {}

    def answer(self, program: dict[str, Any]) -> list[dict[str, Any]]:
        self.replicas = program["replicas"]
        self.strategy = self.strategy_of(program["strategy"], self.replicas)
        outcomes = []
        for operation in (None, *program["operations"]):
            try:
                if operation is None:
                    result = self.create(program["variable"])
                else:
                    result = self.perform(operation)
                outcomes.append({"result": self.tree(result), "copies": self.copies()})
            except Exception as error:
                outcomes.append({"error": type(error).__name__})
                break
        return outcomes

    def strategy_of(self, kind: str, replicas: int) -> Any:
        key = kind, replicas
        if key not in self.strategies:
            distribute = self.tf.distribute
            devices = [f"CPU:{k}" for k in range(replicas)]
            if kind == "mirrored":
                made = distribute.MirroredStrategy(devices)
            elif kind == "one_device":
                made = distribute.OneDeviceStrategy(devices[0])
            else:
                made = distribute.experimental.CentralStorageStrategy(devices, devices[0])
            self.strategies[key] = made
        return self.strategies[key]

    def create(self, variable: dict[str, Any]) -> None:
        tf = self.tf
        within = self.strategy.scope() if variable.get("scope", True) else contextlib.nullcontext()
        with within:
            self.variable = tf.Variable(
                decoded(variable["initial"]),
                synchronization=tf.VariableSynchronization[variable["synchronization"].upper()],
                aggregation=tf.VariableAggregation[variable["aggregation"].upper()],
            )

    def copies(self) -> list[Any]:
        parts = self.strategy.experimental_local_results(self.variable)
        return [encoded(part.numpy()) for part in parts]

    def perform(self, operation: dict[str, Any]) -> Any:
        if operation["context"] == "replica":
            return self.strategy.run(lambda: self.in_replica(operation))
        with self.strategy.scope():
            return self.across(operation)

    # -- values --------------------------------------------------------------------------------

    def fresh(self, part: str) -> Any:
        # A constant may be cached, and the same object on all replicas means something else.
        return self.tf.identity(self.tf.constant(decoded(part)))

    def value(self, value: dict[str, Any], rank: int | None) -> Any:
        form = value["form"]
        if form == "array" and rank is not None:
            return self.fresh(value["parts"][rank])
        if form == "array":
            return self.strategy.experimental_distribute_values_from_function(
                lambda ctx: self.fresh(value["parts"][ctx.replica_id_in_sync_group])
            )
        if form == "each":
            return self.value(value["values"][rank], rank)
        if form == "nest":
            return {name: self.value(item, rank) for name, item in value["items"].items()}
        return {
            "plain": lambda: self.fresh(value["part"]),
            "literal": lambda: value["number"],
            "variable": lambda: self.variable,
            "none": lambda: None,
        }[form]()

    def tree(self, result: Any) -> Any:
        if result is None:
            return None
        if isinstance(result, dict):
            return {"dict": {name: self.tree(item) for name, item in result.items()}}
        if isinstance(result, (list, tuple)):
            return {"list": [self.tree(item) for item in result]}
        if isinstance(result, self.tf.Variable):
            return encoded(result.numpy())
        if isinstance(result, self.tf.distribute.DistributedValues):
            kind = "mirrored" if "Mirrored" in type(result).__name__ else "per_replica"
            return {kind: [self.tree(part) for part in result.values]}
        return encoded(result)

    # -- operations ----------------------------------------------------------------------------

    def write(self, operation: dict[str, Any], rank: int | None) -> None:
        op = operation["op"]
        if op in WRITES:
            getattr(self.variable, op)(self.value(operation["value"], rank))
        else:
            slices = self.tf.IndexedSlices(
                self.value(operation["updates"], rank), self.value(operation["indices"], rank)
            )
            getattr(self.variable, op)(slices)

    def in_replica(self, operation: dict[str, Any]) -> Any:
        ctx = self.tf.distribute.get_replica_context()
        rank, op = int(ctx.replica_id_in_sync_group), operation["op"]
        if op == "step":
            return [self.in_replica(inner) for inner in operation["operations"]]
        if op in WRITES or op in SCATTERS:
            return self.write(operation, rank)
        if op == "read":
            # A read may be a view, and a later operation of the same step may write.
            return self.tf.constant(self.variable.read_value().numpy())
        if op == "enter_scope":
            with self.strategy.scope():
                return None
        if op not in ("return", "all_reduce", "all_gather", "merge_call", "create_inside"):
            return self.across(operation)
        value = self.value(operation["value"], rank)
        if op == "create_inside":
            return self.tf.constant(self.tf.Variable(value).read_value().numpy())
        if op == "return":
            return value
        if op == "all_reduce":
            return ctx.all_reduce(operation["reduce_op"], value)
        if op == "all_gather":
            return ctx.all_gather(value, operation["axis"])
        assert op == "merge_call"
        return ctx.merge_call(self.merged(operation), args=(value,))

    def merged(self, operation: dict[str, Any]) -> Callable[..., Any]:
        def fn(strategy: Any, value: Any) -> Any:
            if operation["fn"] == "identity":
                return value
            if operation["fn"] == "read":
                return self.tf.constant(self.variable.read_value().numpy())
            if operation["fn"] == "run":
                return strategy.run(self.summed, args=(value,))
            reduced = strategy.reduce(operation["reduce_op"], value, axis=None)
            if operation["fn"] == "assign_reduced":
                self.variable.assign(reduced)
                return None
            return reduced

        return fn

    def summed(self, value: Any) -> Any:
        ctx = self.tf.distribute.get_replica_context()
        return ctx.all_reduce("sum", self.tf.identity(value))

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
            return strategy.run(self.tf.identity, args=(value,))
        if op == "reduce":
            return strategy.reduce(operation["reduce_op"], value, axis=operation["axis"])
        if op == "gather":
            return strategy.gather(value, operation["axis"])
        if op == "local_results":
            return strategy.experimental_local_results(value)
        if op == "reduce_to":
            return strategy.extended.reduce_to(operation["reduce_op"], value, self.variable)
        if op == "broadcast_to":
            return strategy.extended.broadcast_to(value, self.variable)
        assert op == "update"

        def fn(copy: Any, argument: Any) -> Any:
            getattr(copy, operation["verb"])(argument)
            return self.tf.constant(copy.read_value().numpy())

        return strategy.extended.update(self.variable, fn, args=(value,), group=operation["group"])

    def batches(self, operation: dict[str, Any]) -> list[Any]:
        dataset = self.tf.data.Dataset.range(operation["elements"])
        if operation["batch"] is not None:
            dataset = dataset.batch(operation["batch"], operation["drop_remainder"])
        if operation["op"] == "own_batches":
            return list(self.strategy.distribute_datasets_from_function(lambda _: dataset))
        return list(self.strategy.experimental_distribute_dataset(dataset))


# -- the worker, and who replaces it ---------------------------------------------------------------


def work() -> None:
    """Answer one program a line, on what was standard output; nothing else may write there."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    machine = Machine()
    for line in sys.stdin:
        answers.write(json.dumps(machine.answer(json.loads(line))) + "\n")


class Worker:
    def __init__(self) -> None:
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)

    def ask(self, program: dict[str, Any]) -> list[dict[str, Any]]:
        self.process.stdin.write(json.dumps(program) + "\n")
        self.process.stdin.flush()
        try:
            return json.loads(self.lines.get(timeout=SECONDS))
        except queue.Empty:
            raise TimeoutError(f"no answer after {SECONDS} s to {json.dumps(program)}") from None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()


def answers_to(programs: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    workers: dict[int, Worker] = {}
    try:
        for program in programs:
            replicas = program["replicas"]
            if replicas not in workers:
                workers[replicas] = Worker()
            outcomes = workers[replicas].ask(program)
            failed = len(outcomes) - 2 if "error" in outcomes[-1] else -1
            if failed >= 0 and program["operations"][failed]["op"] in COLLECTIVE:
                workers.pop(replicas).close()
            yield outcomes
    finally:
        for worker in workers.values():
            worker.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", action="store_true", help="answer programs from stdin")
    parser.add_argument("--every", type=int, default=1, help="only every k-th program")
    parser.add_argument("--out", type=Path, default=ANSWERS)
    arguments = parser.parse_args()
    if arguments.worker:
        work()
        return
    import importlib.metadata

    distributions = ("tensorflow-cpu", "tensorflow")
    versions = []
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    programs = dict(list(all_programs().items())[:: arguments.every])
    answers = dict(zip(programs, answers_to(list(programs.values())), strict=True))
    lines = ",\n".join(
        f"{json.dumps(name)}: {json.dumps(outcomes, separators=(',', ':'))}"
        for name, outcomes in answers.items()
    )
    head = json.dumps(versions[0])
    arguments.out.write_text(f'{{"tensorflow": {head}, "answers": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    main()
