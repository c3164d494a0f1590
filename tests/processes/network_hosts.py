"""Simulated hosts: network namespaces joined by virtual Ethernet cables and a switch."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

_CABLE, _SWITCH = "dvcable", "dvswitch"
_ADDRESS = "10.231.7.{}"  # visible inside the namespaces only
_DEADLINE_SECONDS = 20

# UCX and libfabric would detect that both hosts are one machine, and use its memory. The rest is
# for Open MPI: its own TCP transport, and the network interface of its daemons.
_BY_NETWORK = (
    "UCX_TLS=tcp,self", f"UCX_NET_DEVICES={_CABLE}", "FI_PROVIDER=tcp", f"FI_TCP_IFACE={_CABLE}",
    "OMPI_MCA_pml=ob1", "OMPI_MCA_btl=self,sm,tcp", f"OMPI_MCA_btl_tcp_if_include={_CABLE}",
    f"PRTE_MCA_prte_if_include={_CABLE}",
)  # fmt: skip

# The remote shell that Hydra and Open MPI call: options, the host, the command.
_SHELL = """#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do shift; done
case "$1" in
{cases}
    *) echo "no such host: $1" >&2; exit 1 ;;
esac
shift
exec {on} sh -c "$*"
"""

# Each host has its own name, by which MPI decides who shares memory. The command follows.
_NAMED = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"']


@dataclass(frozen=True)
class Hosts:
    """Several hosts, up and joined.

    Attributes
    ----------
    names : list of str
        Of their namespaces.
    switch : str
        The namespace of what joins them; there ``port0`` leads to the first.
    prefix : list of str
        What a command starts with that runs on the first.
    options : list of str
        What tells mpiexec to start so many workers on each.
    """

    names: list[str]
    switch: str
    prefix: list[str]
    options: list[str]

    def sent_nbytes(self) -> list[int]:
        """Return the bytes that each host has sent."""
        return [int(_shown(name, "statistics/tx_bytes")) for name in self.names]

    def limit(self, megabits: int, queue_nbytes: int) -> None:
        """Limit the rate at which each host sends and receives; full queues drop packets."""
        ports = [(self.switch, f"port{k}") for k in range(len(self.names))]
        for space, link in [*ports, *((name, _CABLE) for name in self.names)]:
            limit = ["rate", f"{megabits}mbit", "burst", "64k", "limit", str(queue_nbytes)]
            _make(["tc", "-n", space, "qdisc", "replace", "dev", link, "root", "tbf", *limit])


@contextlib.contextmanager
def joined(folder: Path, is_open_mpi: bool, count: int = 2, workers: int = 2) -> Iterator[Hosts]:
    """Create hosts for one kind of mpiexec, and remove them; skip without permission."""
    if sys.platform != "linux" or not (shutil.which("ip") and shutil.which("unshare")):
        pytest.skip("hosts are made by Linux, ip (of iproute2) and unshare (of util-linux)")
    names = [f"dv{os.getpid()}{letter}" for letter in string.ascii_lowercase[:count]]
    switch = f"dv{os.getpid()}switch"
    with contextlib.ExitStack() as undo:
        for name in [switch, *names]:
            _ip("netns", "add", name)
            undo.callback(_ip, "netns", "del", name)  # and its cables
        _ip("-n", switch, "link", "add", _SWITCH, "type", "bridge")
        _ip("-n", switch, "link", "set", _SWITCH, "up")
        addresses = [_ADDRESS.format(number) for number in range(1, count + 1)]
        for k, (name, address) in enumerate(zip(names, addresses, strict=True)):
            ends = ["netns", name, "type", "veth", "peer", "name", f"port{k}", "netns", switch]
            _ip("link", "add", _CABLE, *ends)
            _ip("-n", switch, "link", "set", f"port{k}", "master", _SWITCH, "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", _CABLE)
            for link in ("lo", _CABLE):
                _ip("-n", name, "link", "set", link, "up")
        _await_all(names)
        pairs = zip(addresses, names, strict=True)
        cases = "\n".join(f"    {at}) space={name} ;;" for at, name in pairs)
        on = shlex.join(_on("$space")).replace("'$space'", '"$space"')
        shell = folder / "shell"
        shell.write_text(_SHELL.format(cases=cases, on=on))
        shell.chmod(0o755)
        hosts = ",".join(f"{address}:{workers}" for address in addresses)
        prefix = [*_on(names[0]), "env", *_BY_NETWORK]
        options = ["-launcher", "ssh", "-launcher-exec", str(shell), "-hosts", hosts]
        if is_open_mpi:
            prefix.append(f"PRTE_MCA_plm_ssh_agent={shell}")
            options = ["--host", hosts, "--map-by", "slot:OVERSUBSCRIBE", "--bind-to", "none"]
        yield Hosts(names, switch, prefix, options)


def _on(name: str) -> list[str]:
    """Return the command prefix that runs a program on a host."""
    return ["ip", "netns", "exec", name, *_NAMED, name]


def _await_all(names: list[str]) -> None:
    """Wait until the cables are up, which the kernel reports up to a second late."""
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while not all(_shown(name, "operstate").strip() == "up" for name in names):
        assert time.monotonic() < deadline, "a cable does not come up"
        time.sleep(0.02)


def _shown(name: str, what: str) -> str:
    return _run(["ip", "netns", "exec", name, "cat", f"/sys/class/net/{_CABLE}/{what}"])


def _ip(*words: str) -> None:
    _make(["ip", *words])


def _make(command: list[str]) -> None:
    try:
        _run(command)
    except (subprocess.CalledProcessError, OSError) as error:
        why = getattr(error, "stderr", None) or str(error)
        pytest.skip(f"this machine allows no such network: {' '.join(command)}: {why}")


def _run(command: list[str]) -> str:
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=_DEADLINE_SECONDS
    )
    return done.stdout
