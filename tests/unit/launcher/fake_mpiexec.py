"""Fake of MPICH's launcher Hydra: workers on this host, with Hydra's options and variables.

It forwards signals, returns the largest status, and ends all workers if one aborts or is killed.
FAKE_STATUS replaces its status, as that of a launcher that reports a wrong one.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys


def main(words: list[str]) -> int:
    if words == ["--version"]:
        print("HYDRA build details:\n    Version: 5.0.2")
        return 0
    num_workers = 1
    while words[0].startswith("-"):
        if words[0] == "-n":
            num_workers = int(words[1])
        words = words[2:]
    sockets = [os.pipe() for _ in range(num_workers)]
    workers = [
        subprocess.Popen(
            words,
            env={
                **os.environ,
                "PMI_RANK": str(rank),
                "PMI_SIZE": str(num_workers),
                "PMI_FD": str(end),
                "MPI_LOCALRANKID": str(rank),
                "MPI_LOCALNRANKS": str(num_workers),
            },
            pass_fds=[end],
            start_new_session=True,
        )
        for rank, (_, end) in enumerate(sockets)
    ]

    def forward(number: int, frame: object) -> None:
        for worker in workers:
            worker.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, forward)
    requests = selectors.DefaultSelector()
    for source, end in sockets:
        os.close(end)
        requests.register(source, selectors.EVENT_READ)
    while requests.get_map():
        for key, _ in requests.select():
            text = os.read(key.fd, 100)
            if text.startswith(b"cmd=abort exitcode="):
                for worker in workers:
                    worker.kill()
                return int(text.partition(b"exitcode=")[2])
            if not text:
                requests.unregister(key.fd)
                if workers[[source for source, _ in sockets].index(key.fd)].wait() < 0:
                    for worker in workers:
                        worker.kill()
    return max(abs(worker.wait()) for worker in workers)


if __name__ == "__main__":
    found = main(sys.argv[1:])
    sys.exit(int(os.environ.get("FAKE_STATUS", found)))
