"""The house stands as docs/explanation/architecture.md draws it.

Imports are read from the syntax tree of every module, those inside functions and under
``TYPE_CHECKING`` included, and so are strings that spell a module's full name (registry tables).
"""

from __future__ import annotations

import ast
import functools
import graphlib
import json
import math
import os
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOUSE = ROOT / "dvkernels"

# A room imports only from lower rows. In row 1 each file may also import those to its left.
ROWS = (
    (
        "_version",
        "tracebacks",
        "errors",
        "user_errors",
        "html_table",
        "deadlines",
        "thread_frames",
        "enumeration",
        "custom_reduction",
        "reduce_op",
        "philox",
        "pickling",
    ),
    ("schedules", "cluster", "pytree", "threads"),
    ("profiler",),
    ("devices",),
    ("kernels",),
    ("replicas",),
    ("communicators",),
    ("values",),
    ("context",),
    ("verbs",),
    ("replica_context",),
    ("variables",),
    ("data",),
    ("checkpoint", "optimizers"),
    ("strategies",),
    ("benchmarks", "coordinator", "launcher"),
    ("cli", "testing", "__main__"),
)
ROW = {room: number for number, rooms in enumerate(ROWS, start=1) for room in rooms}
TOP_ROW = len(ROWS)
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
# What the public names of dvkernels must not load.
HEAVY = {
    "cupy",
    "jax",
    "jinja2",
    "matplotlib",
    "mpi4py",
    "numba",
    "plotly",
    "rich",
    "sklearn",
    "threadpoolctl",
    "torch",
}
# What may be missing altogether.
OPTIONAL = (HEAVY - {"numba"}) | {"cuda", "nccl", "numba_cuda", "psutil"}
IMPORT_SECONDS_OVER_NUMPY = 0.15


@dataclass(frozen=True)
class Import:
    """One import of ``target`` (a module's full name) by ``module``."""

    module: str
    line: int
    target: str
    name: str | None = None  # what is taken out of the target; None for the module itself

    def __str__(self) -> str:
        taken = f", taking {self.name}" if self.name else ""
        return f"{self.module}, line {self.line}: imports {self.target}{taken}"


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def _paths() -> dict[str, Path]:
    return {_module_name(path): path for path in sorted(HOUSE.rglob("*.py"))}


@functools.cache
def _tree(module: str) -> ast.Module:
    path = _paths()[module]
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _is_door(module: str) -> bool:
    return module in _paths() and _paths()[module].name == "__init__.py"


def _room(module: str) -> str:
    """Return the room of a module of the house: its second name, or "" for the front door."""
    return [*module.split("."), ""][1]


def _absolute(module: str, node: ast.ImportFrom) -> str:
    """Return the full name of what ``from ... import`` imports from."""
    if node.level == 0:
        return node.module or ""
    package = module.split(".") if _is_door(module) else module.split(".")[:-1]
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def _imports(module: str) -> Iterator[Import]:
    """Yield every import of ``module``, of the house and of others."""
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            source = _absolute(module, node)
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                if inner in _paths():
                    yield Import(module, node.lineno, inner)
                else:
                    yield Import(module, node.lineno, source, alias.name)
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value in _paths()
            and "." in node.value
        ):
            yield Import(module, node.lineno, node.value)


@functools.cache
def _all_imports() -> tuple[Import, ...]:
    return tuple(found for module in _paths() for found in _imports(module))


def _inner_imports() -> list[Import]:
    return [found for found in _all_imports() if found.target.split(".")[0] == "dvkernels"]


def _explain(broken: list[Import]) -> str:
    return "\n".join(str(found) for found in broken)


def _may_import(importer: str, imported: str) -> bool:
    """Say whether the room ``importer`` may import the room ``imported``."""
    if importer in ("", imported) or ROW[importer] == TOP_ROW:
        return True
    if imported == "":
        return False
    if ROW[importer] == ROW[imported] == 1:
        return ROWS[0].index(importer) > ROWS[0].index(imported)
    return ROW[importer] > ROW[imported]


def test_every_room_has_a_row() -> None:
    unknown = {_room(module) for module in _paths()} - set(ROW) - {""}
    assert not unknown, f"give these rooms a row, here and on the architecture page: {unknown}"


def test_imports_go_down() -> None:
    broken = [
        found
        for found in _inner_imports()
        if not _may_import(_room(found.module), _room(found.target))
    ]
    assert not broken, f"a room imports only from lower rows:\n{_explain(broken)}"


