"""``python -m dvkernels train``: training on handwritten digits over several replicas.

Under ``launch``, ``mpiexec`` or ``srun`` all workers train one model, and the chief reports.
"""

from __future__ import annotations

import argparse

from dvkernels.cli import argument_types, training_config
from dvkernels.cli.training_config import TrainingConfig

__all__: list[str] = []

HELP = "train a two-layer network on handwritten digits over several replicas"
EXAMPLES = (
    ("a replica per usable core", "python -m dvkernels train"),
    ("saved, and resumed", "python -m dvkernels train --checkpoint-dir runs/digits --resume"),
    ("two processes", "python -m dvkernels launch -n 2 -m dvkernels train --replicas 1"),
)


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
        help="passes over the training set, 1437 digits and their shifts by one pixel",
    )
    parser.add_argument(
        "--batch-size",
        type=argument_types.positive,
        default=defaults.batch_size,
        help="global batch size, of all replicas together; a larger one gives each replica more "
        "work per step",
    )
    parser.add_argument(
        "--hidden",
        type=argument_types.positive,
        default=defaults.num_hidden,
        help="hidden units; more of them make the compute and the gradients larger",
    )
    parser.add_argument(
        "--learning-rate",
        type=argument_types.positive_number,
        default=defaults.learning_rate,
        help="learning rate of the first step of gradient descent with momentum; it falls as "
        "1 / (1 + steps / 300)",
    )
    parser.add_argument(
        "--device", default="cpu", help="kind of device of the replicas: cpu or cuda"
    )
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
        "--checkpoint-dir",
        metavar="DIR",
        help="save checkpoints here (default: none); Ctrl-C, SIGHUP, SIGTERM and SIGUSR1 save the "
        "current step and exit",
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
        help="go on from the newest checkpoint; start afresh where there is none (default: start "
        "afresh, and refuse a folder that holds checkpoints)",
    )
    parser.add_argument(
        "--preemption-exit-code",
        type=argument_types.exit_status,
        default=42,
        metavar="STATUS",
        help="exit status after SIGTERM or SIGUSR1; that after Ctrl-C is 130, after SIGHUP 129",
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="draw loss and time per step to a file, whose suffix names the format (default: none)",
    )
    argument_types.add_json(parser, "the report, with times in seconds,")


def run(arguments: argparse.Namespace) -> int:
    """Train, on one device in turn, test, and print the results; return 1 if the run diverged."""
    training_config.require_packages()
    from dvkernels.cli import training_run

    return training_run.run(arguments)
