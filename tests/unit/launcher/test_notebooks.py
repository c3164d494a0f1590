"""Executed notebooks: functions launched from cells, tables, progress and short errors."""

from __future__ import annotations

import os
import re
import textwrap
import types

import psutil
import pytest

from dvkernels import tracebacks
from dvkernels.launcher import notebook_line

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

CELLS = {
    "define": """
        import os, signal, threading, time
        import dvkernels as dv
        offset = 10
        def rank_of(text):
            print("printed")
            return offset + int(text)
    """,
    "first": "print(dv.launch(rank_of, ('1',), workers=2))",
    "second": "print(dv.launch(lambda: rank_of('2'), workers=2))",
    "long": """
        def wait():
            while not os.path.exists(flag):
                time.sleep(0.01)
            return 'waited'
        threading.Timer(2.5, lambda: open(flag, 'w').close()).start()
        print(dv.launch(wait, workers=2))
    """,
    "error": """
        def fail():
            raise ValueError('of a cell')
        dv.launch(fail, workers=2)
    """,
    "interrupt": """
        threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        dv.launch(lambda: time.sleep(100), workers=2)
    """,
    "left": """
        import psutil
        print([child.cmdline() for child in psutil.Process().children(recursive=True)])
    """,
}


SHOWN = {
    "setup": """
        import numpy as np
        import dvkernels as dv
        strategy = dv.MirroredStrategy([f"cpu:{k}" for k in range(4)])
    """,
    "table": "strategy",
    "values": "strategy.run(lambda: dv.get_replica_context().replica_id_in_sync_group)",
    "shapes": """
        def step():
            replica = dv.get_replica_context()
            return replica.all_reduce("sum", np.ones(3 + (replica.replica_id_in_sync_group == 2)))
        strategy.run(step)
    """,
    "kernel": "dv.kernels.all_reduce([np.ones(3), np.ones(4)])",
    "own": "strategy.run(lambda: 1 // 0)",
    "full": """
        %env DVKERNELS_TRACEBACK=full
        strategy.run(step)
    """,
    "train": """
        from dvkernels.cli.main import main
        main("train --replicas 1 --epochs 1 --hidden 8 --batch-size 4096".split())
    """,
}


def _executed(cells):
    sources = [textwrap.dedent(source).strip() for source in cells.values()]
    notebook = nbformat.v4.new_notebook(cells=[*map(nbformat.v4.new_code_cell, sources)])
    client = nbclient.NotebookClient(
        notebook, timeout=120, allow_errors=True, kernel_name="python3"
    )
    client.execute(cwd=os.getcwd())
    return dict(zip(cells, notebook.cells, strict=True))


def test_cells_show_tables_and_the_lines_of_users():
    cells = _executed(SHOWN)
    errors = {}
    for name, cell in cells.items():
        for output in cell.outputs:
            if output.output_type == "error":
                errors[name] = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(output.traceback))
    assert errors.keys() == {"shapes", "kernel", "own", "full"}
    # A wrong shape took 104 lines, 8 of the package's frames with those around them.
    most = {"shapes": 20, "kernel": 8, "own": 12}
    for name, number in most.items():
        assert errors[name].count("\n") < number, errors[name]
        assert tracebacks.PACKAGE not in errors[name]
        assert "File " not in errors[name]  # none but cells
    assert "the replicas disagree" in errors["shapes"]
    assert "replicas 1, 2, 3 also raised it" in errors["own"]
    assert "verbs.py" in errors["full"]
    (table,) = cells["table"].outputs
    assert table.data["text/html"].count("cpu:") == 8
    (values,) = cells["values"].outputs
    assert values.data["text/plain"] == "PerReplica(0: 0, 1: 1, 2: 2, 3: 3)"
    assert values.data["text/html"].startswith("<table><caption>PerReplica</caption>")
    trained = _text(cells["train"])
    assert "ipywidgets" not in trained
    assert "training" in trained


def test_the_progress_of_a_launched_function_is_a_bar(monkeypatch):
    shown = []
    display = types.SimpleNamespace(update=lambda content, raw: shown.append(content))
    monkeypatch.setattr(
        "IPython.display.display", lambda content, **_: shown.append(content) or display
    )
    monkeypatch.setattr(notebook_line, "_is_in_notebook", lambda: True)
    monkeypatch.setattr(notebook_line, "_FIRST_SECONDS", 0)
    line = notebook_line.NotebookLine()
    line.show(1, 4)
    line.clear()
    bar, nothing = shown
    assert bar["text/plain"].startswith("1 of 4 workers have ended")
    assert '<progress value="1" max="4"></progress>' in bar["text/html"]
    assert {*nothing.values()} == {""}


@pytest.mark.wide
def test_cells_launch_functions_one_after_another(tmp_path):
    cells = _executed({"setup": f"flag = {str(tmp_path / 'flag')!r}", **CELLS})
    printed = {name: _text(cell) for name, cell in cells.items()}
    assert "[11, 11]" in printed["first"]
    assert printed["first"].count("[0] printed\n") == printed["first"].count("[1] printed\n") == 1
    assert "[12, 12]" in printed["second"]
    assert "['waited', 'waited']" in printed["long"]
    # Its line has shown the workers, and is gone.
    shown = [output for output in cells["long"].outputs if output.output_type == "display_data"]
    assert [output.data["text/plain"] for output in shown] == [""]
    (error,) = [output for output in cells["error"].outputs if output.output_type == "error"]
    assert (error.ename, error.evalue.split("\n")[0]) == ("ValueError", "of a cell")
    trace = "\n".join(error.traceback)
    assert "In worker" in trace
    assert "raise ValueError('of a cell')" in trace.partition("In worker")[2]
    (error,) = [output for output in cells["interrupt"].outputs if output.output_type == "error"]
    assert error.ename == "KeyboardInterrupt"
    assert printed["left"] == "[]\n"
    assert not [
        child
        for child in psutil.Process().children(recursive=True)
        if "function_worker" in str(child.cmdline())
    ]


def _text(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")
