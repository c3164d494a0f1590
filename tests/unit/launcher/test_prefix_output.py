"""Output of a worker is relayed promptly, in lines that start with the worker's number."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from dvkernels.launcher import prefix_output

RELAY = Path(prefix_output.__file__)
SECONDS = 30

WORDS = st.sampled_from([b"a", b"b c", b"\xff\x00", "\u00e4".encode(), b"\n", b"\r", b"x\r\n"])


def relayed(*pieces: bytes | None) -> bytes:
    """Return the output for pieces read one after another; None: a moment passes."""
    stream = prefix_output.LinePrefixer(b"[7] ")
    found = []
    for piece in (*pieces, b""):
        if piece is None:
            stream.due = 0.0
        found += stream.lines(piece)
    return b"".join(found)


@given(st.lists(WORDS), st.data())
def test_output_does_not_depend_on_the_pieces(words, data):
    text = b"".join(words)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[low:high] for low, high in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    if b"\r\n" not in text.replace(b"x\r\n", b""):  # an empty bar is an exception
        assert relayed(*filter(None, pieces)) == relayed(text)


@given(st.lists(WORDS.filter(lambda word: b"\r" not in word)))
def test_lines_are_those_that_were_written(words):
    text = b"".join(words)
    expected = b"".join(b"[7] " + line + b"\n" for line in text.split(b"\n")[:-1])
    rest = text.rpartition(b"\n")[2]
    assert relayed(text) == expected + (b"[7] " + rest + b"\n" if rest else b"")


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([b"50%\r", b"100%\r", b"\n"], [b"[7] 50%\r[7] 100%\r\n"]),
        ([b"\r50%", None, b"\r100%", None, b"\n"], [b"[7] 50%\r[7] 100%\r\n"]),
        ([b"name? ", None, b"\n", b"\n"], [b"[7] name? \n[7] \n"]),
        ([b"a", None, b"b\n"], [b"[7] a\n[7] b\n"]),
        ([b"a\r\n\r\n\n"], [b"[7] a\r\n[7] \r\n[7] \n"]),
        ([b"end"], [b"[7] end\n"]),
        ([b"\r99%"], [b"[7] 99%\n"]),  # so that a shell's prompt starts on a line of its own
    ],
)
def test_bars_and_questions(pieces, expected):
    assert [relayed(*pieces)] == expected


def test_long_lines_are_cut_between_characters():
    text = ("\u20ac" * 100_000).encode()
    lines = relayed(text[:1000], text[1000:]).splitlines()
    assert all(len(line) <= prefix_output._NBYTES + 4 for line in lines)
    assert b"".join(line.removeprefix(b"[7] ") for line in lines) == text
    assert all(line.decode() for line in lines)


@pytest.mark.parametrize("shown", ["50%\\r", "\\r50%", "name? "])
def test_a_line_is_seen_before_it_ends(shown):
    program = f"import sys; print('{shown}', end='', flush=True); print('then', input())"
    process = subprocess.Popen(
        [sys.executable, str(RELAY), "RANK", sys.executable, "-c", program],
        env={**os.environ, "RANK": "3"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    seen = b""
    wanted = b"[3] " + shown.replace("\\r", "").encode()
    while wanted not in seen:
        assert select.select([process.stdout], [], [], SECONDS)[0], seen
        seen += os.read(process.stdout.fileno(), 1000)
    out, _ = process.communicate(b"this\n", timeout=SECONDS)
    assert (seen + out).splitlines()[-1] == b"[3] then this"
