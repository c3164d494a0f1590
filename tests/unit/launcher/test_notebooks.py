"""Functions launched from the cells of an executed notebook."""

from __future__ import annotations

import os
import textwrap

import psutil
import pytest

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


def test_cells_launch_functions_one_after_another(tmp_path):
    setup = f"flag = {str(tmp_path / 'flag')!r}"
    sources = [setup, *(textwrap.dedent(source).strip() for source in CELLS.values())]
    notebook = nbformat.v4.new_notebook(cells=[*map(nbformat.v4.new_code_cell, sources)])
    client = nbclient.NotebookClient(
        notebook, timeout=120, allow_errors=True, kernel_name="python3"
    )
    client.execute(cwd=os.getcwd())
    cells = dict(zip(["setup", *CELLS], notebook.cells, strict=True))
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
