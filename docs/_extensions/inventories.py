"""Names of Python, NumPy and Numba to which the reference links, and their addresses there.

Sphinx would fetch the inventories of all their names at each build. The few that the docstrings
use are written here, so that a build needs no network, and depends on no other site.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import public_names

_PYTHON = """
bool py:class library/functions.html#$
float py:class library/functions.html#$
int py:class library/functions.html#$
object py:class library/functions.html#$
bytes py:class library/stdtypes.html#$
dict py:class library/stdtypes.html#$
frozenset py:class library/stdtypes.html#$
list py:class library/stdtypes.html#$
set py:class library/stdtypes.html#$
str py:class library/stdtypes.html#$
tuple py:class library/stdtypes.html#$
None py:data library/constants.html#$
pathlib.Path py:class library/pathlib.html#$
os.PathLike py:class library/os.html#$
callable std:term glossary.html#term-$
iterable std:term glossary.html#term-$
iterator std:term glossary.html#term-$
mapping std:term glossary.html#term-$
sequence std:term glossary.html#term-$
"""
_NUMPY = """
numpy.ndarray py:class reference/generated/numpy.ndarray.html#$
array_like std:term glossary.html#term-$
numpy.dtype py:class reference/generated/numpy.dtype.html#$
"""
_NUMBA = """
numba.njit py:function user/5minguide.html
"""
_SITES = {
    "python": ("https://docs.python.org/3/", _PYTHON),
    "numpy": ("https://numpy.org/doc/stable/", _NUMPY),
    "numba": ("https://numba.readthedocs.io/en/stable/", _NUMBA),
}


def mapping(folder: Path) -> dict[str, tuple[str, str]]:
    """Write the inventories into a folder, and return the setting of intersphinx."""
    folder.mkdir(exist_ok=True)
    found = {}
    for project, (url, entries) in _SITES.items():
        # The field after the kind is the priority, the last one the name that is shown.
        lines = [
            re.sub(r"^(\S+ \S+) (.*)$", r"\1 1 \2 -", each) for each in entries.split("\n")[1:]
        ]
        head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n"
        head += "# The remainder of this file is compressed using zlib.\n"
        path = folder / f"{project}.inv"
        path.write_bytes(head.encode() + zlib.compress("\n".join(lines).encode()))
        found[project] = (url, str(path))
    return found


def aliases() -> dict[str, str]:
    """Return the links of the types that docstrings name, by the word that stands there."""
    found = {}
    for path, value in public_names.public_names().items():
        word = path.rpartition(".")[2]
        if (
            isinstance(value, type) and word[0].isupper()
        ):  # not `range` and `trace`, which are words
            found[word] = f":class:`{word} <{path}>`"
    for project, (_, entries) in _SITES.items():
        for name, kind, _ in map(str.split, entries.strip().split("\n")):
            role = {"function": "func"}.get(kind.partition(":")[2], kind.partition(":")[2])
            word = name if project == "numba" else name.rpartition(".")[2]
            found[word] = f":{role}:`{word} <{project}:{name}>`"
    return found | {"array": "array"}  # of any library, where numpydoc would link to NumPy's
