"""What the machine offers, at the start of the run; leaks are errors, after each test."""

from __future__ import annotations

import faulthandler
import gc
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# Replica threads end with their strategy. The kernels' threads ("dvkernels-kernel") serve the
# whole process and stay.
REPLICA_THREAD_PREFIX = "dvkernels-replica"
SECONDS_TO_END = 5.0
SECONDS_TO_END_ALONE = 0.2
MOST_WORKERS = 4  # of about 1 GB of memory each

_failed = pytest.StashKey[bool]()

# A job in the background, or under nohup, is started with signals ignored, and its children would
# inherit that: tests send them some.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
for ignored in {"SIGHUP", "SIGTERM", "SIGUSR1"} & set(dir(signal)):
    if signal.getsignal(getattr(signal, ignored)) is signal.SIG_IGN:
        signal.signal(getattr(signal, ignored), signal.SIG_DFL)


# Hundreds of processes that tests start would each compile the package's sources anew.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Whichever test starts JAX first, it makes this many CPU devices.
_DEVICES = "--xla_force_host_platform_device_count=8"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()

# An example may wait for a core that other tests use.
if importlib.util.find_spec("hypothesis") is not None:
    import hypothesis

    hypothesis.settings.register_profile("without deadlines", deadline=None)
    hypothesis.settings.load_profile("without deadlines")


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _threading_layer() -> str:
    """Describe which threading layers Numba has, and which one the environment selects."""
    spec = importlib.util.find_spec("numba")
    if spec is None or spec.origin is None:
        return "none"
    folder = Path(spec.origin).parent / "np" / "ufunc"
    built = [
        layer
        for layer, stem in (("tbb", "tbbpool"), ("omp", "omppool"), ("workqueue", "workqueue"))
        if any(folder.glob(f"{stem}.*"))
    ]
    chosen = os.environ.get("NUMBA_THREADING_LAYER", "default")
    return f"{chosen} (built: {' '.join(built)})"


def _driver() -> str:
    version = Path("/proc/driver/nvidia/version")
    if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
        return "simulator"
    return version.read_text().splitlines()[0] if version.exists() else "absent"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _header() -> str:
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    launcher = shutil.which("mpiexec", path=beside)
    return (
        f"python {platform.python_version()}, numpy {_version('numpy')}, "
        f"numba {_version('numba')}, threading layer {_threading_layer()}, cores {_cores()}\n"
        f"cuda driver {_driver()}, numba-cuda {_version('numba-cuda')}, "
        f"mpi4py {_version('mpi4py')}, mpiexec {'present' if launcher else 'absent'}, "
        f"jax {_version('jax')}"
    )


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads its options
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Spread a run of all tests over the cores, where pytest-xdist is installed; -n 0 does not."""
    option = config.option
    is_alone = any(word in option.markexpr for word in ("mpi", "gpu"))  # they use all cores
    if (
        getattr(option, "numprocesses", 0) is None
        and config.args_source is pytest.Config.ArgsSource.TESTPATHS
        and not (is_alone or option.usepdb or "PYTEST_XDIST_WORKER" in os.environ)
    ):
        # One more than cores: many tests wait for processes that they end. It takes a fifth less.
        option.numprocesses = min(_cores() + 1, MOST_WORKERS)
        option.dist = "worksteal"


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    # Not pytest_report_header: that is silent under -q.
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.write_line(_header())


def pytest_collection_finish(session: pytest.Session) -> None:
    """Exempt modules and tests, most of all objects, from later collections of garbage."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    # Workers of pytest-xdist send reports as UTF-8, and some tests print lone surrogates.
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    if report.failed:
        item.stash[_failed] = True
    return report


def _replica_threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith(REPLICA_THREAD_PREFIX)}


def _end_strategy_left_set() -> str | None:
    """Reset a strategy that a test left set; return its description."""
    dv = sys.modules.get("dvkernels")
    if not getattr(dv, "has_strategy", bool)():
        return None
    left = repr(dv.get_strategy())
    try:
        dv.set_strategy(None)
    except dv.errors.ContextError:
        return f"a scope was entered and never left: {left}"
    return f"set_strategy(...) was not undone with set_strategy(None): {left}"


def _alive_after(seconds: float, threads: set[threading.Thread]) -> set[threading.Thread]:
    """Return the threads still alive after a timeout; empty as soon as all have ended."""
    deadline = time.monotonic() + seconds
    while threads and time.monotonic() < deadline:
        time.sleep(0.001)
        threads = {thread for thread in threads if thread.is_alive()}
    return threads


@pytest.fixture(autouse=True)
def leave_nothing_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves replica threads or a strategy behind."""
    if request.node.get_closest_marker("slow") is not None:
        faulthandler.cancel_dump_traceback_later()  # that would end pytest
    before = _replica_threads()
    yield
    left = _end_strategy_left_set()
    if request.node.stash.get(_failed, False):
        return  # the traceback keeps the test's strategies alive; one failure is enough
    # Those of a failed step end by themselves; a collection takes half a second, so it comes last.
    leaked = _alive_after(SECONDS_TO_END_ALONE, _replica_threads() - before)
    if leaked:
        gc.collect()
        leaked = _alive_after(SECONDS_TO_END, leaked)
    if left:
        pytest.fail(left, pytrace=False)
    if leaked:
        names = ", ".join(sorted(thread.name for thread in leaked))
        pytest.fail(f"replica threads outlived their strategy: {names}", pytrace=False)
