"""Every verb and option: help texts, and errors of wrong values, formats and paths."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest

from dvkernels.cli import main as command_line
from dvkernels.cli.main import main

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 60
VERBS = command_line.VERBS


PARSERS = command_line.parser_of(
    {name: importlib.import_module(module) for name, module in VERBS.items()},
    "python -m dvkernels",
    command_line.__doc__,
)[1]


def options_of(verb):
    return [action for action in PARSERS[verb]._actions if action.option_strings]


def words_of(verb, name="/no/such"):
    """Return the shortest command line, with a name that means nothing for files and others."""
    words = [verb]
    for action in PARSERS[verb]._actions:
        if action.required or (not action.option_strings and action.nargs != argparse.SUPPRESS):
            number = {"positive": str(2**22 + 1)}.get(getattr(action.type, "__name__", ""))
            value = action.choices[0] if action.choices else number or name
            words += [*action.option_strings[-1:], value]
    return words


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
    formatter = command_line.HelpWithDefaults(verb)
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
    status, out, err = called(capsys, verb, "--no-such-option", *words_of(verb)[1:])
    assert (status, out) == (2, "")
    assert err.startswith(f"usage: python -m dvkernels {verb}")
    assert "--no-such-option" in err


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("columns", ["40", "80"])
def test_the_help_of_a_verb_fits_and_has_examples_that_parse(verb, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("NO_COLOR", "1")
    status, out, err = called(capsys, verb, "--help")
    assert (status, err) == (0, "")
    module = importlib.import_module(VERBS[verb])
    assert "".join(module.HELP.split()).lower() in "".join(out.split()).lower()
    assert "\x1b" not in out
    wide = [line for line in out.splitlines() if len(line) > int(columns)]
    assert not [line for line in wide if len(line.split()) > 1]
    shown = " ".join(out.replace("\\\n", " ").split())
    for _, command in module.EXAMPLES:
        assert command in shown
        words = shlex.split(command.partition("python -m dvkernels ")[2].replace("PID", "1"))
        assert words[0] in VERBS
        PARSERS[words[0]].parse_args(words[1:])
    assert "--json" in out


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_missing_is_an_error_in_one_line(verb, capsys, tmp_path, monkeypatch):
    """For verbs with positional arguments; the others have nothing that must exist."""
    monkeypatch.chdir(tmp_path)
    words = words_of(verb)
    if len(words) > 1:
        status, out, err = called(capsys, *words)
        assert status in (1, 2)
        assert (out + err).count("\n") == 1, (out, err)
        assert "no" in out + err
        assert not [*tmp_path.iterdir()]


def _raising(error):
    def run(_):
        raise error

    verb = types.SimpleNamespace(HELP="fails", add_arguments=lambda parser: None, run=run)
    return {"failing": verb}


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ZeroDivisionError("of ours"), 70, "error: ZeroDivisionError: of ours; this is an error"),
        (FileNotFoundError(2, "No such file", "a.json"), 2, "error: a.json: No such file"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device"),
        (MemoryError("of 1 TiB"), 2, "error: not enough memory: of 1 TiB"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_traceback_is_printed_with_debug_only(error, status, text, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "failing_verb", _raising(error)["failing"])
    verbs = {"failing": "failing_verb"}
    for words in (["failing"], ["failing", "--debug"], ["--debug", "failing"]):
        assert main(words, verbs) == status
        out, err = capsys.readouterr()
        assert out == ""
        assert err.splitlines()[-1].startswith(text)
        assert ("Traceback" in err) == ("--debug" in words)
        assert status in command_line.EXIT_STATUSES


def test_a_dry_run_and_a_calibration_are_json_too(capsys, tmp_path):
    assert main(["launch", "-n", "2", "--dry-run", "--json", __file__]) == 0
    job = json.loads(capsys.readouterr().out)
    assert __file__ in job["command"]
    assert "OMP_NUM_THREADS" in job["environment"]
    assert main(["bench", "--calibrate", "--rounds", "1", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert main(["bench", "--calibrate", "--rounds", "1", f"--json={tmp_path / 'a.json'}"]) == 0
    assert "measured here" in capsys.readouterr().out
    written = json.loads((tmp_path / "a.json").read_text())
    assert shown.keys() == written.keys() >= {"constants", "machine", "date"}


HELP_OF_ALL = """
import contextlib, io, sys
from dvkernels.cli.main import VERBS, main
for words in ([], *([verb] for verb in VERBS)):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([*words, "--help"])
    heavy = {"numpy", "numba", "optree", "rich", "matplotlib", "asyncio"} & sys.modules.keys()
    assert not heavy, (words, heavy)
    assert "usage" in out.getvalue()
"""


def test_a_help_imports_neither_numpy_nor_numba():
    """First, a help is there within 0.3 s; NumPy alone takes half of that."""
    done = subprocess.run(
        [sys.executable, "-c", HELP_OF_ALL], capture_output=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr


# Forks, one for each command line, that write to the given file and end as an interpreter does.
WRITING_TO = """
import json, os, sys
from dvkernels.cli.main import main
target, lines = int(sys.argv[1]), json.loads(sys.argv[2])
statuses = {}
for words in lines:
    child = os.fork()
    if not child:
        os.dup2(target, 1)
        sys.stdout = open(1, "w", closefd=False)
        sys.exit(main(words))
    statuses[" ".join(words)] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(statuses))
"""


def _statuses(target, lines):
    done = subprocess.run(
        [sys.executable, "-c", WRITING_TO, str(target), json.dumps(lines)],
        pass_fds=[target],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return set(json.loads(done.stdout).values()), done.stderr


HELPS = [["--help"], *([verb, "--help"] for verb in VERBS)]
PRINTING = [["checkpoint", "show", "x"], ["launch", "-n", "2", "--dry-run", __file__]]


@pytest.mark.skipif(os.name != "posix", reason="needs a pipe without a reader")
def test_a_closed_pipe_ends_quietly():
    source, target = os.pipe()
    os.close(source)
    try:
        assert _statuses(target, HELPS + PRINTING) == ({141}, "")
    finally:
        os.close(target)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is full")
def test_a_full_disk_is_an_error_in_one_line():
    with open("/dev/full", "w") as full:
        statuses, err = _statuses(full.fileno(), HELPS + PRINTING)
    assert statuses == {2}
    assert set(err.splitlines()) == {"error: No space left on device"}
    assert err.count("\n") == len(HELPS + PRINTING)


def test_the_page_has_the_verbs_and_the_exit_statuses():
    page = (ROOT / "docs" / "reference" / "command-line.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", page, re.MULTILINE)
    shown = [(str(status), text) for status, text in command_line.EXIT_STATUSES.items()]
    assert rows == shown
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(VERBS)


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
