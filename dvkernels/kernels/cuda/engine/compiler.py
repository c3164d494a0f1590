"""Compiler of the kernels: Python to PTX by NVVM, PTX to machine code by nvJitLink, without a GPU.

NVVM and nvJitLink come from one toolkit, whose machine code runs on every driver of its major
version. The driver's own compiler would refuse PTX of a toolkit that is newer than the driver.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from numba import types

from dvkernels.errors import DeviceError
from dvkernels.kernels.cuda.engine import cuda_target, table_layout
from dvkernels.kernels.cuda.engine.kernel import Compiled, Kernel

__all__ = ["assemble", "check", "compile_to_ptx"]

_untyped_types: Any = types
_OLDEST = (7, 5)  # the oldest compute capability that current toolkits compile for
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(")
_UNUSED = re.compile(r"^[ \t]*//.*\n|^\.common .*NumbaEnv.*\n", re.MULTILINE)


def compile_to_ptx(kernel: Kernel, capability: tuple[int, int]) -> Compiled:
    """Compile a kernel, whose arguments are the words of a launch table, for a compute capability.

    Its launch bounds say how many registers it may take: see catalogue.py.
    """
    words = _untyped_types.UniTuple(types.int64, table_layout.NUM_WORDS)
    ptx = cuda_target.compile_ptx(
        kernel.build(),
        types.void(words),
        device=False,
        cc=capability,
        launch_bounds=kernel.launch_bounds,
    )
    found = _ENTRY.search(ptx)
    assert found is not None
    # Numba's names depend on what was compiled before: the same kernel is to be the same PTX.
    ptx = _UNUSED.sub("", ptx).replace(found[1], kernel.entry)
    return Compiled(kernel.entry, ptx)


def check(function: Callable[..., Any], signature: Any) -> None:
    """Raise Numba's error unless a function compiles for devices."""
    cuda_target.compile_ptx(function, signature, device=True, cc=_OLDEST)


@cuda_target.diagnosed()
def assemble(compiled: Compiled, capability: tuple[int, int]) -> bytes:
    """Return the machine code (cubin) for a compute capability."""
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
            f"{capability}: {error}; check that nvidia-nvvm and nvidia-nvjitlink are of one release"
        ) from error
    finally:
        nvjitlink.destroy(linker)
    return bytes(image)