def test_no_circles() -> None:
    graph: dict[str, set[str]] = {module: set() for module in _paths()}
    for found in _inner_imports():
        if found.target in graph and found.target != found.module:
            graph[found.module].add(found.target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("modules import each other: " + " <- ".join(error.args[1]), pytrace=False)


def test_modules_are_imported_not_doors() -> None:
    def is_allowed(found: Import) -> bool:
        if not _is_door(found.target) or _room(found.module) in ROWS[-1]:
            return True
        if found.module == "dvkernels.kernels.backends":  # the one table that imports the twins
            return True
        # The benchmarks measure what a user calls.
        if found.module.startswith("dvkernels.benchmarks.") and found.target == "dvkernels.kernels":
            return True
        # A door may open onto the doors of the rooms inside it.
        return _is_door(found.module) and found.target.startswith(f"{found.module}.")

    broken = [found for found in _inner_imports() if not is_allowed(found)]
    assert not broken, f"inside the house, import the module, not its package:\n{_explain(broken)}"


def test_private_names_stay_in_their_file() -> None:
    broken = [
        found
        for found in _inner_imports()
        if found.name and found.name.startswith("_") and not found.name.endswith("__")
    ]
    assert not broken, f"a leading underscore belongs to its file:\n{_explain(broken)}"


def test_schedules_need_only_the_standard_library() -> None:
    broken = [
        found
        for found in _all_imports()
        if _room(found.module) == "schedules"
        and found.target.split(".")[0] not in sys.stdlib_module_names
        and _room(found.target) not in ("schedules", "errors")
    ]
    assert not broken, _explain(broken)


def _may_touch_numba_cuda(module: str) -> bool:
    return module == "dvkernels.devices.cuda" or f"{module}.".startswith("dvkernels.kernels.cuda.")


def _touches_numba_cuda(module: str) -> bool:
    for found in _imports(module):
        taken = f"{found.target}.{found.name}" if found.name else found.target
        if f"{taken}.".startswith(("numba.cuda.", "numba_cuda.")):
            return True
    return any(
        isinstance(node, ast.Attribute)
        and node.attr == "cuda"
        and isinstance(node.value, ast.Name)
        and node.value.id in ("numba", "nb")
        for node in ast.walk(_tree(module))
    )


def test_numba_cuda_stays_in_two_places() -> None:
    broken = [
        module
        for module in _paths()
        if not _may_touch_numba_cuda(module) and _touches_numba_cuda(module)
    ]
    assert not broken, f"only kernels/cuda/ and devices/cuda.py touch numba.cuda: {broken}"


def test_one_module_of_the_cuda_half_builds_llvm() -> None:
    """All others say PTX: numba-cuda's successor has no llvmlite."""
    found = {found.module for found in _all_imports() if found.target.split(".")[0] == "llvmlite"}
    broken = {module for module in found if module.startswith("dvkernels.kernels.cuda.")}
    assert broken == {"dvkernels.kernels.cuda.engine.inline_ptx"}
    assert "dvkernels.kernels.arithmetic" not in found  # imported before the first call on a GPU


def test_optree_stays_in_one_place() -> None:
    broken = {found.module for found in _all_imports() if found.target.split(".")[0] == "optree"}
    assert broken == {"dvkernels.pytree"}, "take flatten, map_leaves and others from pytree.py"


def test_files_are_named_for_what_they_hold() -> None:
    broken = [m for m in _paths() if FORBIDDEN_NAMES & set(m.split("."))]
    assert not broken


# Where a module stands, to the reader of a folder: in the folder, or for a file at the top itself.
def test_files_are_short() -> None:
    # Of kernels/__init__.py two thirds are the docstrings of what it defines for users.
    limits = {"kernels/__init__.py": 440}
    too_long = {
        (name, lines)
        for path in _paths().values()
        for name in [path.relative_to(HOUSE).as_posix()]
        for lines in [len(path.read_text(encoding="utf-8").splitlines())]
        if lines > limits.get(name, 400 if name.startswith("kernels/") else 350)
    }
    assert not too_long


def _place(module: str) -> str:
    return _folder(module) or _room(module)


def _folder(module: str) -> str:
    """Return the folder of a module, without the package's name; "" at the top."""
    parts = _paths()[module].relative_to(HOUSE).parts[:-1]
    return ".".join(parts)


def _folders() -> list[str]:
    return sorted({_folder(module) for module in _paths()} - {""})


def _is_within(place: str, folder: str) -> bool:
    return f"{place}.".startswith(f"{folder}.")


def _imported_by(folder: str) -> set[str]:
    """Return what a folder imports: rooms, or for a folder inside a room, folders."""
    places = {
        _place(found.target)
        for found in _inner_imports()
        if found.target in _paths()
        and _is_within(_folder(found.module), folder)
        and not _is_within(_place(found.target), folder)
    }
    return {place if "." in folder else place.split(".")[0] for place in places} - {"", "_version"}


@pytest.mark.parametrize("folder", _folders())
def test_a_folder_says_what_lives_there_and_what_it_imports(folder: str) -> None:
    text = ast.get_docstring(_tree(f"dvkernels.{folder}")) or ""
    sentence, *_ = text.split("\n\n")
    assert sentence.endswith(".")
    assert "\n" not in sentence, "one sentence, on one line"
    _, _, listed = text.replace("\n", " ").rpartition("Imports: ")
    said = set(listed.removesuffix(".").split(", ")) - {"nothing"}
    assert said == _imported_by(folder), f"{folder}/__init__.py: correct its line 'Imports:'"


# Classes of one name that mean the same thing, and why they are two.
SAME_NAME = {
    "Item": "arrays of one shape in a job: of the CPU engine, and of its twin for CUDA",
    "Workspace": "arrays of a step of the digits network: on the host, and in its twin for GPUs",
}


def test_a_class_name_means_one_thing() -> None:
    places: dict[str, list[str]] = {}
    for module in _paths():
        for node in ast.walk(_tree(module)):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name.lstrip("_"), []).append(f"{module}:{node.lineno}")
    shared = {name: found for name, found in places.items() if len(found) > 1}
    assert shared.keys() == SAME_NAME.keys(), shared


