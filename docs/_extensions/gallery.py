"""Gallery of the examples: titles from their docstrings, and plots of what they computed.

The examples themselves stay as short as their readers want them. A file of ``docs/plots`` with the
name of an example is run after it, with the example's variables.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

# Examples that need what a machine without a GPU or an MPI lacks are shown and not run.
_OPTIONAL = {"cupy", "jax", "mpi4py", "torch"}


def configuration(examples: Path, docs: Path) -> dict[str, Any]:
    """Write the sources of the gallery, and return the settings of sphinx-gallery."""
    source = docs / "_gallery_source"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir()
    (source / "README.rst").write_text(_HEAD)
    _draw_prompt(source / "prompt.png")
    run = []
    for path in sorted(examples.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        plot = docs / "plots" / path.name
        is_run = not _missing(text)
        if is_run:
            run.append(path.name)
        more = plot.read_text(encoding="utf-8") if plot.exists() else ""
        note = "" if is_run else _NOT_RUN.format(packages=", ".join(sorted(_missing(text))))
        (source / path.name).write_text(with_title(text, note) + more, encoding="utf-8")
    return {
        "examples_dirs": str(source),
        "gallery_dirs": "gallery",
        "filename_pattern": "/(" + "|".join(map(re.escape, run)) + ")$",
        "within_subsection_order": "FileNameSortKey",
        "default_thumb_file": str(source / "prompt.png"),
        # Processes of their own: Sphinx forks this one later, which has no threads so far.
        "parallel": True,
        "capture_repr": (),
        "backreferences_dir": "gallery/backreferences",
        "doc_module": ("dvkernels",),
        "inspect_global_variables": True,
        "abort_on_example_error": True,
        "reset_modules": (),
        "image_scrapers": ("matplotlib",),
        "download_all_examples": False,
        "show_signature": False,
        "write_computation_times": False,
        "log_level": {"backreference_missing": "debug"},
    }


_HEAD = """\
.. _gallery:

Examples
========

Complete programs. Each asserts its result. The times are those of the machine that built this page.
"""
_NOT_RUN = "*Not run for this page: {packages} is not installed on the machine that built it.*"


def with_title(text: str, note: str = "") -> str:
    """Return an example whose docstring begins with a title."""
    tree = ast.parse(text)
    docstring, first = ast.get_docstring(tree), tree.body[0]
    heading = re.split(r"[:,\n]| over ", docstring)[0].rstrip(".")
    code = text.splitlines()[first.end_lineno :]
    head = f'"""\n{heading}\n{"=" * len(heading)}\n\n{docstring}\n\n{note}'.rstrip()
    return "\n".join([head, "", '"""', *code]) + "\n"


def _draw_prompt(path: Path) -> None:
    """Draw the small picture of the examples without a plot."""
    figure = Figure(figsize=(4, 2.8))
    figure.text(
        0.5, 0.5, ">>>", size=64, color="gray", family="monospace", ha="center", va="center"
    )
    figure.savefig(path)


def _missing(text: str) -> set[str]:
    """Return the packages that an example imports and this machine lacks."""
    names = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    packages = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"dvkernels"}
    lacking = {name for name in packages if importlib.util.find_spec(name) is None}
    if lacking - _OPTIONAL - {"pyarrow", "scipy", "sklearn"}:
        raise ImportError(f"the examples need {lacking}, which are not installed")
    return lacking
