"""The first run on a real GPU (tests/gpu/first_run) is whole, since it has ten minutes there."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.simulator

FIRST_RUN = Path(__file__).parents[1] / "gpu" / "first_run" / "gpu_first_run.py"
SECTIONS = [
    "first",
    "bandwidth",
    "latency",
    "compare",
    "teams",
    "frameworks",
    "body_of_sanitizer",
    "body_of_ncu",
    *(f"correct {k}/5" for k in range(5)),
]


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_runs_on_tiny_arrays(section, tmp_path):
    name, *part = section.split()
    result = tmp_path / "result.json"
    ended = subprocess.run(
        [sys.executable, FIRST_RUN, name, "--part", result, "--slice", *(part or ["0/1"])],
        env={**os.environ, "DVK_DRY": "1", "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(result.read_text())
    assert found["ok"]
    assert not found.get("failed")
    assert all(line["wrong"] == 0 for line in found.get("all_reduce", []))


def call(sections, out):
    return subprocess.run(
        ["bash", FIRST_RUN.with_suffix(".sh")],
        env={
            **os.environ, "DVK_DRY": "1", "NUMBA_ENABLE_CUDASIM": "1", "DVK_SECTIONS": sections,
            "OUT": str(out), "PYTHON": sys.executable,
        },
        capture_output=True, text=True, timeout=110,
    )  # fmt: skip


def test_a_second_call_repeats_the_sections_that_it_names(tmp_path):
    for sections in ("env,first", "first"):
        ended = call(sections, tmp_path)
        assert ended.returncode == 0, ended.stderr
        results = json.loads((tmp_path / "results.json").read_text())
        assert {name: found["rc"] for name, found in results.items()} == {"env": "0", "first": "0"}
    assert results["env"]["date"] <= results["first"]["date"]
    refused = call("first,bandwith", tmp_path)
    assert refused.returncode == 2
    assert "no section bandwith; there are env,first,bandwidth" in refused.stderr


@pytest.mark.parametrize("which", ["not slow", "slow -k of_the_cpu", "slow -k sanitizer"])
def test_the_selections_of_tests_select_some(which):
    marks, *names = which.split(" -k ")
    options = ["-m", f"gpu and {marks}", *(["-k", names[0]] if names else [])]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/gpu", "--collect-only", *options],
        cwd=FIRST_RUN.parents[3], capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout


def test_all_that_it_uses_of_the_library_is_there():
    """Some of it runs on hardware only: names are looked up without being called."""
    tree = ast.parse(FIRST_RUN.read_text("utf-8"))
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dvkernels"):
            for alias in node.names:
                try:
                    modules[alias.name] = importlib.import_module(f"{node.module}.{alias.name}")
                except ModuleNotFoundError:
                    assert hasattr(importlib.import_module(node.module), alias.name), alias.name
    used = {
        (node.value.id, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    missing = [f"{m}.{name}" for m, name in used if m in modules and not hasattr(modules[m], name)]
    assert len(modules) > 10
    assert not missing
    overridden = next(node for node in ast.walk(tree) if getattr(node, "name", "") == "Forgetful")
    for method in overridden.body:
        taken = inspect.signature(getattr(modules["peer_access"].PeerAccess, method.name))
        assert [argument.arg for argument in method.args.args] == [*taken.parameters]
    in_groups = inspect.getsource(modules["group"])
    assert not [name for of, name in used if of == "own" and f"self.{name}" not in in_groups
                and f"def {name}(" not in in_groups]  # fmt: skip
