"""Every example runs without an error, in a process of its own, in an empty folder."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

import fork_server
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LONGEST = 80  # lines
RUN = """
import runpy, sys, warnings

warnings.simplefilter("error")
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _packages(example: Path) -> set[str]:
    """Return the third-party packages that an example imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(example.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"dvkernels"}


def _case(example: Path):
    marks = [pytest.mark.jax] if "jax" in _packages(example) else []
    marks += [pytest.mark.wide] if example.stem == "jax_digits" else []  # as long as ten others
    return pytest.param(example, id=example.stem, marks=marks)


@pytest.mark.parametrize("example", [_case(example) for example in EXAMPLES])
def test_example_runs(example: Path, tmp_path: Path) -> None:
    for package in sorted(_packages(example)):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    child = fork_server.run(RUN, example, cwd=tmp_path)
    assert child.returncode == 0, f"{child.stdout}\n{child.stderr}"
    assert child.stdout.strip(), "an example prints a result"
    assert not list(tmp_path.iterdir()), "an example leaves no file behind"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_example_is_short_and_asserts(example: Path) -> None:
    text = example.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST
    assert "assert" in text
    assert ast.get_docstring(ast.parse(text))


def test_every_example_is_in_the_list() -> None:
    page = (ROOT / "docs" / "how-to" / "examples.md").read_text(encoding="utf-8")
    missing = [example.name for example in EXAMPLES if example.name not in page]
    assert not missing
