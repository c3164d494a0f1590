"""Record the PTX that ships: ``python tests/compile/record_ptx.py``, with the extra cuda-compile.

The same sources and compilers give the same bytes. The versions of the compilers are recorded too.
"""

from __future__ import annotations

import ast
import json
import lzma
import multiprocessing
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dvkernels.kernels.cuda.engine import catalogue, shipped_ptx  # noqa: E402
from dvkernels.kernels.cuda.engine.kernel import Kernel  # noqa: E402

_PACKAGES = ("numba-cuda", "numba", "llvmlite", "nvidia-nvvm")
_COMPILER = "dvkernels.kernels.cuda.engine.compiler"
# What the kernels are made of, besides modules of this folder; and modules there that change no
# kernel: they import the compiler, check functions of users, and simulate.
_FOLDER = "dvkernels.kernels.cuda."
_OTHERS = {"dvkernels.kernels.arithmetic", "dvkernels.schedules.partition"}
_WITHOUT_EFFECT = {f"{_FOLDER}engine.{name}" for name in ("cuda_target", "operations", "simulator")}


def sources() -> list[str]:
    """Return the paths of the modules that make PTX: what builds and compiles kernels, and imports.

    Of what these import, directly or not, the modules of the CUDA twin count, and the few others
    that kernels consist of.
    """
    builders = {kernel.builder.rpartition(".")[0] for kernel in catalogue.shipped()}
    pending, found = [*builders, _COMPILER, catalogue.__name__], set()
    while pending:
        module = pending.pop()
        if module in found | _WITHOUT_EFFECT or not _path(module).exists():
            continue
        found.add(module)
        for node in ast.walk(ast.parse(_path(module).read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                named = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                pending += [n for n in named if n.startswith(_FOLDER) or n in _OTHERS]
    return sorted(_path(module).relative_to(ROOT / "dvkernels").as_posix() for module in found)


def _path(module: str) -> Path:
    return (ROOT / module.replace(".", "/")).with_suffix(".py")


def compilers() -> dict[str, str]:
    """Return the versions of the compilers here, of which PTX depends."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"Python": python, **{name: metadata.version(name) for name in _PACKAGES}}


def shipped_text(kernel: Kernel) -> str:
    """Compile a kernel for the shipped target, and return its PTX of the shipped version."""
    from dvkernels.kernels.cuda.engine import compiler

    ptx = compiler.compile_to_ptx(kernel, shipped_ptx.TARGET).ptx
    return re.sub(r"^\.version .*$", f".version {shipped_ptx.VERSION}", ptx, count=1, flags=re.M)


def _pack(number: int) -> tuple[str, bytes]:
    kernel = [*catalogue.shipped()][number]
    packed = lzma.compress(shipped_text(kernel).encode(), preset=9 | lzma.PRESET_EXTREME)
    return shipped_ptx.path_of(kernel).name, packed


def main() -> None:
    """Compile every kernel that ships, and write the files."""
    begun_with = shipped_ptx.digest(sources())
    numbers = range(len([*catalogue.shipped()]))
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        packed = {}
        for name, content in pool.imap_unordered(_pack, numbers):
            packed[name] = content
            print(f"{len(packed)} of {len(numbers)}: {name}", flush=True)
    if shipped_ptx.digest(sources()) != begun_with:
        sys.exit("the sources have been edited meanwhile: nothing was written, start again")
    shipped_ptx.FOLDER.mkdir(exist_ok=True)
    # Interrupted from here on, it leaves a folder that is not used.
    shipped_ptx.RECORD.unlink(missing_ok=True)
    for stale in shipped_ptx.FOLDER.glob("*.ptx.xz"):
        stale.unlink()
    for name, content in packed.items():
        (shipped_ptx.FOLDER / name).write_bytes(content)
    record = {"digest": begun_with, "sources": sources(), "compilers": compilers()}
    shipped_ptx.RECORD.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    print(f"{len(packed)} kernels, {sum(map(len, packed.values()))} bytes")


if __name__ == "__main__":
    main()
