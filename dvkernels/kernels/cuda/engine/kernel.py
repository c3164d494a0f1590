"""Kernel: its name, its launch bounds, and how it is built where it has to be compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from dvkernels.kernels import numba_import

__all__ = ["Compiled", "Kernel", "LaunchBounds"]

# Threads of a block, and the fewest blocks that are to fit on a multiprocessor together.
LaunchBounds = tuple[int, int]


class Kernel:
    """Kernel over launch tables. The catalogue makes each once, so that identity is equality.

    A kernel that ships is launched without being built: neither Numba nor its module is imported.

    Parameters
    ----------
    name : str or None
        Name under which it ships. None: it calls a function of the user's, and does not ship.
    builder : str
        Full name of the function that returns the kernel as a Python function, not compiled.
    arguments : tuple
        Arguments of the builder, which is cached; the number of threads follows them.
    launch_bounds : (threads, blocks)
        Launch bounds of its machine code.
    """

    __slots__ = ("_arguments", "builder", "launch_bounds", "name")

    def __init__(
        self,
        name: str | None,
        builder: str,
        arguments: tuple[Any, ...],
        launch_bounds: LaunchBounds,
    ) -> None:
        self.name = name
        self.launch_bounds = launch_bounds
        self.builder, self._arguments = builder, arguments

    @property
    def entry(self) -> str:
        """Name of the kernel in PTX, which profilers show."""
        return f"dvkernels_{(self.name or 'custom reduction').replace(' ', '_')}"

    def build(self) -> Callable[..., None]:
        """Return the kernel as a Python function, not compiled."""
        module, _, builder = self.builder.rpartition(".")
        function: Callable[..., None] = getattr(numba_import.module(module), builder)(
            *self._arguments, self.launch_bounds[0]
        )
        return function

    def __repr__(self) -> str:
        return f"<Kernel {self.name or 'of a custom reduction'!r}>"


class Compiled(NamedTuple):
    """PTX and the name of the kernel in it."""

    name: str
    ptx: str
