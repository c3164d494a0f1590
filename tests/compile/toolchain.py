"""Assembler and disassembler of the CUDA toolkit, from wheels or from the system."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

ARCHITECTURES = (75, 80, 90)  # and the newest that the assembler knows
_PTX_OF = (7, 5)  # PTX of the oldest runs on all: it is made once and assembled many times


class Assembled(NamedTuple):
    """Resources of an assembled kernel, and its disassembled machine code."""

    registers: int
    shared: int  # bytes
    stack: int
    spills: int
    code: str | None  # None where it was not disassembled


@functools.cache
def tool(name: str) -> str | None:
    """Return the path of a tool, preferably of the toolkit's wheels, which are of one release."""
    folder = Path(sysconfig.get_path("purelib")) / "nvidia"
    wheels = sorted(folder.glob(f"cu[0-9]*/bin/{name}"), reverse=True)
    return str(wheels[0]) if wheels else shutil.which(name)


def run(name: str, *arguments: str) -> str:
    """Return the output of a tool."""
    path = tool(name)
    assert path is not None, name
    ended = subprocess.run(
        [path, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, f"{name} {arguments}: {ended.stderr}"
    return ended.stdout + ended.stderr


@functools.cache
def architectures() -> tuple[int, ...]:
    """Return the architectures to assemble for."""
    known = {int(number) for number in re.findall(r"'sm_(\d+)'", run("ptxas", "--help"))}
    return (*ARCHITECTURES, max(known))


def assemble(ptx: str, architecture: int, folder: Path) -> Assembled:
    """Assemble a kernel for an architecture; ``folder`` receives the files.

    Code of the two newest architectures is disassembled, which takes as long as all else; for the
    others the assembler reports spills, and PTX shows the memory accesses.
    """
    source, image = folder / f"sm_{architecture}.ptx", folder / f"sm_{architecture}.cubin"
    source.write_text(ptx)
    said = run("ptxas", f"-arch=sm_{architecture}", "-v", str(source), "-o", str(image))
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", said)
    used = re.search(r"Used (\d+) registers", said)
    shared = re.search(r"(\d+) bytes smem", said)
    assert spills is not None, said
    assert used is not None, said
    return Assembled(
        int(used[1]),
        int(shared[1]) if shared else 0,
        int(spills[1]),
        int(spills[2]) + int(spills[3]),
        run("nvdisasm", "-c", str(image)) if architecture in architectures()[-2:] else None,
    )
