"""Public names of the package, and what the pages of the reference say of each."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any, NamedTuple

import dvkernels as dv

# Modules whose names are public besides those of the package itself.
MODULES = (
    "cluster",
    "errors",
    "kernels",
    "kernels.cpu.group",
    "kernels.cpu.optimizers",
    "optimizers",
    "partitioners",
    "profiler",
    "testing",
)


class _Fields(NamedTuple):
    one: int


def public_names() -> dict[str, Any]:
    """Return every public name, with its path as users write it, and its object."""
    found = {f"dvkernels.{name}": getattr(dv, name) for name in dv.__all__ if name[0] != "_"}
    for module_name in MODULES:
        module = _module(module_name)
        names = getattr(module, "__all__", None) or [n for n in vars(module) if n[0] != "_"]
        found |= {f"dvkernels.{module_name}.{name}": getattr(module, name) for name in names}
    return {name: value for name, value in found.items() if not isinstance(value, types.ModuleType)}


def _module(name: str) -> Any:
    if name == "partitioners":
        # An attribute of the package; Sphinx imports what it documents.
        return sys.modules.setdefault("dvkernels.partitioners", dv.partitioners)
    return importlib.import_module(f"dvkernels.{name}")


def title(fullname: str) -> str:
    """Return the name as programs write it after ``import dvkernels as dv``.

    >>> title("dvkernels.optimizers.SGD"), title("dvkernels.testing.check_arrays")
    ('dv.optimizers.SGD', 'dvkernels.testing.check_arrays')
    """
    is_lazy = fullname.split(".")[1] in dv.__all__
    return fullname.replace("dvkernels.", "dv.", 1) if is_lazy else fullname


def documented_elsewhere(fullname: str) -> str:
    """Return the bases whose methods the page of a class leaves out."""
    names = public_names()
    bases = {value.__name__ for value in names.values() if isinstance(value, type)}
    builtin = {"object", "Enum", "tuple", "Exception", "Protocol", "Generic"}
    own = getattr(names.get(fullname), "__name__", "")
    return ", ".join(sorted((bases | builtin) - {own}))


def slots(fullname: str) -> str:
    """Return the names of slots and fields, which a base or the docstring of the class describes.

    >>> slots("dvkernels.PerReplica")
    'devices, owner, values'
    """
    owner = public_names().get(fullname)
    names = [name for name in dir(owner) if name[0] != "_"]
    kinds = types.MemberDescriptorType, type(_Fields.one)
    return ", ".join(name for name in names if isinstance(getattr(owner, name, None), kinds))


def first_public_base(fullname: str) -> str:
    """Return the nearest base class that has a page of its own, or an empty string."""
    names = public_names()
    paths = {id(value): name for name, value in names.items()}
    bases = getattr(names.get(fullname), "__mro__", ())[1:]
    return next((paths[id(base)] for base in bases if id(base) in paths), "")
