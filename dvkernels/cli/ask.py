"""``python -m dvkernels ask``: what a running job does, asked over its processes' sockets."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from dvkernels.cli import argument_types

__all__: list[str] = []

HELP = "ask a running job what each replica does, waits for, and holds in memory"
EXAMPLES = (
    ("a job that seems to hang", "python -m dvkernels ask PID"),
    ("with the stacks of all threads", "python -m dvkernels ask PID --stacks"),
)

Answer = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the process and the options."""
    parser.add_argument(
        "pid", type=argument_types.positive, metavar="PID",
        help="process of the job on this host: launch, a worker, or a program of one process",
    )  # fmt: skip
    parser.add_argument(
        "--watch", type=argument_types.seconds, default=0.2, metavar="SECONDS",
        help="how long to watch the collectives",
    )  # fmt: skip
    parser.add_argument(
        "--last", type=argument_types.positive, default=10, metavar="N",
        help="how many collectives to show",
    )  # fmt: skip
    parser.add_argument("--stacks", action="store_true", help="show the stacks of all threads")
    argument_types.add_json(parser, "the answers of all workers")


def run(arguments: argparse.Namespace) -> int:
    """Ask all workers of the job on this host at once, and print their answers."""
    from dvkernels.cli import job_answers

    answers = job_answers.answers(arguments.pid, arguments.watch, arguments.last)
    late = [*_late(answers)]
    if arguments.json:
        print(json.dumps({"late": late, "workers": answers}))
        return 0
    for answer in answers:
        _print(answer, arguments.stacks)
    for each in late:
        print(f"waited for: {each['name']}, {each['at']}")
    return 0


def _late(answers: list[Answer]) -> Iterator[dict[str, Any]]:
    """Yield the replicas and workers that others wait for."""
    is_between = any(
        each["state"] == "waits for workers" for a in answers for each in a.get("replicas", [])
    )
    for answer in answers:
        replicas = answer.get("replicas", [])
        waits = any(each["state"] in ("waits", "performs") for each in replicas)
        if "lock" in answer and (is_between or len(answers) == 1):
            yield {"pid": answer["pid"], "name": f"process {answer['pid']}", "at": answer["lock"]}
        if any(each["state"] == "waits for workers" for each in replicas):
            continue  # the others of this worker wait for one that waits for workers
        running = [each for each in replicas if each["state"] == "runs"]
        for each in running if waits or is_between else ():
            name = f"replica {each['replica']} of worker {answer['worker']}"
            yield {**each, "pid": answer["pid"], "worker": answer["worker"], "name": name}
        if is_between and not replicas:
            name = f"worker {answer['worker']}"
            yield {"pid": answer["pid"], "name": name, "at": "outside of a step"}


def _print(answer: Answer, with_stacks: bool) -> None:
    if "lock" not in answer:
        print(f"worker {answer['worker']}, process {answer['pid']}")
    else:
        print(f"process {answer['pid']}")
        print(f"  the interpreter's lock is {answer['lock']}; its stacks:")
        print("    " + answer["stacks"].replace("\n", "\n    "))
        return
    for each in sorted(answer["replicas"], key=lambda found: found["replica"]):
        print(f"  replica {each['replica']} {_state(each)}, at {each['at']}")
    for each in answer["iterators"]:
        print(f"  {each['iterator']}: {each['ready']} of {each['prefetch']} batches ready")
    for each in answer["collectives"]:
        print(
            f"  {each['seconds_ago']:.3f} s ago replica {each['replica']} ended {each['call']} "
            f"after {each['seconds']:.6f} s"
        )
    memory = answer["memory"]
    for device, owners in sorted(memory["by_device"].items()):
        held = ", ".join(f"{owner} {nbytes:,}" for owner, nbytes in owners.items() if nbytes)
        print(f"  {device}: {held} bytes")
    for thread in answer["threads"] if with_stacks else ():
        print(f"  thread {thread['name']}")
        for line in thread["stack"]:
            print(f"    {line}")


def _state(replica: dict[str, Any]) -> str:
    state = replica["state"]
    if state == "runs":
        return "runs" if "item" not in replica else f"works on item {replica['item']}"
    text = f"{state.replace('waits', 'waits in ' + replica['call'], 1)}"
    if state == "performs":
        return f"performs {replica['call']}"
    if state == "waits":
        seconds = replica["seconds"]
        lasted = "less than a second" if seconds is None else f"{seconds:.1f} s"
        text += f" for replicas {replica['replicas']}, {lasted}"
    return text
