"""Local engine: starts the workers of a job on this host, and ends all of them if one fails.

``python local_engine.py COUNT CORES COMMAND...``, a script of its own that imports nothing of the
package, in place of an mpiexec. Each worker gets its rank, and so many cores of its own; 0 binds
none. The status is that of the first worker that fails, 128 plus the signal's number if it was
killed. SIGTERM ends the workers, and so does the end of this process, however that comes.
"""

import contextlib
import ctypes
import os
import signal
import sys

_SET_PARENT_DEATH_SIGNAL = 1  # of prctl, on Linux
_AWAITED = {signal.SIGTERM, signal.SIGCHLD}


def main() -> int:
    """Start the workers, wait for them, and return the status of the job."""
    count, num_cores, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
    running = {_start(rank, num_cores, command) for rank in range(count)}
    failure = 0
    while running:
        if signal.sigwait(_AWAITED) == signal.SIGTERM:
            failure = failure or 128 + signal.SIGTERM
            _kill(running)
        while running:
            ended, status = os.waitpid(-1, os.WNOHANG)
            if not ended:
                break
            if ended in running:
                running.remove(ended)
                code = os.waitstatus_to_exitcode(status)
                if code and not failure:
                    failure = code if code > 0 else 128 - code
                    _kill(running)
    return failure


def _start(rank: int, num_cores: int, command: list[str]) -> int:
    """Start a worker as the leader of a process group; return its process."""
    engine = os.getpid()
    worker = os.fork()
    if worker:
        return worker
    try:
        os.setpgid(0, 0)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)
            if os.getppid() != engine:
                os._exit(1)
            if num_cores:
                cores = sorted(os.sched_getaffinity(0))
                os.sched_setaffinity(0, cores[rank * num_cores : (rank + 1) * num_cores])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _AWAITED)
        os.environ["DVKERNELS_GROUP_RANK"] = str(rank)
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
    finally:
        os._exit(127)


def _kill(workers: set[int]) -> None:
    """Kill workers, none of which has been waited for, and what they have started."""
    for worker in workers:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(worker, signal.SIGKILL)  # it may not lead its group yet
            os.killpg(worker, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
