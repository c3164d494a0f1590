"""``python -m dvkernels train``: train on handwritten digits over several replicas.

Started by ``launch``, ``mpiexec`` or ``srun``, all workers train one model, and the first reports.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dvkernels.checkpoint.format import step_names
from dvkernels.cli import argument_types, digits, mlp, output_paths, training_loop
from dvkernels.cli.training_loop import Keeping, Report, TrainingConfig, TrainingResult
from dvkernels.cluster.resolvers import ClusterResolver, default_resolver
from dvkernels.devices import cpu
from dvkernels.devices.base import Device
from dvkernels.devices.registry import list_devices, resolve
from dvkernels.errors import CheckpointError, DvKernelsError
from dvkernels.strategies.base import Strategy
from dvkernels.strategies.mirrored import MirroredStrategy
from dvkernels.strategies.multi_worker_mirrored import MultiWorkerMirroredStrategy
from dvkernels.strategies.one_device import OneDeviceStrategy

__all__: list[str] = []

HELP = "train a two-layer network on handwritten digits over several replicas"


class MissingExtraError(DvKernelsError, ImportError):
    """A package of the demo extra is not installed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    recipe = TrainingConfig()
    parser.add_argument(
        "--replicas",
        type=argument_types.positive,
        help="number of replicas of this process (default: one per usable core, or per GPU)",
    )
    parser.add_argument(
        "--epochs",
        type=argument_types.positive,
        default=recipe.epochs,
        help="how often all are seen",
    )
    parser.add_argument(
        "--batch-size",
        type=argument_types.positive,
        default=recipe.batch_size,
        help="of all replicas together",
    )
    parser.add_argument(
        "--hidden", type=argument_types.positive, default=recipe.num_hidden, help="hidden units"
    )
    parser.add_argument("--device", default="cpu", help="kind of device: cpu or cuda")
    parser.add_argument(
        "--seed", type=argument_types.natural, default=recipe.seed, help="of weights and order"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "float64"), default=recipe.dtype, help="of the weights"
    )
    parser.add_argument(
        "--checkpoint-dir", help="save checkpoints here; SIGTERM and SIGUSR1 save one and exit"
    )
    parser.add_argument(
        "--checkpoint-every",
        type=argument_types.positive,
        metavar="STEPS",
        help="how often (default: once an epoch)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint; start afresh where there is none",
    )
    parser.add_argument(
        "--preemption-exit-code",
        type=argument_types.exit_status,
        default=42,
        help="after SIGTERM or SIGUSR1",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object; times are seconds per step"
    )


