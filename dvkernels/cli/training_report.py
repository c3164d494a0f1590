"""Report of ``train``: its figures, and in words what they say about the machine and the work."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from dvkernels.cli import argument_types, mlp, training_loop
from dvkernels.cli.comparison import Comparison
from dvkernels.cli.digits import Digits
from dvkernels.cli.training_config import TrainingConfig
from dvkernels.cli.training_loop import Training
from dvkernels.profiler import core_usage

__all__: list[str] = []

_GOAL = 0.9  # of what is possible
_GUESSING = math.log(10)  # loss of equal probabilities for all digits
_MUCH = 0.1  # share of the cores that other programs take
_SHORT = 5e-4  # seconds of compute that are too few to share, however busy the cores


def figures(
    comparison: Comparison, config: TrainingConfig, data: Digits, resumed_at_step: int | None
) -> dict[str, Any]:
    """Return the figures of a run, of its chief; None for what could not be measured."""
    training, alone = comparison.training, comparison.alone
    assert alone is not None
    weights, reference = training.weights.numpy(), alone.weights.numpy()
    of_possible = [
        speed_up / possible
        for speed_up, possible in zip(comparison.speed_ups, comparison.possible, strict=False)
    ]
    with np.errstate(all="ignore"):  # of a diverged run
        found = {
            "test_accuracy": _accuracy(weights, config, data),
            "final_loss": _finite(training.loss),
            "diverged": diverged(training.loss),
            "weights_sha256": mlp.checksum(weights),
            "num_replicas": training.strategy.num_replicas_in_sync,
            "steps": training.steps,
            "resumed_at_step": resumed_at_step,
            **_times(training),
            "speed_up": _median(comparison.speed_ups),
            "possible_speed_up": _median(comparison.possible),
            "speed_up_over_possible": _median(of_possible),
            "quartiles": {
                "speed_up": _quartiles(comparison.speed_ups),
                "possible_speed_up": _quartiles(comparison.possible),
                "speed_up_over_possible": _quartiles(of_possible),
            },
            "num_blocks": len(comparison.speed_ups),
            "share_of_other_programs": comparison.share_of_others,
            "relative_difference_to_one_device": _finite(
                training_loop.relative_difference(weights, reference)
            ),
            "one_device_test_accuracy": _accuracy(reference, config, data),
            **{f"one_device_{name}": number for name, number in _times(alone).items()},
            "batch_size": config.batch_size,
            "hidden": config.num_hidden,
            "learning_rate": config.learning_rate,
            "dtype": config.dtype,
            "seed": config.seed,
        }
    return {**found, "notes": notes(found, len(data.train_images))}


def diverged(loss: float) -> bool:
    """Return whether a final loss is not finite, or far above that of guessing."""
    return not loss < 2 * _GUESSING


def notes(found: dict[str, Any], num_examples: int) -> list[str]:
    """Return what the figures say: about the machine, the size of the work, a diverged run."""
    said = []
    if found["diverged"]:
        said.append(
            f"the training diverged: its loss is {_shown_loss(found['final_loss'])} after step "
            f"{found['steps']}, where guessing has {_GUESSING:.1f}; pass a --learning-rate below "
            f"{found['learning_rate']:g}"
        )
    others = found["share_of_other_programs"] or 0.0
    if others > _MUCH:
        said.append(
            f"other programs took {others:.0%} of the cores meanwhile: the figures of a quiet "
            f"machine are better"
        )
        if _is_too_small(found) and found["seconds"]["compute"] < _SHORT:
            said.append(_what_would_pay(found, num_examples))
        return said  # the rest would be about them
    possible, num_replicas = found["possible_speed_up"], found["num_replicas"]
    if possible is not None and possible < 0.75 * num_replicas:
        reason = (
            "cores of this process are threads of one physical core"
            if core_usage.share_a_physical_core()
            else "the cores share something, such as a physical core behind virtual ones, its "
            "clock, or the memory"
        )
        said.append(
            f"{num_replicas} threads without any library are only {possible:.2f} times as fast as "
            f"one: {reason}"
        )
    if _is_too_small(found):
        said.append(_what_would_pay(found, num_examples))
    return said


def _is_too_small(found: dict[str, Any]) -> bool:
    """Return whether more than compute and waiting for busy cores keeps replicas from paying."""
    share = found["speed_up_over_possible"]
    return share is not None and found["num_replicas"] > 1 and share < _GOAL - 0.1


def _what_would_pay(found: dict[str, Any], num_examples: int) -> str:
    """Return which part of a step is too large beside its compute, and a work that would pay."""
    seconds = found["seconds"]
    rest = {part: time for part, time in seconds.items() if part != "compute"}
    largest = max(rest, key=lambda part: rest[part])
    # The rest hardly grows with the work, so the compute must be so many times as long.
    factor = _GOAL / (1 - _GOAL) * sum(rest.values()) / seconds["compute"]
    factor = 2 ** math.ceil(math.log2(max(2.0, factor)))
    size = found["batch_size"] * factor
    option = (
        f"--batch-size {size}" if size <= num_examples else f"--hidden {found['hidden'] * factor}"
    )
    return (
        f"the work is too small to pay: beside {_time(seconds['compute'])} of compute a step has "
        f"{_time(sum(rest.values()))} of other parts, most of it {largest} "
        f"({_time(rest[largest])}); {option} would make the compute {_GOAL:.0%} of a step"
    )


def headline(found: dict[str, Any]) -> str:
    """Return the speed-up beside the possible one, and the number of replicas."""
    replicas = argument_types.counted(found["num_replicas"], "replica")
    speed_up, possible = found["speed_up"], found["possible_speed_up"]
    if speed_up is None:
        return f"no step was measured ({replicas})"
    if possible is None:
        return f"speed-up {speed_up:.2f} ({replicas})"
    return f"speed-up {speed_up:.2f} of {possible:.2f} possible ({replicas})"


def text(found: dict[str, Any]) -> str:
    """Return the report as lines for people."""
    lines = [headline(found)]
    quartiles = found["quartiles"]["speed_up_over_possible"]
    if quartiles is not None:
        lines.append(
            f"of the possible    {found['speed_up_over_possible']:.2f}, quartiles "
            f"{quartiles[0]:.2f} to {quartiles[1]:.2f} of "
            f"{argument_types.counted(found['num_blocks'], 'block')}"
        )
    if found["seconds"] is not None:
        lines += [
            f"time per step      {_time(found['seconds_per_step'])}: {_parts(found['seconds'])}",
            f"throughput         {found['examples_per_second']:,.0f} examples/s, one device "
            f"{found['one_device_examples_per_second']:,.0f}",
        ]
    if found["share_of_other_programs"] is not None:
        lines.append(
            f"other programs     {found['share_of_other_programs']:.1%} of the cores meanwhile"
        )
    resumed = found["resumed_at_step"]
    difference = found["relative_difference_to_one_device"]
    shown = "not a number" if difference is None else f"{difference:.2e}"
    lines += [
        f"test accuracy      {found['test_accuracy']:.4f}",
        f"final loss         {_shown_loss(found['final_loss'])}",
        f"steps              {found['steps']}" + (f", resumed at {resumed}" if resumed else ""),
        f"against one device {shown} relative difference of the weights, accuracy there "
        f"{found['one_device_test_accuracy']:.4f}",
        f"weights            sha256 {found['weights_sha256']}",
        *(f"note: {note}" for note in found["notes"]),
    ]
    return "\n".join(lines)


def _accuracy(weights: Any, config: TrainingConfig, data: Digits) -> float:
    return mlp.accuracy(weights, config.num_hidden, data.test_images, data.test_labels)


def _times(training: Training) -> dict[str, Any]:
    """Return throughput and seconds per step; None where no step was taken."""
    times = training.times
    if not times.num_steps:
        return {"examples_per_second": None, "seconds_per_step": None, "seconds": None}
    return {
        "examples_per_second": times.examples_per_second,
        "seconds_per_step": times.seconds_per_step,
        "seconds": times.by_part(),
    }


def _median(numbers: Sequence[float]) -> float | None:
    return statistics.median(numbers) if numbers else None


def _quartiles(numbers: Sequence[float]) -> list[float] | None:
    if len(numbers) < 2:
        return [*numbers, *numbers] or None
    low, _, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return [low, high]


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _shown_loss(loss: float | None) -> str:
    return "not a finite number" if loss is None else f"{loss:.3g}"


def _parts(seconds: dict[str, float]) -> str:
    shown = [f"{part} {_time(time)}" for part, time in seconds.items() if round(time * 1e6)]
    return ", ".join(shown)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"
