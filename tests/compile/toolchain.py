"""Assembler and disassembler of the CUDA toolkit, from wheels or from the system."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

# Of the compute capabilities that kernels run on; PTX of the oldest is assembled for all.
_ARCHITECTURES = (75, 80, 90, 100, 120)
_DISASSEMBLED = (90, 100, 120)
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/ +(.*?) *;")
_WIDE_LOAD = re.compile(r"LDG\.E(?:\.\w+)*\.128(?:\.\w+)* R(\d+),")


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
    """Return the architectures to assemble for, of those that the assembler knows."""
    return tuple(number for number in _ARCHITECTURES if number in _known())


def newest() -> int:
    """Return the newest architecture that the assembler knows."""
    return max(_known())


@functools.cache
def _known() -> frozenset[int]:
    return frozenset(map(int, re.findall(r"'sm_(\d+)'", run("ptxas", "--help"))))


def assemble(ptx: str, architecture: int, folder: Path) -> Assembled:
    """Assemble a kernel for an architecture; ``folder`` receives the files.

    Code of the newer architectures is disassembled, which takes as long as all else; for the others
    the assembler reports spills, and PTX shows the memory accesses.
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
        run("nvdisasm", "-c", str(image)) if architecture >= _DISASSEMBLED[0] else None,
    )


def loads_in_flight(code: str) -> int:
    """Return the most wide loads of a thread that are in flight together.

    In a basic block they are those before the first instruction that touches a register into which
    one of them loads: it waits for that load. (A register is written again only by a load that has
    ended, so writes count too.)
    """
    most, loaded, count, is_over = 0, set[int](), 0, False
    for line in code.splitlines():
        found = _INSTRUCTION.search(line)
        if found is None or "BRA" in found[1]:  # a label, or the end of a block
            loaded, count, is_over = set(), 0, False
            continue
        wide = _WIDE_LOAD.search(found[1])
        touched = {int(number) for number in re.findall(r"\bR(\d+)\b", found[1])}
        if touched & loaded:
            is_over = True
        if wide and not is_over:
            count += 1
            loaded |= set(range(int(wide[1]), int(wide[1]) + 4))
            most = max(most, count)
    return most


def num_wide_loads(code: str) -> int:
    """Return how many wide loads there are."""
    return len(_WIDE_LOAD.findall(code))
