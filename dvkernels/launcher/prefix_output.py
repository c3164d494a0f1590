"""Output prefixes: run a command so that each line it prints starts with the worker's number.

``python prefix_output.py VARIABLE COMMAND...``, a script of its own that imports nothing of the
package. The variable holds the number. This process becomes the command. A relay process, in a
session of its own, copies whole lines from two pipes until all their writers have closed them, so
the last output of a killed worker arrives too. Then the relay closes a third pipe, whose read end
the command finds in DVKERNELS_RELAY_ENDED. The launchers' own prefix options are not used because
some insert the prefix inside a line.

A line ends in a newline, or in a carriage return, as those of progress bars do. Text without an end
(a question, a bar that writes its carriage return first) is passed on after a moment, as if it
ended as the line before.
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
    """Start the relay process, and become the command."""
    variable, *command = sys.argv[1:]
    prefix = f"[{os.environ.get(variable, '?')}] ".encode()
    pipes = [os.pipe(), os.pipe()]
    end_read, end_write = os.pipe()
    child = os.fork()
    if child == 0:
        if os.fork():  # the command, which may wait for all its children, must not have this one
            os._exit(0)
        os.setsid()  # out of reach of signals to the worker's group
        sources = [source for source, _ in pipes]
        _close_all_but({1, 2, end_write, *sources})  # the worker's files must close with the worker
        _relay(prefix, dict(zip(sources, (1, 2), strict=True)))
        os._exit(0)
    os.waitpid(child, 0)
    os.close(end_write)
    os.set_inheritable(end_read, True)
    os.environ["DVKERNELS_RELAY_ENDED"] = str(end_read)
    for (source, target), standard in zip(pipes, (1, 2), strict=True):
        os.close(source)
        os.dup2(target, standard)
        os.close(target)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127)


def _close_all_but(kept: set[int]) -> None:
    bounds = [-1, *sorted(kept), os.sysconf("SC_OPEN_MAX")]
    for low, high in itertools.pairwise(bounds):
        os.closerange(low + 1, high)


def _relay(prefix: bytes, targets: dict[int, int]) -> None:
    """Copy lines from each source to its target until all sources have ended."""
    streams = {source: LinePrefixer(prefix) for source in targets}
    while streams:
        deadlines = [stream.due for stream in streams.values() if stream.rest]
        seconds = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        ready = select.select(list(streams), [], [], seconds)[0]
        for source, stream in list(streams.items()):
            text = os.read(source, _NBYTES) if source in ready else None
            for portion in _portions(stream.lines(text)):
                _write(targets[source], portion)
            if text == b"":
                del streams[source]


class LinePrefixer:
    """Splitter of one source's bytes into prefixed lines."""

    def __init__(self, prefix: bytes) -> None:
        self.rest = b""  # the beginning of an unfinished line
        self.due = 0.0  # when the unfinished line is passed on as it is
        self._prefix = prefix
        self._end = b"\n"  # of the line before; empty while that is unfinished

    def lines(self, text: bytes | None) -> Iterator[bytes]:
        """Yield the lines to write after ``text`` was read: empty at the end, None for no data."""
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
            while self.rest[cut] & 0xC0 == 0x80 and cut > _NBYTES - 4:  # inside a UTF-8 character
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
        elif before == b"\r" != line:  # the newline after a bar, which has its prefix already
            yield line


def _portions(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Join lines to portions that a pipe writes atomically: other workers write to it too."""
    portion = b""
    for line in lines:
        if portion and len(portion) + len(line) > select.PIPE_BUF:
            yield portion
            portion = b""
        portion += line
    if portion:
        yield portion


def _write(target: int, text: bytes) -> None:
    """Write the whole text; drop it where the reader has gone, so that the worker goes on."""
    try:
        while text:
            text = text[os.write(target, text) :]
    except OSError:
        pass


if __name__ == "__main__":
    main()
