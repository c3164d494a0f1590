"""``python -m dvkernels train``: training on handwritten digits over several replicas.

Under ``launch``, ``mpiexec`` or ``srun`` all workers train one model, and the chief reports.
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
from dvkernels.cli.training_loop import (
    CheckpointConfig,
    ProgressReport,
    TrainingConfig,
    TrainingResult,
)
from dvkernels.cluster.resolver import ClusterResolver
from dvkernels.cluster.resolvers import default_resolver
from dvkernels.devices import cpu
from dvkernels.devices.device import Device
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
    defaults = TrainingConfig()
    parser.add_argument(
        "--replicas",
        type=argument_types.positive,
        help="number of replicas of this process (default: one per usable core, or per GPU)",
    )
    parser.add_argument(
        "--epochs",
        type=argument_types.positive,
        default=defaults.epochs,
        help="passes over the training set",
    )
    parser.add_argument(
        "--batch-size",
        type=argument_types.positive,
        default=defaults.batch_size,
        help="global batch size, of all replicas together",
    )
    parser.add_argument(
        "--hidden", type=argument_types.positive, default=defaults.num_hidden, help="hidden units"
    )
    parser.add_argument("--device", default="cpu", help="kind of device: cpu or cuda")
    parser.add_argument(
        "--seed",
        type=argument_types.natural,
        default=defaults.seed,
        help="seed of the weights and of the order of the examples",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float64"),
        default=defaults.dtype,
        help="element type of the weights",
    )
    parser.add_argument(
        "--checkpoint-dir", help="save checkpoints here; SIGTERM and SIGUSR1 save one and exit"
    )
    parser.add_argument(
        "--checkpoint-every",
        type=argument_types.positive,
        metavar="STEPS",
        help="steps between two checkpoints (default: those of an epoch)",
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
        help="exit status after SIGTERM or SIGUSR1",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object; times are seconds per step"
    )


def run(arguments: argparse.Namespace) -> int:
    """Train, test, compare with one device, and print the results."""
    for package in ("sklearn", "rich", "threadpoolctl"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(
                f"train needs the package {package}; install the demo extra: "
                f"python -m pip install 'dvkernels[demo]'"
            )
    devices = _devices(arguments.device, arguments.replicas)
    config = TrainingConfig(
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        num_hidden=arguments.hidden,
        dtype=arguments.dtype,
        seed=arguments.seed,
    )
    data = digits.load(config.dtype)
    checkpoints = _checkpoint_config(arguments)
    resolver = default_resolver()
    with _one_blas_thread(), _strategy(resolver, devices) as strategy:
        num_replicas = strategy.num_replicas_in_sync
        if not resolver.is_chief:
            training_loop.train(strategy, config, data, _ignore_progress, checkpoints)
            return 0
        _say(
            f"{len(data.train_images)} training and {len(data.test_images)} test digits; "
            f"{argument_types.counted(num_replicas, 'replica')}; "
            "BLAS uses one thread per replica"
        )
        outcome = _train(strategy, config, data, "training", checkpoints)
        if outcome.resumed_at_step == outcome.steps:
            _say(
                f"nothing left to do: the run in {arguments.checkpoint_dir} has completed its "
                f"{outcome.steps} steps, {config.epochs} epochs; pass a larger --epochs to go on"
            )
        with OneDeviceStrategy(devices[0]) as alone:
            reference = _train(alone, config, data, "the same on one device", None)

    def accuracy(trained: TrainingResult) -> float:
        return mlp.accuracy(trained.weights, config.num_hidden, data.test_images, data.test_labels)

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
        "dtype": config.dtype,
        "seed": config.seed,
    }
    print(json.dumps(result) if arguments.json else _report(result))
    return 0


def _speed_up(outcome: TrainingResult, reference: TrainingResult) -> float | None:
    """Return the ratio of examples/s to one device; None if a resumed run had no steps left."""
    if not (outcome.examples_per_second > 0 and reference.examples_per_second > 0):
        return None
    return outcome.examples_per_second / reference.examples_per_second


def _strategy(resolver: ClusterResolver, devices: list[Device]) -> Strategy:
    if resolver.num_workers > 1:
        return MultiWorkerMirroredStrategy(resolver, devices=devices)
    return MirroredStrategy(devices)


def _ignore_progress(step: int, examples: int, loss: float, rate: float) -> None:
    """Do nothing: the chief shows the progress."""


def _devices(kind: str, num_replicas: int | None) -> list[Device]:
    """Return the device of each replica; several share a GPU where there are fewer."""
    if kind == "cuda":
        existing = list_devices(kind) or [Device(kind, 0)]
        chosen = [existing[k % len(existing)] for k in range(num_replicas or len(existing))]
    else:
        chosen = [Device(kind, k) for k in range(num_replicas or cpu.usable_cores())]
    return [resolve(device) for device in chosen]


def _checkpoint_config(arguments: argparse.Namespace) -> CheckpointConfig | None:
    """Return where and when checkpoints are saved; None for none; raise if options conflict."""
    if arguments.checkpoint_dir is None:
        if arguments.resume or arguments.checkpoint_every:
            raise CheckpointError(
                "--resume and --checkpoint-every need the folder of the checkpoints; name it with "
                "--checkpoint-dir"
            )
        return None
    output_paths.folder("--checkpoint-dir", arguments.checkpoint_dir, create=True)
    existing = step_names.within(Path(arguments.checkpoint_dir))
    if existing and not arguments.resume:
        raise CheckpointError(
            f"{arguments.checkpoint_dir} holds the checkpoints of a run, up to "
            f"{existing[-1].name}; pass --resume to go on with it, or another --checkpoint-dir"
        )
    return CheckpointConfig(
        arguments.checkpoint_dir, arguments.checkpoint_every, arguments.preemption_exit_code
    )


def _train(
    strategy: Strategy,
    config: TrainingConfig,
    data: digits.Digits,
    title: str,
    checkpoints: CheckpointConfig | None,
) -> TrainingResult:
    with _progress_bar(title, training_loop.num_steps(config, data)) as report:
        return training_loop.train(strategy, config, data, report, checkpoints)


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
                "none of them now: the run was complete"
                if result["resumed_at_step"] == result["steps"]
                else f"{result['examples_per_second']:.0f} examples/s"
                + (f", resumed at {resumed}" if (resumed := result["resumed_at_step"]) else "")
                + f"\ntime per step      {step * 1e6:.0f} us: {shares}"
            ),
            f"against one device {result['relative_difference_to_one_device']:.2e} "
            f"relative difference of the weights, accuracy there "
            f"{result['one_device_test_accuracy']:.4f}",
            f"one device         {result['one_device_examples_per_second']:.0f} examples/s"
            + ("" if result["speed_up"] is None else f", speed-up {result['speed_up']:.2f}"),
            f"weights            sha256 {result['weights_sha256']}",
        ]
    )


@contextlib.contextmanager
def _progress_bar(title: str, num_steps: int) -> Iterator[ProgressReport]:
    """Show a progress bar with loss and examples/s on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description:24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"),
    )
    every = max(1, num_steps // 100)  # drawing holds the interpreter's lock
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
