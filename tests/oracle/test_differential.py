"""Every program on dvkernels, against what TensorFlow answered; see differences.py."""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import on_dvkernels
import pytest
from comparison import Case, differing, same_outcome
from differences import DIFFERENCES
from oracle_programs import all_programs
from record import ANSWERS

PROGRAMS = all_programs()
RECORDED = json.loads(ANSWERS.read_text())["answers"]
# Where dvkernels itself is wrong by its contract: the program's name and what is wrong.
WRONG: dict[str, str] = {}


def parameters() -> list[Any]:
    return [
        pytest.param(name, marks=pytest.mark.xfail(reason=WRONG[name], strict=True))
        if name in WRONG
        else name
        for name in PROGRAMS
    ]


@functools.cache
def cases(name: str) -> list[Case]:
    return list(differing(PROGRAMS[name], RECORDED[name], on_dvkernels.answer(PROGRAMS[name])))


def explanations(case: Case) -> list[str]:
    return [difference.name for difference in DIFFERENCES if difference.explains(case)]


def test_every_program_has_a_recorded_answer():
    assert RECORDED.keys() == PROGRAMS.keys()
    assert RECORDED.keys() >= WRONG.keys()


@pytest.mark.parametrize("name", parameters())
def test_same_answer_or_a_named_difference(name):
    unexplained = [case for case in cases(name) if not explanations(case)]
    assert not unexplained, "\n".join(
        f"{case.operation}\non {case.program['variable']}, {case.program['strategy']} with "
        f"{case.program['replicas']} replicas\ncopies:     {case.before}\n"
        f"TensorFlow: {case.theirs}\ndvkernels:  {case.ours}"
        for case in unexplained
    )


def test_every_named_difference_occurs():
    found = {name for program in PROGRAMS for case in cases(program) for name in explanations(case)}
    assert {difference.name for difference in DIFFERENCES} == found


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(variant, marks=[] if variant == "asynchronous" else pytest.mark.wide)
        for variant in on_dvkernels.VARIANTS
    ],
)
def test_every_variant_gives_the_same_answer(variant):
    for program in PROGRAMS.values():
        usual, other = on_dvkernels.answer(program), on_dvkernels.answer(program, variant)
        assert len(usual) == len(other), program
        for one, another in zip(usual, other, strict=True):
            if "error" in one or "error" in another:
                assert one == another, program
            else:
                assert same_outcome(one, another), program


def test_most_operations_need_no_explanation():
    """A table that explained everything away would test nothing."""
    compared = sum(map(len, RECORDED.values()))
    differ = sum(len(cases(name)) for name in PROGRAMS)
    assert differ < compared / 3


@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None, reason="needs the extra 'oracle'"
)
def test_tensorflow_still_answers_as_recorded(tmp_path):
    live = tmp_path / "answers.json"
    recorder = Path(__file__).with_name("record.py")
    subprocess.run(
        [sys.executable, recorder, "--every", "20", "--out", live], check=True, timeout=100
    )
    answers = json.loads(live.read_text())["answers"]
    assert len(answers) >= len(PROGRAMS) // 20
    for name, outcomes in answers.items():
        recorded = RECORDED[name]
        assert len(outcomes) == len(recorded)
        for one, other in zip(outcomes, recorded, strict=True):
            assert one == other or same_outcome(one, other), PROGRAMS[name]
