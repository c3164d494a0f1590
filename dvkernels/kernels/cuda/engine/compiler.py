"""From a function to machine code of one architecture: NVVM, then the linker. No GPU is needed.

The linker is that of the same toolkit as NVVM, and its machine code runs on every driver of its
major version. The driver's own compiler would refuse PTX of a toolkit that is newer than itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from numba import cuda, types

from dvkernels.errors import DeviceError
from dvkernels.kernels.cuda.engine import launch_table

__all__ = ["Compiled", "assemble", "check", "compile_to_ptx"]

_untyped_cuda: Any = cuda
_untyped_types: Any = types
_OLDEST = (7, 5)  # the capability that all toolkits of today compile for
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(")


class Compiled(NamedTuple):
    """PTX, and what the kernel in it is called."""

    name: str
    ptx: str


def compile_to_ptx(kernel: Callable[..., None], capability: tuple[int, int]) -> Compiled:
    """Compile a kernel, which takes the words of a table, for devices of that capability.

    Without launch bounds: told of blocks of 256 threads, ptxas 13.5 aims at a number of blocks and
    spills up to 80 bytes to get there; left alone it spills nothing, and takes at most 128
    registers, with which two such blocks fit on a multiprocessor.
    """
    words = _untyped_types.UniTuple(types.int64, launch_table.NUM_WORDS)
    ptx, _ = _untyped_cuda.compile_ptx(kernel, types.void(words), device=False, cc=capability)
    found = _ENTRY.search(ptx)
    assert found is not None
    return Compiled(found[1], ptx)


def check(function: Callable[..., Any], signature: Any) -> None:
    """Raise what Numba raises unless a function can be compiled for devices."""
    _untyped_cuda.compile_ptx(function, signature, device=True, cc=_OLDEST)


def assemble(compiled: Compiled, capability: tuple[int, int]) -> bytes:
    """Return the machine code for devices of that capability."""
    from cuda.bindings import nvjitlink

    source = compiled.ptx.encode()
    linker = nvjitlink.create(1, [f"-arch=sm_{capability[0]}{capability[1]}"])
    try:
        nvjitlink.add_data(linker, nvjitlink.InputType.PTX, source, len(source), compiled.name)
        nvjitlink.complete(linker)
        image = bytearray(nvjitlink.get_linked_cubin_size(linker))
        nvjitlink.get_linked_cubin(linker, image)
    except nvjitlink.nvJitLinkError as error:
        raise DeviceError(
            f"the linker of the CUDA toolkit failed on {compiled.name} for compute capability "
            f"{capability}: {error}; see that nvidia-nvvm and nvidia-nvjitlink are of one release"
        ) from error
    finally:
        nvjitlink.destroy(linker)
    return bytes(image)
