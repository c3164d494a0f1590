"""Shipped PTX: the kernels as they lie in the package; the driver is all the compiler they need.

Each kernel of the catalogue is a file ``ptx/NAME.ptx.xz``. The driver assembles it for the GPU at
hand, and keeps the machine code on disk. ``tests/compile/record_ptx.py`` makes the files, and
``made_of.json``, which says of which sources and with which compilers. Where the sources here are
others, because somebody edits them, nothing that ships is used, and Numba compiles the kernels.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dvkernels.errors import DeviceError
from dvkernels.kernels.cuda.engine.kernel import Kernel

__all__ = [
    "FOLDER",
    "RECORD",
    "TARGET",
    "VERSION",
    "described",
    "digest",
    "find",
    "path_of",
    "reason",
    "unusable",
]

# PTX of CUDA 12.0, the oldest driver that is supported; its assembler takes all kernels. The target
# is the oldest that current compilers know, and older GPUs have kernels compiled for them.
VERSION, TARGET = "8.0", (7, 5)

_PACKAGE = Path(__file__).resolve().parents[3]
FOLDER = Path(__file__).resolve().parents[1] / "ptx"
RECORD = FOLDER / "made_of.json"


def path_of(kernel: Kernel) -> Path:
    """Return the path of the file that a kernel ships in."""
    return FOLDER / f"{kernel.entry.removeprefix('dvkernels_')}.ptx.xz"


def digest(sources: Iterable[str]) -> str:
    """Return the digest of source files, given by their paths in the package."""
    found = hashlib.sha256()
    for source in sources:
        content = (_PACKAGE / source).read_bytes()
        found.update(f"{source} {len(content)}\n".encode() + content)
    return found.hexdigest()


@functools.cache
def _record() -> dict[str, Any]:
    """Return what the shipped files are made of; nothing where none ship."""
    try:
        found: dict[str, Any] = json.loads(RECORD.read_bytes())
    except FileNotFoundError:
        return {}
    return found


@functools.cache
def unusable() -> str:
    """Return the reason why no kernel is taken from the package, or ""."""
    record = _record()
    if not record:
        return "which ship with no PTX"
    try:
        import lzma  # noqa: F401 - Python may have been built without
    except ImportError:
        return "whose PTX only a Python with the module lzma can read"
    try:
        is_current = digest(record["sources"]) == record["digest"]
    except OSError:  # no sources, so nobody has edited them
        is_current = True
    return "" if is_current else "whose sources are not those of the PTX that ships"


def described() -> str:
    """Return a sentence: whether the kernels of GPUs are those that ship, or compiled here."""
    if unusable():
        return f"compiled by Numba in each process: kernels {unusable()}"
    made_by = ", ".join(f"{name} {version}" for name, version in _record()["compilers"].items())
    capability = ".".join(map(str, TARGET))
    return (
        f"shipped PTX {VERSION}, for compute capability {capability} and later, made by {made_by}"
    )


def reason(kernel: Kernel, capability: tuple[int, int]) -> str:
    """Return why a kernel is not taken from the package on a GPU of this capability, or ""."""
    if kernel.name is None:
        return "which calls a function of the user's"
    if capability < TARGET:
        return f"on a GPU of compute capability {capability[0]}.{capability[1]}"
    return unusable()


def find(kernel: Kernel, capability: tuple[int, int]) -> bytes | None:
    """Return the PTX that a kernel ships in; None where it has to be compiled.

    Raises
    ------
    DeviceError
        The file is missing or damaged.
    """
    if reason(kernel, capability):
        return None
    import lzma

    path = path_of(kernel)
    try:
        return lzma.decompress(path.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise DeviceError(f"{path} cannot be read ({error}): install dvkernels again") from error
