"""``python -m dvkernels info``: versions, devices, and a check of the all-reduce on each device."""

from __future__ import annotations

import argparse
import json
from typing import Any

from dvkernels.cli import argument_types
from dvkernels.cluster.resolvers import default_resolver

__all__: list[str] = []

HELP = "check an all-reduce on every device; under launch, also show each worker's host and cores"
EXAMPLES = (
    ("this machine", "python -m dvkernels info"),
    ("each of two workers", "python -m dvkernels launch -n 2 -m dvkernels info"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the one option."""
    argument_types.add_json(parser, "versions, devices and outcomes")


def run(arguments: argparse.Namespace) -> int:
    """Print versions, one line per device and one for all together; return 1 if any failed.

    Each of several workers prints one line with its position, devices and outcome.
    """
    from dvkernels.cli import machine_report

    resolver = default_resolver()
    is_alone = resolver.num_workers == 1
    found = machine_report.machine_report() if is_alone else machine_report.worker_report(resolver)
    if arguments.json:
        print(json.dumps(found))
    elif is_alone:
        _print_machine(found)
    else:
        print(f"{found['place']}: {' '.join(found['devices'])} {found['together']}")
    return 0 if {*found["devices"].values(), found["together"]} == {"PASS"} else 1


def _print_machine(found: dict[str, Any]) -> None:
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    lock = "on" if found["interpreter_lock"] else "off"
    print(f"dvkernels {found['dvkernels']}, Python {found['python']}, {packages}")
    print(
        f"{found['system']}, interpreter lock {lock}, Numba's threading layer "
        f"{found['threading_layer']}"
    )
    print(f"compiled code: {found['compiled_code']}")
    print(f"threads: {_described(found['threads'])}")
    for device, outcome in found["devices"].items():
        is_simulated = found["cuda"] == "simulated" and not device.startswith("cpu")
        print(f"{device:8} {outcome}{' in the simulator' * is_simulated}")
    print(f"{'together':8} {found['together']}")
    if found["cuda"] == "found":
        print(f"kernels of GPUs: {found['cuda_kernels']}")
    elif found["cuda"] != "simulated":
        print(f"{'cuda':8} {found['cuda']}")


def _described(threads: dict[str, Any]) -> str:
    """Return the threads of BLAS and OpenMP, and how many of them a replica may use."""
    share, libraries = threads["share"], threads["libraries"]
    cores = argument_types.counted(threads["cores"], "core")
    among = f"in each of {threads['replicas']} replicas on {cores}"
    if libraries is None:
        return (
            f"those of BLAS and OpenMP are not held to {share} {among}: threadpoolctl is not "
            f"installed (python -m pip install 'dvkernels[threads]')"
        )
    numbers = ", ".join(f"{name} {number}" for name, number in libraries.items())
    return f"{numbers or 'no BLAS or OpenMP found'}; at most {share} {among}"
