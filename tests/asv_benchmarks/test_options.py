"""Options of the benchmarks beside other libraries: help texts, and unwritable paths."""

from __future__ import annotations

import argparse
import importlib

import pytest
from peers import main

from dvkernels.cli import main as command_line


@pytest.mark.parametrize("verb", main.VERBS)
def test_the_help_of_every_option_names_its_default(verb):
    parser = argparse.ArgumentParser()
    importlib.import_module(main.VERBS[verb]).add_arguments(parser)
    formatter = command_line.HelpWithDefaults(verb)
    for action in parser._actions:
        assert action.help, action
        text = formatter._expand_help(action)
        if action.nargs != 0 and action.default not in (None, [], argparse.SUPPRESS):
            assert "default" in text, action


@pytest.mark.parametrize("verb", main.VERBS)
def test_an_unknown_option_prints_the_usage_of_the_verb(verb, capsys):
    with pytest.raises(SystemExit, match="2"):
        main.main([verb, "--no-such-option"])
    err = capsys.readouterr().err
    assert err.startswith(f"usage: python -m peers {verb}")
    assert "--no-such-option" in err


@pytest.mark.parametrize(
    ("verb", "option"),
    [
        ("bench", "--json"),
        ("bench-input", "--json"),
        ("bench-checkpoint", "--json"),
        ("bench-checkpoint", "--folder"),
        ("bench-workers", "--json"),
    ],
)
@pytest.mark.parametrize("name", ["/proc/no/such.svg", "a\0b.svg", "file/below.svg"])
def test_an_unwritable_output_is_found_before_the_work(
    verb, option, name, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    assert main.main([verb, f"{option}={name}"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {option}: cannot write")
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
