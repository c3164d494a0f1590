"""The documentation's code blocks and doctests run, its links resolve, CI runs its test command.

The code blocks of a page run in order, in one namespace, in a process of their own, in an empty
folder. A block that cannot run has ``<!-- not run: reason -->`` in the line above it. A block of
text that follows one, without words between, is what that one prints.
"""

from __future__ import annotations

import doctest
import importlib
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import fork_server
import public_names
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted(p for p in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")] if p.exists())
OPTIONAL = {"cupy", "jax", "matplotlib", "mpi4py", "numba_cuda", "torch"}

FENCE = re.compile(r"^(?P<indent>[ \t]*)(?P<fence>```+|~~~+)[ \t]*(?P<info>.*?)[ \t]*$")
HEADING = re.compile(r"^#{1,6} +(?P<title>.+?)\s*$")
NOT_RUN = re.compile(r"^<!--\s*not run:\s*(?P<reason>\S.*?)\s*-->$")
LINK = re.compile(r"\]\(\s*<?(?P<target>[^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
INLINE_CODE = re.compile(r"(`+).+?\1")
DOCTEST_OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """A fenced code block: its language, the number of its first line (from 1), and its text."""

    language: str
    line: int
    text: str
    is_run: bool
    output: str | None = None


@dataclass(frozen=True)
class Line:
    """A line outside every block."""

    number: int
    text: str


def _read(page: Path) -> Iterator[Block | Line]:
    """Yield the blocks of a page and the lines between them, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    last_text = ""
    number = 0
    while number < len(lines):
        opening = FENCE.match(lines[number])
        if opening is None:
            last_text = lines[number].strip() or last_text
            yield Line(number + 1, lines[number])
            number += 1
            continue
        start = number = number + 1
        closing = re.compile(rf"^[ \t]*{re.escape(opening['fence'])}[`~]*[ \t]*$")
        while number < len(lines) and not closing.match(lines[number]):
            number += 1
        assert number < len(lines), f"{page.name}, line {start}: the block is never closed"
        info = opening["info"].removeprefix("{code-cell}")  # of a notebook
        language = re.split(r"[\s{,]", info.strip("{ ."), maxsplit=1)[0].lower()
        text = textwrap.dedent("\n".join(lines[start:number]) + "\n")
        yield Block(language, start + 1, text, is_run=not NOT_RUN.match(last_text))
        last_text = ""
        number += 1


def _code_blocks(page: Path) -> list[Block]:
    blocks: list[Block] = []
    is_next = False
    for item in _read(page):
        if isinstance(item, Line):
            is_next = is_next and not item.text.strip()
        elif is_next and item.language == "text":
            blocks[-1] = replace(blocks[-1], output=item.text)
            is_next = False
        elif is_next := item.language in ("python", "py", "pycon", "doctest"):
            blocks.append(item)
    return blocks


def _page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# Runs in the child: argv[1] is the page, standard input the blocks.
RUN_BLOCKS = f"""
import contextlib, doctest, io, json, sys, types, warnings

warnings.simplefilter("error")
page, blocks = sys.argv[1], json.load(sys.stdin)
module = types.ModuleType("__main__")
sys.modules["__main__"] = module
for block in blocks:
    text, line = block["text"], block["line"]
    if text.lstrip().startswith(">>>"):
        test = doctest.DocTestParser().get_doctest(text, {{}}, page, page, line - 1)
        test.globs = module.__dict__
        runner = doctest.DocTestRunner(optionflags={DOCTEST_OPTIONS})
        runner.run(test, clear_globs=False)
        if runner.failures:
            sys.exit(f"{{page}}, line {{line}}: the block prints something else")
    else:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile("\\n" * (line - 1) + text, page, "exec"), module.__dict__)
        want, got = block["output"], printed.getvalue()
        checker = doctest.OutputChecker()
        if want is not None and not checker.check_output(want, got, {DOCTEST_OPTIONS}):
            sys.exit(f"{{page}}, line {{line}}: the block prints\\n{{got}}")
"""


@pytest.mark.parametrize("page", [p for p in PAGES if _code_blocks(p)], ids=_page_name)
def test_code_blocks_run(page: Path, tmp_path: Path) -> None:
    blocks = [asdict(block) for block in _code_blocks(page) if block.is_run]
    if not blocks:
        pytest.skip("every block of this page is marked as not run")
    child = fork_server.run(RUN_BLOCKS, page, stdin=json.dumps(blocks), cwd=tmp_path)
    assert child.returncode == 0, f"{child.stdout}\n{child.stderr}"


# Where modules with doctests lie, and the folder from which they are imported.
MODULES = {
    ROOT / "dvkernels": ROOT,
    ROOT / "docs" / "_extensions": ROOT / "docs" / "_extensions",
    ROOT / "tests" / "doubles": ROOT / "tests" / "doubles",
    ROOT / "tests" / "model_checker": ROOT / "tests",
    ROOT / "asv_benchmarks" / "peers": ROOT / "asv_benchmarks",
}


def _modules_with_doctests() -> list[str]:
    names = []
    for folder, base in MODULES.items():
        for path in sorted(folder.rglob("*.py")):
            if path.name == "__main__.py" or ">>> " not in path.read_text(encoding="utf-8"):
                continue
            parts = path.relative_to(base).with_suffix("").parts
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


@pytest.mark.parametrize("name", _modules_with_doctests())
def test_docstrings_run(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")
    if module.__file__ and "jax:cpu" in Path(module.__file__).read_text(encoding="utf-8"):
        pytest.importorskip("jax")
    result = doctest.testmod(module, optionflags=DOCTEST_OPTIONS)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples failed, see above"


@pytest.mark.parametrize("page", PAGES, ids=_page_name)
def test_links_resolve(page: Path) -> None:
    broken = []
    for item in _read(page):
        if isinstance(item, Block):
            continue
        for link in LINK.finditer(INLINE_CODE.sub("", item.text)):
            target = link["target"].split("#")[0]
            if not target or re.match(r"[a-z][a-z0-9+.-]*:", target, re.IGNORECASE):
                continue
            if not (page.parent / target).exists():
                broken.append(f"line {item.number}: {link['target']}")
    assert not broken, "\n".join(broken)


def test_the_reference_lists_every_public_name_once() -> None:
    entry = re.compile(r"^ +~(dvkernels\.[\w.]+)$", re.MULTILINE)
    pages = (ROOT / "docs" / "reference").glob("*.md")
    listed = [name for page in pages for name in entry.findall(page.read_text("utf-8"))]
    assert sorted(listed) == sorted(public_names.public_names())


@pytest.mark.parametrize("folder", ["tutorials", "how-to", "explanation", "reference"])
def test_every_page_is_in_the_list_and_the_contents_of_its_folder(folder: str) -> None:
    pages = [page.stem for page in (ROOT / "docs" / folder).glob("*.md") if page.stem != "index"]
    index = (ROOT / "docs" / folder / "index.md").read_text("utf-8")
    listed, _, contents = index.partition("{toctree}")
    assert [name for name in pages if f"({name}.md)" not in listed] == []
    assert sorted(contents.split()[1:-1]) == sorted(pages)


def _test_command() -> str:
    """Return the first bash block below a README heading that contains the word test."""
    is_below = False
    for item in _read(ROOT / "README.md"):
        if isinstance(item, Block):
            if is_below and item.language == "bash":
                return item.text.strip()
        elif heading := HEADING.match(item.text):
            is_below = is_below or "test" in heading["title"].lower()
    pytest.fail("README.md has no bash block below a heading with the word test", pytrace=False)


def test_ci_runs_the_readme_s_test_command() -> None:
    command = _test_command()
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8"), command
