"""Directive ``{extras}``: what pyproject.toml can install besides the package, as a table."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
PURPOSES = {
    "cuda12": "GPUs with a driver of CUDA 12",
    "cuda13": "GPUs with a driver of CUDA 13",
    "mpi": "several hosts, and one with an MPI",
    "jax": "JAX arrays in a replica",
    "torch": "PyTorch tensors in a replica",
    "parquet": "Parquet files as datasets",
    "threads": "replicas that share the cores with BLAS and OpenMP",
    "plot": "plots of `bench` and `train`",
    "report": "the page of a trace",
    "demo": "the `train` command",
    "notebook": "running and testing notebooks",
    "bench": "benchmarks under asv",
    "browser": "tests of pages in a browser",
    "cuda-compile": "tests of the CUDA kernels' machine code, without a GPU",
    "oracle": "recording the answers of TensorFlow anew",
    "docs": "building these pages",
    "test": "the tests",
    "dev": "work on the package",
}


class Extras(SphinxDirective):
    """Table of the extras: name, purpose, packages."""

    def run(self) -> list[nodes.Node]:
        """Return the table; raise where an extra has no purpose, or a purpose no extra."""
        project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
        extras = project["optional-dependencies"]
        if extras.keys() != PURPOSES.keys():
            raise self.error(f"extras without a purpose: {extras.keys() ^ PURPOSES.keys()}")
        self.env.note_dependency(str(PYPROJECT))
        rows = ["| extra | for | packages |", "|---|---|---|"]
        for name, purpose in PURPOSES.items():
            packages = dict.fromkeys(each.partition(";")[0].strip() for each in extras[name])
            cells = ", ".join(f"`{package}`" for package in packages)
            rows.append(f"| `{name}` | {purpose} | {cells} |")
        return self.parse_text_to_nodes("\n".join(rows))


def setup(app: Any) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("extras", Extras)
    return {"parallel_read_safe": True}