# Modules of one name in two rooms. The twins of ``kernels/`` are meant to be compared; the others
# are the same kind of thing for another room.
SHARED_MODULE_NAMES = {
    "base": "what a strategy, a communicator, a device is",
    "registry": "one visible table of names each, of devices and of communicators",
    "checks": "the checks at the doors of kernels and of datasets",
    "ring": "the schedule, its kernels, and the ring of hosts that follows it",
    "transport": "two transports of one protocol: shared memory and MPI",
    "group": "workers of a job, GPUs of a process, and threads inside compiled code",
    "dataset": "a dataset, and a distributed one",
    "gradients": "those of an optimizer's step, and the benchmark of that",
    "checkpoint": "the room's class, and the verb of the command line",
    "worker": "a worker of a job; also by its earlier name, in the command line",
}


def test_a_module_name_is_found_once() -> None:
    places: dict[str, set[str]] = {}
    for module, path in _paths().items():
        if path.name != "__init__.py":
            folder = _folder(module).replace("kernels.cuda", "kernels.cpu")  # twins
            places.setdefault(path.stem, set()).add(folder)
    shared = {name for name, found in places.items() if len(found) > 1}
    assert shared == SHARED_MODULE_NAMES.keys()


def _sentence(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split("\n\n")[0]


def _drawn(folder: Path, depth: int = 0) -> Iterator[str]:
    """Yield the lines that draw a folder: its sentence, its modules, the folders inside it."""
    indent = "  " * depth
    yield f"{indent}{folder.name + '/':<{20 - 2 * depth}} {_sentence(folder / '__init__.py')}"
    modules = " ".join(sorted(path.stem for path in folder.glob("*.py") if path.stem[0] != "_"))
    yield from textwrap.wrap(
        modules, 94, initial_indent=f"{indent}    ", subsequent_indent=f"{indent}    "
    )
    for inner in sorted(path.parent for path in folder.glob("*/__init__.py")):
        yield from _drawn(inner, depth + 1)


def _house() -> str:
    lines = [
        f"{path.name:<20} {' '.join(_sentence(path).split())}"
        for path in sorted(HOUSE.glob("*.py"))
        if path.stem[0] != "_"
    ]
    for room in sorted(path.parent for path in HOUSE.glob("*/__init__.py")):
        lines += ["", *_drawn(room)]
    return "\n".join(lines)


def _rows() -> str:
    return "\n".join(
        f"{number:>2}  {'  '.join(room for room in rooms if room[0] != '_')}"
        for number, rooms in reversed(list(enumerate(ROWS, start=1)))
    )


@pytest.mark.parametrize("drawing", [_house, _rows], ids=["the tree", "the rows"])
def test_the_architecture_page_shows_the_house_as_it_is(drawing) -> None:
    page = (ROOT / "docs" / "explanation" / "architecture.md").read_text("utf-8")
    assert drawing() in page, f"put this on the page:\n{drawing()}"


# What a module may do while it is imported, beyond defining names.
IMPORT_EFFECTS = {
    "atexit.register",
    "install_default",
    "register_account",
    "register_at_fork",
    "register_section",
}


def _import_effects(module: str) -> set[str]:
    """Return the effects of importing a module: calls outside of functions and classes."""
    found = set()
    pending: list[ast.AST] = [_tree(module)]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            pending += node.decorator_list
            continue
        name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        found |= {effect for effect in IMPORT_EFFECTS if f".{name}".endswith(f".{effect}")}
        pending += ast.iter_child_nodes(node)
    return found


def test_the_effects_of_imports_are_those_listed() -> None:
    page = (ROOT / "docs/explanation/architecture.md").read_text(encoding="utf-8")
    listed = {
        (file, effect)
        for row in page.splitlines()
        if row.startswith("| `") and row.split("`")[3:4]
        for file, effect in [(row.split("`")[1], row.split("`")[3])]
        if effect in IMPORT_EFFECTS
    }
    modules = [module for module in _paths() if module.startswith("dvkernels.")]
    assert listed == {
        (_paths()[module].relative_to(HOUSE).as_posix(), effect)
        for module in modules
        for effect in _import_effects(module)
    }


def _run_child(code: str, cwd: Path) -> str:
    """Run ``code`` in a fresh interpreter that finds this checkout, and return what it prints."""
    search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Users' imports find byte code, so those that are measured do, too.
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    child = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**environ, "PYTHONPATH": search_path},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return child.stdout


