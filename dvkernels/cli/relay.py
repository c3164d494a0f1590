"""Start a worker so that each line it prints begins with its number. No part of the package.

``python relay.py VARIABLE COMMAND...``: the variable holds the number. This process becomes the
command. Another one, in a session of its own, passes on what comes through two pipes, in whole
lines, until nobody can write to them any more: also the last words of a worker that was killed.
When it has, a third pipe ends, whose other end the command finds in DVKERNELS_RELAY_ENDED.
Launchers have such an option, but some of them put it between the parts of a line.
"""

import itertools
import os
import select
import sys
from collections.abc import Iterable, Iterator

_NBYTES = 1 << 16


def main() -> None:
    """Start the process that passes on, and become the command."""
    variable, *command = sys.argv[1:]
    prefix = f"[{os.environ.get(variable, '?')}] ".encode()
    pipes = [os.pipe(), os.pipe()]
    ended, ending = os.pipe()
    child = os.fork()
    if child == 0:
        if os.fork():  # no child of the command's, which may wait for all of its own
            os._exit(0)
        os.setsid()  # out of reach of signals to the worker's group
        sources = [source for source, _ in pipes]
        _close_all_but({1, 2, ending, *sources})  # what the worker holds must end with the worker
        _pass_on(prefix, dict(zip(sources, (1, 2), strict=True)))
        os._exit(0)
    os.waitpid(child, 0)
    os.close(ending)
    os.set_inheritable(ended, True)
    os.environ["DVKERNELS_RELAY_ENDED"] = str(ended)
    for (end, worker_end), standard in zip(pipes, (1, 2), strict=True):
        os.close(end)
        os.dup2(worker_end, standard)
        os.close(worker_end)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127)


def _close_all_but(kept: set[int]) -> None:
    bounds = [-1, *sorted(kept), os.sysconf("SC_OPEN_MAX")]
    for low, high in itertools.pairwise(bounds):
        os.closerange(low + 1, high)


def _pass_on(prefix: bytes, targets: dict[int, int]) -> None:
    """Copy lines from each source to its target until all sources have ended."""
    rest = dict.fromkeys(targets, b"")
    while rest:
        for source in select.select(list(rest), [], [])[0]:
            text = os.read(source, _NBYTES)
            *lines, rest[source] = (rest[source] + text).split(b"\n")
            if not text or len(rest[source]) > _NBYTES:  # the end, or a line without one
                lines += filter(None, [rest[source]])
                rest[source] = b""
            if not text:
                del rest[source]
            for text in _portions(prefix + line + b"\n" for line in lines):
                _write(targets[source], text)


def _portions(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Join lines to portions that a pipe takes whole: other workers write to the same one."""
    held = b""
    for line in lines:
        if held and len(held) + len(line) > select.PIPE_BUF:
            yield held
            held = b""
        held += line
    if held:
        yield held


def _write(target: int, text: bytes) -> None:
    """Write all of it; if nobody reads any more, drop it, so that the worker goes on."""
    try:
        while text:
            text = text[os.write(target, text) :]
    except OSError:
        pass


if __name__ == "__main__":
    main()
