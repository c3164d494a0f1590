"""Every verb and option: help texts, and errors of wrong values, formats and paths."""

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
def test_the_help_of_every_option_names_its_default(verb):
    formatter = command_line._HelpWithDefaults(verb)
    for action in options_of(verb):
        assert action.help, action
        text = formatter._expand_help(action)
        if action.nargs != 0 and action.default not in (None, [], argparse.SUPPRESS):
            assert "default" in text, action
            assert str(action.default) in text or "default:" in text, action


@pytest.mark.parametrize(("verb", "action"), NUMBERS)
@pytest.mark.parametrize("text", ["x", "", "-1", "1.5", "1e400"])
def test_a_malformed_number_is_an_error_in_words(verb, action, text, capsys):
    kind = action.type.__name__
    valid = [
        ("-1", "integer"),
        ("1.5", "seconds"),
        ("1e400", "seconds"),
        ("1.5", "positive_number"),
    ]
    if (text, kind) in valid:
        return
    status, out, err = called(capsys, verb, f"{action.option_strings[-1]}={text}")
    assert (status, out) == (2, "")
    assert err.startswith(f"usage: python -m dvkernels {verb}")
    assert "expected " in err
    assert "invalid" not in err


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_option_prints_the_usage_of_the_verb(verb, capsys):
    needed = {
        "ask": ["1"],
        "checkpoint": ["show", "x"],
        "report": ["x"],
        "trace": ["x", "-o", "y"],
    }
    status, out, err = called(capsys, verb, *needed.get(verb, []), "--no-such-option")
    assert (status, out) == (2, "")
    assert err.startswith(f"usage: python -m dvkernels {verb}")
    assert "--no-such-option" in err


@pytest.mark.parametrize("words", [[], ["no-such-verb"], ["--no-such-option"]])
def test_an_unknown_verb_is_an_error(words, capsys):
    status, out, err = called(capsys, *words)
    assert (status, out) == (2, "")
    assert "error: " in err


WRITING = [
    ("bench", "--json"),
    ("bench", "--plot"),
    ("train", "--checkpoint-dir"),
    ("train", "--plot"),
]


@pytest.mark.parametrize(("verb", "option"), WRITING)
@pytest.mark.parametrize("name", ["/proc/no/such.svg", "a\0b.svg", "file/below.svg"])
def test_an_unwritable_output_is_found_before_the_work(
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


def test_one_replica_is_singular(capsys):
    words = ["--replicas", "1", "--epochs", "1", "--hidden", "8", "--batch-size", "4096"]
    status, out, err = called(capsys, "train", *words)
    assert status == 0
    assert "1 replica;" in err
    assert "possible (1 replica)\n" in out


def test_a_path_is_named_once(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("none", "empty"):
        for action in ("show", "verify"):
            status, out, _ = called(capsys, "checkpoint", action, str(tmp_path / name))
            assert status == 1
            assert out.count(str(tmp_path / name)) == 1


@pytest.mark.skipif(os.name != "posix", reason="needs a pipe without a reader")
@pytest.mark.parametrize("words", [["--help"], ["bench", "--help"], ["checkpoint", "show", "x"]])
def test_a_closed_pipe_ends_quietly(words):
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


def test_the_earlier_command_name_of_the_worker_starts_a_program(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import sys\nprint(__name__, sys.argv[1:])\nsys.exit(3)")
    done = subprocess.run(
        [sys.executable, "-m", "dvkernels.cli.worker", str(program), "-x", "1"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "__main__ ['-x', '1']\n"), done.stderr