IMPORT_AND_MEASURE = """
import json, sys, time
begin = time.perf_counter()
import numpy
start = time.perf_counter()
import dvkernels
dvkernels.Strategy  # and with it all public names
seconds, numpy_seconds = time.perf_counter() - start, start - begin
loaded = sorted({m.split(".")[0] for m in sys.modules})
print(json.dumps({"seconds": seconds, "numpy_seconds": numpy_seconds, "loaded": loaded}))
"""


def test_the_public_names_are_those_that_type_checkers_see() -> None:
    import dvkernels

    block = next(node for node in _tree("dvkernels").body if isinstance(node, ast.If))
    typed = {
        alias.name: _absolute("dvkernels", node)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    rooms = {name: "dvkernels" for name in dvkernels._ROOMS}
    assert typed == {**rooms, **dvkernels._TOGETHER, **dvkernels._ALONE}
    assert {*typed, "__version__"} == set(dvkernels.__all__) <= set(dir(dvkernels))
    for name in typed:
        assert getattr(dvkernels, name) is vars(dvkernels)[name]
    with pytest.raises(AttributeError, match="no attribute 'variable'"):
        dvkernels.variable  # noqa: B018


def test_import_is_light(tmp_path: Path) -> None:
    _run_child(IMPORT_AND_MEASURE, tmp_path)  # compiles the bytecode, fills the page cache
    seconds = math.inf
    for _ in range(20):  # what it costs when nothing else runs: a neighbour may be busy for a while
        run = json.loads(_run_child(IMPORT_AND_MEASURE, tmp_path))
        loaded = HEAVY.intersection(run["loaded"])
        assert not loaded, f"`import dvkernels` loads {sorted(loaded)}"
        seconds = min(seconds, run["seconds"])
        # It takes about as long as NumPy's own import; a machine that is slow now is so for both.
        if seconds <= max(IMPORT_SECONDS_OVER_NUMPY, 2 * run["numpy_seconds"]):
            return
    pytest.fail(f"`import dvkernels` takes {seconds:.3f} s")


WITHOUT_OPTIONAL = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in OPTIONAL:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None

sys.meta_path.insert(0, Missing())
import numpy as np
import dvkernels as dv

with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
    def add():
        context = dv.get_replica_context()
        return context.all_reduce("sum", np.full(3, context.replica_id_in_sync_group + 1.0))

    results = strategy.local_results(strategy.run(add))
assert [r.tolist() for r in results] == [[3.0] * 3] * 2, results
dv.list_devices()
"""


def test_works_without_optional_packages(tmp_path: Path) -> None:
    _run_child(f"OPTIONAL = {sorted(OPTIONAL)!r}\n{WITHOUT_OPTIONAL}", tmp_path)


def test_version_is_that_of_the_package() -> None:
    import dvkernels

    with (ROOT / "pyproject.toml").open("rb") as file:
        assert dvkernels.__version__ == tomllib.load(file)["project"]["version"]
