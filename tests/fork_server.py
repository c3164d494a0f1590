"""Programs in processes of their own that need not start: forks of one that has imported dvkernels.

A fork begins within milliseconds, where a new interpreter takes 0.8 s to import NumPy, Numba and
the package, and 0.2 s to end. Use ``sys.executable`` where the start itself, the environment of the
imports, or the amount of memory is what is tested.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# Forks for each request, and reports the child's number, then its status. The child leaves the
# loop and runs the program, so that it ends as any interpreter does.
SERVER = """
import gc, json, os, signal, socket, sys, threading, types
import numba
import dvkernels
import dvkernels.kernels.cpu.compile_ahead
dvkernels.Strategy  # and with it all public names
from numba.core.registry import cpu_target

cpu_target.target_context.refresh()  # which the first compiled function would do
assert threading.active_count() == 1

signal.signal(signal.SIGINT, signal.default_int_handler)
gc.collect()
gc.freeze()  # a collection would copy the pages of all that is imported, also at the end
server = socket.socket(fileno=int(sys.argv[1]))
while True:
    length, files, _, _ = socket.recv_fds(server, 8, 3)
    if not length:
        os._exit(0)
    request = json.loads(server.recv(int.from_bytes(length), socket.MSG_WAITALL))
    child = os.fork()
    if child == 0:
        break
    for file in files:
        os.close(file)
    server.send(child.to_bytes(8))
    _, status = os.waitpid(child, 0)
    server.send(status.to_bytes(8))

server.close()
for number, file in enumerate(files):
    os.dup2(file, number)
    os.close(file)
os.setsid()
os.chdir(request["cwd"])
os.environ.clear()
os.environ.update(request["env"])
sys.argv = ["-c", *request["arguments"]]
sys.path[:0] = ["", *filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep))]
module = sys.modules["__main__"] = types.ModuleType("__main__")
code = request["code"]
del server, files, file, number, length, child
exec(compile(code, "<string>", "exec"), module.__dict__)
"""


@functools.cache
def _server() -> socket.socket:
    """Start the process that forks, for as long as this one lives; return the socket to it."""
    own, other = socket.socketpair()
    search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(other.fileno())],
        env={**os.environ, "PYTHONPATH": search_path},
        pass_fds=[other.fileno()],
        stdin=subprocess.DEVNULL,
    )
    other.close()

    def end() -> None:
        own.close()
        process.wait()

    atexit.register(end)
    return own


def run(
    code: str,
    *arguments: object,
    stdin: str = "",
    cwd: Path = ROOT,
    timeout: float = 110,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run a program in a fork, as ``python -c`` would, in a session of its own."""
    server = _server()
    request: dict[str, Any] = {
        "code": code,
        "arguments": [str(argument) for argument in arguments],
        "cwd": str(cwd),
        "env": {**os.environ, **environment},
    }
    text = json.dumps(request).encode()
    with (
        tempfile.TemporaryFile("w+") as source,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
    ):
        source.write(stdin)
        source.seek(0)
        files = [file.fileno() for file in (source, out, err)]
        socket.send_fds(server, [len(text).to_bytes(8)], files)
        server.sendall(text)
        child = int.from_bytes(server.recv(8, socket.MSG_WAITALL))
        server.settimeout(timeout)
        try:
            status = server.recv(8)
        except TimeoutError:
            os.kill(child, signal.SIGKILL)
            server.settimeout(None)
            server.recv(8)
            out.seek(0)
            raise subprocess.TimeoutExpired(code, timeout, out.read()) from None
        finally:
            server.settimeout(None)
        for file in (out, err):
            file.seek(0)
        ended = os.waitstatus_to_exitcode(int.from_bytes(status))
        return subprocess.CompletedProcess(code, ended, out.read(), err.read())


def run_module(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a module in a fork, as ``python -m`` would."""
    code = f"import runpy; runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"
    return run(code, *arguments)
