"""Run of ``train``: all replicas and one device in turn, checkpoints, progress, and a report."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dvkernels as dv
from dvkernels.checkpoint.format import step_names
from dvkernels.cli import argument_types, digits, output_paths, training_loop, training_report
from dvkernels.cli.comparison import Comparison
from dvkernels.cli.compute_alone import ComputeAlone
from dvkernels.cli.progress_bars import ProgressBars, say
from dvkernels.cli.run_checkpoints import NoCheckpoints, RunCheckpoints
from dvkernels.cli.training_config import CheckpointConfig, TrainingConfig
from dvkernels.cli.training_loop import Training
from dvkernels.cluster.resolver import ClusterResolver
from dvkernels.cluster.resolvers import default_resolver
from dvkernels.devices import cpu
from dvkernels.devices.device import Device
from dvkernels.devices.registry import list_devices, resolve
from dvkernels.errors import CheckpointError

__all__: list[str] = []


def run(arguments: argparse.Namespace) -> int:
    """Train, on one device in turn, test, and print the results; return 1 if the run diverged."""
    devices = _devices(arguments.device, arguments.replicas)
    config = TrainingConfig(
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        num_hidden=arguments.hidden,
        learning_rate=arguments.learning_rate,
        dtype=arguments.dtype,
        seed=arguments.seed,
    )
    plot_path = output_paths.plot(arguments.plot) if arguments.plot else None
    data = digits.with_shifts(digits.load(config.dtype))
    checkpoint_config = _checkpoint_config(arguments, training_loop.steps_per_epoch(config, data))
    resolver = default_resolver()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_one_blas_thread())
        strategy = stack.enter_context(_strategy(resolver, devices))
        training = Training(strategy, config, data)
        stack.enter_context(training.batches)
        checkpoints: NoCheckpoints | RunCheckpoints = (
            NoCheckpoints()
            if checkpoint_config is None
            else RunCheckpoints(training, checkpoint_config)
        )
        stack.enter_context(checkpoints)
        alone = None
        if resolver.is_chief:
            alone = Training(stack.enter_context(dv.OneDeviceStrategy(devices[0])), config, data)
            stack.enter_context(alone.batches)
            _announce(data, strategy.num_replicas_in_sync)
        comparison = Comparison(training, alone, _compute_alone(config, data, strategy))
        _run(comparison, checkpoints)
        checkpoints.finish()
    if alone is None:
        return 0
    result = training_report.figures(comparison, config, data, checkpoints.resumed_at_step)
    result["num_workers"] = resolver.num_workers
    if checkpoints.resumed_at_step == training.num_steps:
        say(
            f"nothing left to do: the run in {arguments.checkpoint_dir} has completed its "
            f"{training.steps} steps, {config.epochs} epochs; pass a larger --epochs to go on"
        )
    if plot_path is not None:
        _draw(plot_path, comparison, result)
    print(json.dumps(result) if arguments.json else training_report.text(result))
    return 1 if result["diverged"] else 0


def _run(comparison: Comparison, checkpoints: NoCheckpoints | RunCheckpoints) -> None:
    """Run the comparison; save, and show the progress, while its clock stands still."""
    training, alone = comparison.training, comparison.alone
    shown = {} if alone is None else {"training": training, "one device": alone}
    with ProgressBars(shown) as bars:

        def after_step() -> bool:
            with training.times.measured("checkpoint"):
                checkpoints.after_step()
            with training.times.paused():
                bars.draw()
            return False

        def after_step_alone() -> bool:
            assert alone is not None
            with alone.times.paused():
                bars.draw()
            return checkpoints.is_requested

        comparison.run(after_step, after_step_alone)


def _announce(data: digits.Digits, num_replicas: int) -> None:
    say(
        f"{len(data.train_images)} training and {len(data.test_images)} test digits; "
        f"{argument_types.counted(num_replicas, 'replica')}; "
        "BLAS uses one thread per replica, and one on one device"
    )


def _compute_alone(
    config: TrainingConfig, data: digits.Digits, strategy: dv.Strategy
) -> ComputeAlone | None:
    """Return the compute without the library; None for GPUs, which share no cores."""
    devices = strategy.worker_devices
    if devices[0].kind != "cpu":
        return None
    return ComputeAlone(config, data, strategy.num_replicas_in_sync, len(devices))


def _strategy(resolver: ClusterResolver, devices: list[Device]) -> dv.Strategy:
    if resolver.num_workers > 1:
        return dv.MultiWorkerMirroredStrategy(resolver, devices=devices)
    return dv.MirroredStrategy(devices)


def _devices(kind: str, num_replicas: int | None) -> list[Device]:
    """Return the device of each replica; several share a GPU where there are fewer."""
    if kind == "cuda":
        existing = list_devices(kind) or [Device(kind, 0)]
        chosen = [existing[k % len(existing)] for k in range(num_replicas or len(existing))]
    else:
        chosen = [Device(kind, k) for k in range(num_replicas or cpu.usable_cores())]
    return [resolve(device) for device in chosen]


def _checkpoint_config(
    arguments: argparse.Namespace, steps_per_epoch: int
) -> CheckpointConfig | None:
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
        arguments.checkpoint_dir,
        arguments.checkpoint_every or steps_per_epoch,
        arguments.preemption_exit_code,
    )


@contextlib.contextmanager
def _one_blas_thread() -> Iterator[None]:
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1, user_api="blas"):
        yield


def _draw(path: Path, comparison: Comparison, result: dict[str, Any]) -> None:
    """Draw the losses of the run, and the parts of a step beside those on one device."""
    from dvkernels.benchmarks import plot

    assert comparison.alone is not None
    replicas = argument_types.counted(result["num_replicas"], "replica")
    first = comparison.training.steps - len(comparison.training.losses) + 1
    plot.draw_training(
        {replicas: (first, comparison.training.losses), "one device": (1, comparison.alone.losses)},
        {replicas: result["seconds"], "one device": result["one_device_seconds"]},
        path,
        training_report.headline(result),
    )