def run(arguments: argparse.Namespace) -> int:
    """Train, test, compare with one device, and print what came of it."""
    for package in ("sklearn", "rich", "threadpoolctl"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(
                f"train needs the package {package}; install the demo extra: "
                f"python -m pip install 'dvkernels[demo]'"
            )
    devices = _devices(arguments.device, arguments.replicas)
    recipe = TrainingConfig(
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        num_hidden=arguments.hidden,
        dtype=arguments.dtype,
        seed=arguments.seed,
    )
    data = digits.load(recipe.dtype)
    keeping = _keeping(arguments)
    resolver = default_resolver()
    with _one_blas_thread(), _strategy(resolver, devices) as strategy:
        num_replicas = strategy.num_replicas_in_sync
        if not resolver.is_chief:
            training_loop.train(strategy, recipe, data, _report_nothing, keeping)
            return 0
        _say(
            f"{len(data.train_images)} digits to learn from, {len(data.test_images)} held out; "
            f"{argument_types.counted(num_replicas, 'replica')}; "
            "BLAS is held to one thread a replica"
        )
        outcome = _train(strategy, recipe, data, "training", keeping)
        if outcome.resumed_at_step == outcome.steps:
            _say(
                f"nothing was left to do: the run in {arguments.checkpoint_dir} has had its "
                f"{outcome.steps} steps, {recipe.epochs} epochs; pass a larger --epochs to go on"
            )
        with OneDeviceStrategy(devices[0]) as alone:
            reference = _train(alone, recipe, data, "the same on one device", None)

    def accuracy(trained: TrainingResult) -> float:
        return mlp.accuracy(trained.weights, recipe.num_hidden, data.test_images, data.test_labels)

    result = {
        "test_accuracy": accuracy(outcome),
        "final_loss": outcome.final_loss,
        "weights_sha256": mlp.checksum(outcome.weights),
        "num_workers": resolver.num_workers,
        "num_replicas": num_replicas,
        "steps": outcome.steps,
        "resumed_at_step": outcome.resumed_at_step,
        "examples_per_second": outcome.examples_per_second,
        "seconds_per_step": outcome.seconds_per_step,
        "compute_seconds": outcome.compute_seconds,
        "communication_seconds": outcome.communication_seconds,
        "input_seconds": outcome.input_seconds,
        "relative_difference_to_one_device": training_loop.relative_difference(
            outcome.weights, reference.weights
        ),
        "one_device_test_accuracy": accuracy(reference),
        "one_device_examples_per_second": reference.examples_per_second,
        "speed_up": _speed_up(outcome, reference),
        "dtype": recipe.dtype,
        "seed": recipe.seed,
    }
    print(json.dumps(result) if arguments.json else _report(result))
    return 0


def _speed_up(outcome: TrainingResult, reference: TrainingResult) -> float | None:
    """Return how many times faster it went than on one device; None if all was done before."""
    if not (outcome.examples_per_second > 0 and reference.examples_per_second > 0):
        return None
    return outcome.examples_per_second / reference.examples_per_second


def _strategy(resolver: ClusterResolver, devices: list[Device]) -> Strategy:
    if resolver.num_workers > 1:
        return MultiWorkerMirroredStrategy(resolver, devices=devices)
    return MirroredStrategy(devices)


def _report_nothing(step: int, examples: int, loss: float, rate: float) -> None:
    """Leave it to the chief."""


def _devices(kind: str, num_replicas: int | None) -> list[Device]:
    """Return the device of each replica; several share a GPU where there are fewer."""
    if kind == "cuda":
        there = list_devices(kind) or [Device(kind, 0)]
        chosen = [there[k % len(there)] for k in range(num_replicas or len(there))]
    else:
        chosen = [Device(kind, k) for k in range(num_replicas or cpu.usable_cores())]
    return [resolve(device) for device in chosen]


def _keeping(arguments: argparse.Namespace) -> Keeping | None:
    """Return what is to be saved where; raise if that is not clear."""
    if arguments.checkpoint_dir is None:
        if arguments.resume or arguments.checkpoint_every:
            raise CheckpointError(
                "--resume and --checkpoint-every say what to do with checkpoints; say where they "
                "are with --checkpoint-dir"
            )
        return None
    output_paths.folder("--checkpoint-dir", arguments.checkpoint_dir, is_made=True)
    held = step_names.within(Path(arguments.checkpoint_dir))
    if held and not arguments.resume:
        raise CheckpointError(
            f"{arguments.checkpoint_dir} holds the checkpoints of a run, up to {held[-1].name}; "
            f"pass --resume to go on with it, or another --checkpoint-dir"
        )
    return Keeping(
        arguments.checkpoint_dir, arguments.checkpoint_every, arguments.preemption_exit_code
    )


def _train(
    strategy: Strategy,
    recipe: TrainingConfig,
    data: digits.Digits,
    title: str,
    keeping: Keeping | None,
) -> TrainingResult:
    with _progress(title, training_loop.num_steps(recipe, data)) as report:
        return training_loop.train(strategy, recipe, data, report, keeping)


def _report(result: dict[str, Any]) -> str:
    step = result["seconds_per_step"]
    shares = ", ".join(
        f"{name} {result[f'{name}_seconds'] * 1e6:.0f} us"
        for name in ("compute", "communication", "input")
    )
    return "\n".join(
        [
            f"test accuracy      {result['test_accuracy']:.4f}",
            f"final loss         {result['final_loss']:.3g}",
            f"steps              {result['steps']}, "
            + (
                "none of them now: the run had ended"
                if result["resumed_at_step"] == result["steps"]
                else f"{result['examples_per_second']:.0f} examples/s"
                + (f", resumed at {resumed}" if (resumed := result["resumed_at_step"]) else "")
                + f"\ntime per step      {step * 1e6:.0f} us: {shares}"
            ),
            f"against one device {result['relative_difference_to_one_device']:.2e} "
            f"relative difference of the weights, accuracy there "
            f"{result['one_device_test_accuracy']:.4f}",
            f"one device goes at {result['one_device_examples_per_second']:.0f} examples/s"
            + ("" if result["speed_up"] is None else f", speed-up {result['speed_up']:.2f}"),
            f"weights            sha256 {result['weights_sha256']}",
        ]
    )


@contextlib.contextmanager
def _progress(title: str, num_steps: int) -> Iterator[Report]:
    """Show a bar with loss and examples/s on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description:24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"),
    )
    every = max(1, num_steps // 100)  # drawing takes the interpreter from the replicas
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as progress:
        bar = progress.add_task(title, total=num_steps, pace="")

        def report(step: int, examples: int, loss: float, rate: float) -> None:
            if examples == 0:
                progress.update(bar, completed=step, pace=f"loss {loss:.4f}, resumed", refresh=True)
            elif step % every == 0 or step == num_steps:
                pace = f"loss {loss:.4f}  {rate:,.0f} examples/s"
                progress.update(bar, completed=step, pace=pace, refresh=True)

        yield report


@contextlib.contextmanager
def _one_blas_thread() -> Iterator[None]:
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1, user_api="blas"):
        yield


def _say(text: str) -> None:
    print(text, file=sys.stderr)
