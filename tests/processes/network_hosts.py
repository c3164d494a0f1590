"""Two hosts on one machine: network namespaces that a cable joins."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

_CABLE = "dvcable"
_ADDRESSES = ("10.231.7.1", "10.231.7.2")  # seen by nobody else
_DEADLINE_SECONDS = 20

# What carries MPI's messages (UCX, libfabric) would find out that both are one machine, and go
# through its memory. Of Open MPI the rest: its own way over TCP, and by which its daemons talk.
_BY_NETWORK = (
    "UCX_TLS=tcp,self", f"UCX_NET_DEVICES={_CABLE}", "FI_PROVIDER=tcp", f"FI_TCP_IFACE={_CABLE}",
    "OMPI_MCA_pml=ob1", "OMPI_MCA_btl=self,sm,tcp", f"OMPI_MCA_btl_tcp_if_include={_CABLE}",
    f"PRTE_MCA_prte_if_include={_CABLE}",
)  # fmt: skip

# What starts a command on a host, as Hydra and Open MPI ask for it: options, the host, the command.
_SHELL = """#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do shift; done
case "$1" in
{cases}
    *) echo "no such host: $1" >&2; exit 1 ;;
esac
shift
exec {on} sh -c "$*"
"""

# A host has a name of its own, by which MPI tells who shares memory. Then come words to run there.
_NAMED = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"']


@dataclass(frozen=True)
class Hosts:
    """Two of them, up and joined.

    Attributes
    ----------
    names : tuple of str
        Of their namespaces.
    prefix : list of str
        What a command starts with that runs on the first.
    options : list of str
        What tells mpiexec to start two workers on each.
    """

    names: tuple[str, str]
    prefix: list[str]
    options: list[str]

    def sent_nbytes(self) -> list[int]:
        """Return how many bytes each host has sent to the other."""
        return [int(_shown(name, "statistics/tx_bytes")) for name in self.names]


@contextlib.contextmanager
def joined(folder: Path, is_open_mpi: bool) -> Iterator[Hosts]:
    """Make two hosts for one kind of mpiexec, and remove them; skip where that is not allowed."""
    if sys.platform != "linux" or not (shutil.which("ip") and shutil.which("unshare")):
        pytest.skip("hosts are made by Linux, ip (of iproute2) and unshare (of util-linux)")
    names = (f"dv{os.getpid()}a", f"dv{os.getpid()}b")
    with contextlib.ExitStack() as undo:
        for name in names:
            _make("netns", "add", name)
            undo.callback(_ip, "netns", "del", name)  # and the cable with it
        ends = ["netns", names[0], "type", "veth", "peer", "name", _CABLE, "netns", names[1]]
        _make("link", "add", _CABLE, *ends)
        for name, address in zip(names, _ADDRESSES, strict=True):
            _make("-n", name, "addr", "add", f"{address}/24", "dev", _CABLE)
            for link in ("lo", _CABLE):
                _make("-n", name, "link", "set", link, "up")
        _await_both(names)
        pairs = zip(_ADDRESSES, names, strict=True)
        cases = "\n".join(f"    {at}) space={name} ;;" for at, name in pairs)
        on = shlex.join(_on("$space")).replace("'$space'", '"$space"')
        shell = folder / "shell"
        shell.write_text(_SHELL.format(cases=cases, on=on))
        shell.chmod(0o755)
        hosts = ",".join(f"{address}:2" for address in _ADDRESSES)
        prefix = [*_on(names[0]), "env", *_BY_NETWORK]
        options = ["-launcher", "ssh", "-launcher-exec", str(shell), "-hosts", hosts]
        if is_open_mpi:
            prefix.append(f"PRTE_MCA_plm_ssh_agent={shell}")
            options = ["--host", hosts, "--map-by", "slot:OVERSUBSCRIBE", "--bind-to", "none"]
        yield Hosts(names, prefix, options)


def _on(name: str) -> list[str]:
    """Return what a command starts with that runs on a host."""
    return ["ip", "netns", "exec", name, *_NAMED, name]


def _await_both(names: tuple[str, str]) -> None:
    """Return when both ends of the cable are up: the kernel says so up to a second late."""
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while not all(_shown(name, "operstate").strip() == "up" for name in names):
        assert time.monotonic() < deadline, "the ends of a cable are set up, and do not come up"
        time.sleep(0.02)


def _shown(name: str, what: str) -> str:
    return _ip("netns", "exec", name, "cat", f"/sys/class/net/{_CABLE}/{what}")


def _make(*words: str) -> None:
    try:
        _ip(*words)
    except (subprocess.CalledProcessError, OSError) as error:
        why = getattr(error, "stderr", None) or str(error)
        pytest.skip(f"this machine allows no network namespaces: ip {' '.join(words)}: {why}")


def _ip(*words: str) -> str:
    command = ["ip", *words]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=_DEADLINE_SECONDS
    )
    return done.stdout
