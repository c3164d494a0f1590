"""Every verb and option: what it says of itself, and what it says of what it cannot take."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys

import pytest

from dvkernels.cli import main as command_line
from dvkernels.cli.main import main

SECONDS = 60
VERBS = command_line._VERBS


def options_of(verb):
    parser = argparse.ArgumentParser()
    importlib.import_module(VERBS[verb]).add_arguments(parser)
    return [action for action in parser._actions if action.option_strings]


def called(capsys, *words):
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code
    return (status, *capsys.readouterr())


NUMBERS = [
    pytest.param(verb, action, id=f"{verb} {action.option_strings[-1]}")
    for verb in VERBS
    for action in options_of(verb)
    if action.type not in (None, str) and not action.choices
]


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_says_what_it_is_and_its_default(verb):
    formatter = command_line._Defaults(verb)
    for action in options_of(verb):
        assert action.help, action
        said = formatter._expand_help(action)
        if action.nargs != 0 and action.default not in (None, [], argparse.SUPPRESS):
            assert "default" in said, action
            assert str(action.default) in said or "default:" in said, action


@pytest.mark.parametrize(("verb", "action"), NUMBERS)
@pytest.mark.parametrize("text", ["x", "", "-1", "1.5", "1e400"])
def test_what_is_no_number_is_said_in_words(verb, action, text, capsys):
    kind = action.type.__name__
    if (text, kind) in [("-1", "integer"), ("1.5", "seconds"), ("1e400", "seconds")]:
        return  # may be right
    status, out, err = called(capsys, verb, f"{action.option_strings[-1]}={text}")
    assert (status, out) == (2, "")
    assert err.startswith(f"usage: python -m dvkernels {verb}")
    assert "expected " in err
    assert "invalid" not in err


@pytest.mark.parametrize("verb", VERBS)
def test_a_wrong_option_is_one_of_the_verb(verb, capsys):
    words = {"checkpoint": ["show", "x"]}.get(verb, [])
    status, out, err = called(capsys, verb, *words, "--no-such-option")
    assert (status, out) == (2, "")
    assert err.startswith(f"usage: python -m dvkernels {verb}")
    assert "--no-such-option" in err


@pytest.mark.parametrize("words", [[], ["no-such-verb"], ["--no-such-option"]])
def test_a_wrong_verb(words, capsys):
    status, out, err = called(capsys, *words)
    assert (status, out) == (2, "")
    assert "error: " in err


WRITING = [
    ("bench", "--json"),
    ("bench", "--plot"),
    ("bench-input", "--json"),
    ("bench-checkpoint", "--json"),
    ("bench-checkpoint", "--folder"),
    ("bench-workers", "--json"),
    ("train", "--checkpoint-dir"),
]


@pytest.mark.parametrize(("verb", "option"), WRITING)
@pytest.mark.parametrize("name", ["/proc/no/such.svg", "a\0b.svg", "file/below.svg"])
def test_what_cannot_be_written_is_found_before_the_work(
    verb, option, name, capsys, tmp_path, monkeypatch
):
    if option == "--plot":
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    status, out, err = called(capsys, verb, f"{option}={name}")
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {option}: cannot write")
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_unknown_format_is_found_before_the_work(capsys):
    pytest.importorskip("matplotlib")
    status, out, err = called(capsys, "bench", "--plot", "curves.odt")
    assert (status, out) == (2, "")
    assert "such as .svg" in err


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--json", "--device", "toaster"],
        ["train", "--json", "--hidden", "100000000000"],
        ["bench", "--dtype", "float31", "--json"],
        ["bench", "--json", "-", "--sizes", "much"],
    ],
)
def test_a_failure_is_one_json_object_too(words, capsys):
    status, out, err = called(capsys, *words)
    assert status == 2
    assert err.rstrip().endswith(f"error: {json.loads(out)['error']}")


def test_one_is_no_plural(capsys):
    words = ["--replicas", "1", "--epochs", "1", "--hidden", "8", "--json"]
    status, out, err = called(capsys, "train", *words)
    assert status == 0
    assert "1 replica;" in err
    report = json.loads(out)
    assert report["speed_up"] == pytest.approx(
        report["examples_per_second"] / report["one_device_examples_per_second"]
    )


def test_a_path_is_named_once(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("none", "empty"):
        for action in ("show", "verify"):
            status, out, _ = called(capsys, "checkpoint", action, str(tmp_path / name))
            assert status == 1
            assert out.count(str(tmp_path / name)) == 1


@pytest.mark.skipif(os.name != "posix", reason="needs a pipe that nobody reads")
@pytest.mark.parametrize("words", [["--help"], ["bench", "--help"], ["checkpoint", "show", "x"]])
def test_nobody_reads_any_more(words):
    source, target = os.pipe()
    os.close(source)
    done = subprocess.run(
        [sys.executable, "-m", "dvkernels", *words],
        stdout=target,
        stderr=subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        timeout=SECONDS,
        check=False,
    )
    os.close(target)
    assert (done.returncode, done.stderr) == (141, b"")
