"""Start a worker so that each line it prints begins with its number. No part of the package.

``python prefix_output.py VARIABLE COMMAND...``: the variable holds the number. This process becomes
the command. Another one, in a session of its own, passes on what comes through two pipes, in whole
lines, until nobody can write to them any more: also the last words of a worker that was killed.
When it has, a third pipe ends, whose other end the command finds in DVKERNELS_RELAY_ENDED.
Launchers have such an option, but some of them put it between the parts of a line.

A line ends in a newline, or in a carriage return, as those of progress bars do. What does not end
for a moment (a question, a bar that writes its return first) is passed on as if it ended as the
last line did.
"""

import itertools
import os
import select
import sys
import time
from collections.abc import Iterable, Iterator

_NBYTES = 1 << 16
_MOMENT_SECONDS = 0.3


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
    streams = {source: _Stream(prefix) for source in targets}
    while streams:
        waiting = [stream.due for stream in streams.values() if stream.rest]
        seconds = max(0.0, min(waiting) - time.monotonic()) if waiting else None
        ready = select.select(list(streams), [], [], seconds)[0]
        for source, stream in list(streams.items()):
            text = os.read(source, _NBYTES) if source in ready else None
            for portion in _portions(stream.lines(text)):
                _write(targets[source], portion)
            if text == b"":
                del streams[source]


class _Stream:
    """What one source has written, in lines."""

    def __init__(self, prefix: bytes) -> None:
        self.rest = b""  # has no end yet
        self.due = 0.0  # when that is passed on as it is
        self._prefix = prefix
        self._end = b"\n"  # of the last line; empty if that is yet to come

    def lines(self, text: bytes | None) -> Iterator[bytes]:
        """Yield what is to be passed on, given what has come, empty at the end, None if nothing."""
        if text:
            self.rest += text
            self.due = time.monotonic() + _MOMENT_SECONDS
        *lines, self.rest = [*self.rest.splitlines(keepends=True), b""]
        if lines and not lines[-1].endswith((b"\n", b"\r")):
            self.rest = lines.pop()
        for line in lines:
            yield from self._line(line)
        while len(self.rest) > _NBYTES:
            cut = _NBYTES
            while self.rest[cut] & 0xC0 == 0x80 and cut > _NBYTES - 4:  # within a letter of UTF-8
                cut -= 1
            yield self._prefix + self.rest[:cut] + b"\n"
            self.rest = self.rest[cut:]
        if self.rest and (text == b"" or time.monotonic() >= self.due):
            is_bar = self._end == b"\r" and text != b""
            yield self._prefix + self.rest + (b"\r" if is_bar else b"\n")
            self._end = b"\r" if is_bar else b""
            self.rest = b""

    def _line(self, line: bytes) -> Iterator[bytes]:
        bare = line.rstrip(b"\r\n")
        before, self._end = self._end, line[len(bare) :]
        if bare or (before.endswith(b"\n") and self._end != b"\r"):
            yield self._prefix + line
        elif before == b"\r" != line:  # the newline after a bar, which stands there already
            yield line


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
