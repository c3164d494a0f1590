"""Log of a load: what the driver says of PTX that it cannot assemble, and what to do about it."""

from __future__ import annotations

import ctypes

__all__ = ["LoadLog"]

_NBYTES = 4096
_ERROR_LOG, _ERROR_LOG_NBYTES = 5, 6  # options of a load
_MOST_LINES = 3
_UNSUPPORTED_PTX_VERSION, _NO_ASSEMBLER, _NO_ASSEMBLING = 222, 221, 223
_NO_BINARY_FOR_GPU, _INVALID_PTX = 209, 218


class LoadLog:
    """Buffer that a load writes its errors to; ``options`` are the last arguments of the load."""

    __slots__ = ("_text", "options")

    def __init__(self) -> None:
        self._text = ctypes.create_string_buffer(_NBYTES)
        keys = (ctypes.c_int * 2)(_ERROR_LOG, _ERROR_LOG_NBYTES)
        values = (ctypes.c_void_p * 2)(ctypes.addressof(self._text), _NBYTES)
        self.options = len(keys), keys, values

    def describe(self, code: int, name: str, kernel: str, version: tuple[int, int]) -> str:
        """Return the message of a load that failed with a code, of this name.

        ``version`` is the CUDA version of the driver.
        """
        written = self._text.value.decode(errors="replace").splitlines()
        lines = [line.strip() for line in written if line.strip()][:_MOST_LINES]
        said = f" ({'; '.join(lines)})" if lines else ""
        runs, remedy = f"a driver of CUDA {version[0]}.{version[1]}", _REMEDIES.get(code, _OTHER)
        return f"{runs} cannot load the kernel {kernel}: {name}{said}; {remedy}"


_OTHER = "update the NVIDIA driver, or report this with the GPU's name and the driver's version"
_REMEDIES = {
    _UNSUPPORTED_PTX_VERSION: "update the NVIDIA driver",
    _INVALID_PTX: "update the NVIDIA driver, or install dvkernels again",
    _NO_BINARY_FOR_GPU: "the GPU is older than the kernels: compute capability 7.5 is needed",
    _NO_ASSEMBLER: (
        "the driver's library libnvidia-ptxjitcompiler is missing: install the whole driver, "
        "or start the container with NVIDIA_DRIVER_CAPABILITIES=compute,utility"
    ),
    _NO_ASSEMBLING: "its assembler is switched off: unset CUDA_DISABLE_PTX_JIT",
}
