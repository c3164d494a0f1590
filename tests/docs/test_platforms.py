"""README, platforms page, metadata and workflows agree on what has been run."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs" / "reference" / "platforms.md").read_text(encoding="utf-8")
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
WORKFLOWS = ROOT / ".github" / "workflows"


def rows():
    """Return the cells "tried" and "not tried" of each row of the table."""
    found = re.findall(r"^\| ([\w ]+) \| (.+) \| (.+) \|$", PAGE, re.MULTILINE)
    return {name: (tried, untried) for name, tried, untried in found}


def versions(text):
    return [tuple(map(int, found.split("."))) for found in re.findall(r"\b3\.\d+\b", text)]


def test_the_readme_names_the_systems_and_pythons_of_the_page():
    found = re.search(r"tried only on (\w+) on (x86-64), with Python (3\.\d+) to (3\.\d+)", README)
    system, machine, first, last = found.groups()
    assert rows()["system"][0] == f"{system} ({machine})"
    tried = versions(rows()["Python"][0])
    assert [min(tried), max(tried)] == versions(f"{first} {last}")
    assert f"({system}; Python {first} or later" in README
    assert PROJECT["project"]["requires-python"] == f">={first}"


def test_the_classifiers_are_what_ran_all_tests():
    classifiers = PROJECT["project"]["classifiers"]
    all_tests, _, _ = rows()["Python"][0].partition(";")
    assert versions(" ".join(classifiers)) == versions(all_tests)
    systems = [text for text in classifiers if text.startswith("Operating System")]
    assert systems == ["Operating System :: POSIX :: Linux"]


def test_what_is_said_of_gpus_hosts_and_mpi_is_the_same():
    assert ("GPUs have not been tried" in README) == ("never run on one" in rows()["devices"][1])
    tried, untried = rows()["several hosts"]
    assert untried == "several machines"
    said = re.search(r"tried only as (.*?), with MPICH, with Open MPI and under Slurm", README)
    assert tried == f"{said[1]}: with MPICH, with Open MPI, under Slurm"
    assert "Kubernetes cluster" in rows()["several processes"][1]
    assert "Of Kubernetes only the manifests" in README


@pytest.mark.skipif(not WORKFLOWS.exists(), reason="needs a checkout")
def test_the_workflows_run_what_was_tried_and_may_fail_elsewhere():
    text = (WORKFLOWS / "ci.yml").read_text(encoding="utf-8")
    tests, _, elsewhere = text.partition("\n  elsewhere:")
    assert versions(re.search(r"python: \[(.*)\]", tests)[1]) == versions(
        rows()["Python"][0].partition(";")[0]
    )
    assert "continue-on-error: true" in elsewhere
    assert "continue-on-error" not in tests
    names = {"macos": "macOS", "windows": "Windows", "ubuntu": "Linux on aarch64"}
    systems = re.search(r"system: \[(.*)\]", elsewhere)[1].split(", ")
    untried = rows()["system"][1].split(", ")
    assert {names[system.partition("-")[0]] for system in systems} == set(untried)
    for path in WORKFLOWS.glob("*.yml"):
        assert "ot run so far" in path.read_text(encoding="utf-8").partition("\non:")[0]
    assert "workflows" in PAGE


def test_the_dependency_groups_are_the_extras():
    extras, groups = PROJECT["project"]["optional-dependencies"], PROJECT["dependency-groups"]
    assert "dev" in groups.keys() <= extras.keys()
    assert groups == {name: [f"dvkernels[{name}]"] for name in groups}
