"""Sections of the first run on a real GPU; gpu_first_run.sh calls each in a process of its own.

    python gpu_first_run.py SECTION [--part FILE] [--slice k/n]     runs one, writes its JSON
    python gpu_first_run.py merge PARTS OUT                         results.json, summary.txt
    python gpu_first_run.py prebuild DIR                            without a GPU: cubins for sm_90

DVK_DRY=1 (with NUMBA_ENABLE_CUDASIM=1) runs the same code in Numba's simulator on tiny arrays: it
says that the code is whole; its times mean nothing. DVK_PREBUILT=DIR takes kernels from there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(os.environ.get("DVK_ROOT", Path(__file__).resolve().parents[3]))
DRY = os.environ.get("DVK_DRY") == "1"
SECTIONS = {}


def section(function):
    SECTIONS[function.__name__] = function
    return function


# ---------------------------------------------------------------- what every section needs


def prepare():
    """Let dvkernels be imported from the checkout, with prebuilt machine code if there is some."""
    sys.path.insert(0, str(ROOT))
    if os.environ.get("DVK_PREBUILT"):
        use_prebuilt(Path(os.environ["DVK_PREBUILT"]))


def driver():
    from dvkernels.devices import driver as module

    return module.find()


class Gpu:
    """CuPy's arrays, events and graphs; in a dry run, the simulator's arrays and a clock."""

    def __init__(self):
        import numpy as np

        self.np = np
        if not DRY:
            import cupy

            self.cp = cupy

    def array(self, host):
        if DRY:
            from dvkernels.devices import cuda

            made = cuda.arrays().empty(0, host.shape, host.dtype)
            cuda.arrays().copy(made, host)
            return made
        made = self.cp.empty(host.shape, host.dtype)
        made.set(host)
        return made

    def host(self, array):
        return array.get()

    def empty(self, count, dtype):
        return self.array(self.np.zeros(count, dtype)) if DRY else self.cp.empty(count, dtype)

    def random(self, count, dtype, seed):
        """Return normal numbers, made on the GPU: bfloat16 by cutting float32."""
        if DRY:
            rng = self.np.random.default_rng(seed)
            return self.array(rng.standard_normal(count).astype(dtype))
        cp = self.cp
        real = cp.random.default_rng(seed).standard_normal(count, dtype=cp.float32)
        if self.np.dtype(dtype).name != "bfloat16":
            return real.astype(dtype, copy=False)
        short = (real.view(cp.uint32) >> 16).astype(cp.uint16)
        return cp.ndarray(short.shape, dtype, memptr=short.data)

    def sync(self):
        if not DRY:
            self.cp.cuda.Device().synchronize()

    def seconds(self, call, calls):
        """Return the GPU's seconds of one of so many calls on the current stream."""
        if DRY:
            began = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - began) / calls
        begin, end = self.cp.cuda.Event(), self.cp.cuda.Event()
        call()
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return self.cp.cuda.get_elapsed_time(begin, end) * 1e-3 / calls

    def copy(self, target, source):
        if DRY:
            target._ary[...] = source._ary
            return
        runtime = self.cp.cuda.runtime
        stream = self.cp.cuda.get_current_stream().ptr
        runtime.memcpyAsync(
            target.data.ptr, source.data.ptr, target.nbytes, runtime.memcpyDeviceToDevice, stream
        )

    def graph(self, call, times):
        """Return what replays a graph of so many calls, and waits for it not."""
        if DRY:
            return lambda: [call() for _ in range(times)]
        stream = self.cp.cuda.Stream(non_blocking=True)
        self.sync()
        with stream:
            stream.begin_capture()
            for _ in range(times):
                call()
            graph = stream.end_capture()
        self.keep = getattr(self, "keep", [])
        self.keep.append(stream)

        def replay():
            graph.launch()

        replay.stream = stream
        return replay


def contest(gpu, contestants, calls, rounds):
    """Return the median seconds of each, measured in turn, and the spread of its quartiles."""
    found = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            found[name].append(gpu.seconds(call, calls))
    out = {}
    for name, each in found.items():
        each.sort()
        low, high = each[len(each) // 4], each[-1 - len(each) // 4]
        out[name] = {"us": 1e6 * statistics.median(each), "low": 1e6 * low, "high": 1e6 * high}
    return out


# ---------------------------------------------------------------- other machine code


@contextlib.contextmanager
def variant(ptx):
    """Load kernels with their PTX changed; it is that which ships, if that is current."""
    from dvkernels.kernels.cuda.engine import fast_path, launcher, shipped_ptx

    find = shipped_ptx.find

    def changed(kernel, capability):
        image = find(kernel, capability)
        if image is None:
            from dvkernels.kernels.cuda.engine import compiler

            image = compiler.compile_to_ptx(kernel, capability).ptx.encode()
        return ptx(image.decode()).encode()

    def forget():
        launcher._handles.clear()
        launcher._num_resident.clear()
        fast_path._launches.clear()

    shipped_ptx.find = changed
    forget()
    try:
        yield
    finally:
        shipped_ptx.find = find
        forget()


def without_bounds(ptx):
    """Return PTX without launch bounds."""
    return re.sub(r"\.maxntid .*\n|\.minnctapersm .*\n", "", ptx)


def with_blocks(count):
    """Return the change of PTX to launch bounds of that many blocks a multiprocessor."""
    return lambda ptx: re.sub(r"(\.minnctapersm) \d+", rf"\1 {count}", ptx)


def catalogue():
    """Return the kernels of the library by name, those of a user's own left out."""
    sys.path.insert(0, str(ROOT / "tests" / "compile"))
    import catalogue as module

    module.CUSTOM = {}
    return module.kernels()


def slug(name):
    return re.sub(r"\W+", "_", name)


def use_prebuilt(folder):
    """Take the machine code of kernels from files that ``prebuild`` has made."""
    from dvkernels.kernels.cuda.engine import shipped_ptx

    find = shipped_ptx.find

    def read(kernel, capability):
        image = folder / f"{slug(str(kernel.name))}.cubin"
        is_there = tuple(capability) == (9, 0) and image.exists()
        return image.read_bytes() if is_there else find(kernel, capability)

    shipped_ptx.find = read


def prebuild(folder):
    prepare()
    from dvkernels.kernels.cuda.engine import compiler

    folder.mkdir(parents=True, exist_ok=True)
    for name, kernel in catalogue().items():
        compiled = compiler.compile_to_ptx(kernel, (9, 0))
        (folder / f"{slug(name)}.cubin").write_bytes(compiler.assemble(compiled, (9, 0)))
        print(name, flush=True)


def attributes(kernel, device=0):
    """Return registers, local and shared bytes of a loaded kernel, and its blocks a processor."""
    if DRY:
        return {}
    import ctypes

    from dvkernels.kernels.cuda.engine import launcher

    handle = ctypes.c_void_p(launcher.prepare(kernel, device))
    library = driver().library
    driver().enter(device)
    found = {}
    for name, number in (("shared", 1), ("local", 3), ("registers", 4)):
        value = ctypes.c_int()
        library.cuFuncGetAttribute(ctypes.byref(value), number, handle)
        found[name] = value.value
    value = ctypes.c_int()
    library.cuOccupancyMaxActiveBlocksPerMultiprocessor(
        ctypes.byref(value), handle, 256, ctypes.c_size_t(0)
    )
    found["blocks_per_multiprocessor"] = value.value
    return found


# ---------------------------------------------------------------- sections


def said(*command, seconds=20):
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (ended.stdout + ended.stderr).strip()[-2000:]


@section
def env(data, _):
    from importlib import metadata

    names = (
        "numpy numba numba-cuda llvmlite cupy-cuda13x cuda-bindings cuda-core cuda-pathfinder "
        "cuda-toolkit nvidia-nvvm nvidia-nvjitlink nvidia-nccl-cu13 torch jax mpi4py optree "
        "xxhash ml-dtypes pytest pytest-xdist hypothesis"
    )
    data["python"] = sys.version
    data["packages"] = {}
    for name in names.split():
        try:
            data["packages"][name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            data["packages"][name] = None
    data["cores"] = len(os.sched_getaffinity(0))
    data["platform"] = platform.platform()
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,memory.total,ecc.mode.current"
    data["nvidia_smi"] = said("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    data["nvcc"] = said("nvcc", "--version")[-200:]
    data["variables"] = {
        key: value for key, value in os.environ.items() if key.startswith(("CUDA", "NVIDIA", "LD_"))
    }
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        for name in ("nvvm", "nvJitLink", "nvrtc", "cudart"):
            try:
                data[f"lib{name}"] = load_nvidia_dynamic_lib(name).abs_path
            except Exception as error:
                data[f"lib{name}"] = f"{type(error).__name__}: {error}"[:300]
    except ImportError as error:
        data["pathfinder"] = str(error)
    # Does numba-cuda load beside this NumPy, where the package does not help it?
    code = (
        "import numpy, numba.cuda as c, numba.types as t; "
        "c.compile_ptx(lambda x: None, t.void(t.int64), cc=(9, 0)); print('compiles', c.__file__)"
    )
    hidden = "PYTHONPATH", "NUMBA_ENABLE_CUDASIM"
    bare = {key: value for key, value in os.environ.items() if key not in hidden}
    bare["PYTHONPATH"] = os.environ.get("DVK_SITE", "")
    try:
        ended = subprocess.run(
            [sys.executable, "-c", code], env=bare, capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip
        data["numba_cuda_alone"] = (ended.stdout + ended.stderr).strip()[-300:]
    except subprocess.TimeoutExpired:
        data["numba_cuda_alone"] = "more than 60 s"


@section
def first(data, _):
    """The first call, step by step."""
    began = time.perf_counter()

    def lap(name):
        nonlocal began
        now = time.perf_counter()
        data[f"seconds_{name}"] = round(now - began, 3)
        began = now

    prepare()
    import numpy as np

    gpu = Gpu()
    lap("import_cupy")
    from dvkernels import kernels
    from dvkernels.devices import cuda

    data["missing"] = cuda.missing()
    assert not data["missing"], data["missing"]
    lap("import_dvkernels")
    from dvkernels.kernels import arithmetic
    from dvkernels.kernels.cuda.engine import catalogue, launcher, shipped_ptx

    data["cuda_kernels"] = shipped_ptx.described()
    lap("import_kernels")
    host = [np.arange(1, 1001, dtype="f4") * (k + 1) for k in range(3)]
    buffers = [gpu.array(one) for one in host]
    gpu.sync()
    lap("arrays")
    if not DRY:
        found = driver()
        data["device"] = found.name(0), found.capability(0), found.version()
        kernel = catalogue.collective(arithmetic.ADD, arithmetic.type_code(np.dtype("f4")))
    kernels.all_reduce(buffers)
    gpu.sync()
    lap("first_call")
    kernels.all_reduce([gpu.array(one) for one in host])
    gpu.sync()
    lap("second_call")
    right = np.sum(host, axis=0)
    assert all((gpu.host(one) == right).all() for one in buffers), "a wrong sum"
    if DRY:
        return
    data["loaded_numba"] = "numba" in sys.modules
    image = shipped_ptx.find(kernel, found.capability(0))
    lap("find_shipped")
    if image is not None:
        found.load(0, image, kernel.entry)
        lap("load_shipped_again")
    data["attributes"] = attributes(kernel)
    data["multiprocessors"] = found.num_multiprocessors(0)
    data["resident_blocks"] = launcher.num_resident(kernel, 0)
    save(data)
    try:
        by_numba(data, lap, kernel)
    except Exception as error:  # such as no compiler: what ships needs none
        data["by_numba"] = f"{type(error).__name__}: {error}"[:600]


def by_numba(data, lap, kernel):
    """Compile a kernel here, as that of a custom reduction is, and load it."""
    lap("attributes")
    from dvkernels.kernels.cuda.engine import compiler

    data["numba_cuda_file"] = getattr(importlib.import_module("numba.cuda"), "__file__", "?")
    lap("import_compiler")
    capability = driver().capability(0)
    compiled = compiler.compile_to_ptx(kernel, capability)
    lap("to_ptx")
    data["ptx"] = re.findall(r"^\.(?:version|target) .*$", compiled.ptx, re.M)
    image = compiler.assemble(compiled, capability)
    lap("to_cubin")
    data["cubin_bytes"] = len(image)
    driver().load(0, image, compiled.name)
    lap("load")


def _sum_in_order(gpu, buffers, is_half):
    """Return the bits of the sum, left to right, rounded once."""
    if DRY:
        np = gpu.np
        total = np.float32(0)
        for k, one in enumerate(buffers):
            wide = one._ary.astype("f4")
            total = wide if k == 0 else total + wide
        return total.astype(buffers[0]._ary.dtype).view("u1")
    cp = gpu.cp
    if not is_half:
        total = buffers[0].copy()
        for one in buffers[1:]:
            total += one
        return total.view(cp.uint32)
    total = None
    for one in buffers:
        short = cp.ndarray(one.shape, cp.uint16, memptr=one.data)
        wide = (short.astype(cp.uint32) << 16).view(cp.float32)
        total = wide if total is None else total + wide
    bits = total.view(cp.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(cp.uint16)


def _bits(gpu, array):
    if DRY:
        return array._ary.view("u1")
    size = array.itemsize
    return gpu.cp.ndarray(array.shape, f"u{size}", memptr=array.data)


@section
def bandwidth(data, _):
    """Of the copy: all-reduce of 2, 4, 8 buffers, float32 and bfloat16; then what else may help."""
    prepare()
    import ml_dtypes
    import numpy as np

    gpu = Gpu()
    from dvkernels import kernels
    from dvkernels.kernels import arithmetic
    from dvkernels.kernels.cuda import optimizers
    from dvkernels.kernels.cuda.engine import catalogue, fast_path, job

    nbytes = 1 << 12 if DRY else 256 << 20
    calls, rounds = (1, 1) if DRY else (20, 7)
    source, target = gpu.empty(nbytes, "u1"), gpu.empty(nbytes, "u1")
    copy = lambda: gpu.copy(target, source)  # noqa: E731
    lines = data["all_reduce"] = []
    figures = {}
    for dtype in (np.dtype("f4"), np.dtype(ml_dtypes.bfloat16)):
        buffers = [gpu.random(nbytes // dtype.itemsize, dtype, seed) for seed in range(8)]
        figures[dtype.name] = buffers
        for count in (2, 4, 8):
            used = buffers[:count]
            right = _sum_in_order(gpu, used, dtype.itemsize == 2)
            kernels.all_reduce(used)
            wrong = sum(int((_bits(gpu, one) != right).sum()) for one in used)
            for seed, one in enumerate(used):
                gpu.copy(one, gpu.random(nbytes // dtype.itemsize, dtype, seed))
            del right
            times = contest(
                gpu,
                {"ours": lambda: kernels.all_reduce(used, "mean"), "copy": copy},  # noqa: B023
                calls, rounds,
            )  # fmt: skip
            part = (2 * count * nbytes / times["ours"]["us"]) / (2 * nbytes / times["copy"]["us"])
            lines.append(
                {"dtype": dtype.name, "replicas": count, "wrong": wrong, "of_copy": round(part, 3),
                 "tb_per_s": round(2 * count * nbytes / times["ours"]["us"] * 1e-6, 3), **times}
            )  # fmt: skip
        kernel = catalogue.collective(arithmetic.ADD, arithmetic.type_code(dtype))
        data[f"attributes_{dtype.name}"] = attributes(kernel)
    save(data)

    def of_copy(used, rounds=3):
        times = contest(
            gpu, {"ours": lambda: kernels.all_reduce(used, "mean"), "copy": copy},
            1 if DRY else 10, 1 if DRY else rounds,
        )  # fmt: skip
        return round(len(used) * times["copy"]["us"] / times["ours"]["us"], 3)

    # How many blocks, in multiples of those that run at once.
    tried = data["waves"] = {}
    kept = job._WAVES
    for waves in (1, 2, 3, 4, 8, 16, 42):
        job._WAVES = waves
        fast_path._launches.clear()
        tried[waves] = {
            f"{name} x{count}": of_copy(figures[name][:count])
            for name in figures
            for count in (2, 8)
        }
    job._WAVES = kept
    fast_path._launches.clear()
    save(data)

    # By size: with fewer pieces of 16 KiB than half the blocks that run at once (198, 3.1 MiB) a
    # thread takes one vector.
    tried = data["by_size_mib"] = {}
    for mib in () if DRY else (1, 2, 3, 4, 8, 16, 32, 64):
        short = mib << 20
        near = lambda: gpu.copy(target[:short], source[:short])  # noqa: E731, B023
        tried[mib] = {}
        for count in (2, 8):
            used = [one[: short // 4] for one in figures["float32"][:count]]
            call = lambda: kernels.all_reduce(used, "mean")  # noqa: E731, B023
            times = contest(gpu, {"ours": call, "copy": near}, 20, 3)
            part = count * times["copy"]["us"] / times["ours"]["us"]
            tried[mib][f"x{count}"] = round(times["ours"]["us"], 1), round(part, 3)
    save(data)

    # Other machine code of the same kernel: launch bounds for other numbers of blocks, or none (the
    # linker ignores -maxrregcount where there are bounds), and hints for the caches.
    tried = data["variants"] = {}
    load, store = "ld.global.v4.b32", "st.global.v4.b32"
    variants = {
        "as it is": lambda ptx: ptx,
        "no bounds": without_bounds,
        **{f"{count} blocks": with_blocks(count) for count in (1, 2, 3, 4)},
        "loads no_allocate": lambda ptx: ptx.replace(load, "ld.global.L1::no_allocate.v4.b32"),
        "loads evict_first": lambda ptx: ptx.replace(load, "ld.global.L1::evict_first.v4.b32"),
        "loads cs": lambda ptx: ptx.replace(load, "ld.global.cs.v4.b32"),
        "stores cs": lambda ptx: ptx.replace(store, "st.global.cs.v4.b32"),
        "no_allocate, stores cs": lambda ptx: ptx.replace(
            load, "ld.global.L1::no_allocate.v4.b32").replace(store, "st.global.cs.v4.b32"),
    }  # fmt: skip
    for name, ptx in {} if DRY or os.environ.get("DVK_PREBUILT") else variants.items():
        try:
            with variant(ptx):
                tried[name] = {
                    f"{kind} x{count}": of_copy(figures[kind][:count])
                    for kind in figures
                    for count in (2, 4, 8)
                }
        except Exception as error:
            tried[name] = f"{type(error).__name__}: {error}"[:300]
    save(data)

    # The fused step: 4 gradients, 4 copies of 3 states.
    figures.clear()
    length = nbytes // 16
    gradients = [gpu.random(length, "f4", seed) for seed in range(4)]
    states = [[gpu.array(np.zeros(length, "f4")) for _ in range(4)] for _ in range(3)]

    def adam():
        optimizers.adam([gradients], *([one] for one in states), step=1, learning_rate=1e-3)

    data["adam"] = {}
    moved = (4 + 3 + 12) * 4 * length
    for name, ptx in (("as it is", None), ("2 blocks", with_blocks(2))):
        if DRY and ptx:
            continue
        with variant(ptx) if ptx else contextlib.nullcontext():
            times = contest(gpu, {"ours": adam, "copy": copy}, calls, 1 if DRY else 5)
        part = (moved / times["ours"]["us"]) / (2 * nbytes / times["copy"]["us"])
        data["adam"][name] = {"of_copy": round(part, 3), **times["ours"]}
    kernel = catalogue.optimizer(3, arithmetic.type_code(np.dtype("f4")))
    data["attributes_adam"] = attributes(kernel)


@section
def latency(data, _):
    """Small calls: from Python, in graphs; what an empty kernel costs here."""
    prepare()
    import numpy as np

    gpu = Gpu()
    from dvkernels import kernels

    calls = 5 if DRY else 2000
    out = data["from_python"] = {}

    def host_and_total(call):
        call()
        gpu.sync()
        few = max(1, calls // 20)
        began = time.perf_counter()
        for _ in range(few):
            call()
        host = (time.perf_counter() - began) / few
        gpu.sync()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        gpu.sync()
        total = (time.perf_counter() - began) / calls
        return {"host_us": round(1e6 * host, 2), "total_us": round(1e6 * total, 2)}

    for count in (2, 4, 8):
        buffers = [gpu.array(np.ones(1024, "f4")) for _ in range(count)]
        call = lambda: kernels.all_reduce(buffers, "mean")  # noqa: E731, B023
        out[f"cupy x{count}, 4 KiB"] = host_and_total(call)
    buffers = [gpu.array(np.ones(1024, "f4")) for _ in range(2)]
    out["reduce to a new array"] = host_and_total(lambda: kernels.reduce(buffers))
    many = [[gpu.array(np.ones(64 if DRY else 16384, "f4")) for _ in range(2)] for _ in range(100)]
    out["all_reduce_many, 100 arrays of 64 KiB x2"] = host_and_total(
        lambda: kernels.all_reduce_many(many)
    )
    many = None
    save(data)
    if not DRY:
        empty = gpu.cp.RawKernel('extern "C" __global__ void nothing() {}', "nothing")
        out["an empty kernel by CuPy"] = host_and_total(lambda: empty((1,), (32,), ()))
        try:
            import torch

            tensors = [torch.ones(1024, device="cuda") for _ in range(2)]
            out["torch x2, 4 KiB"] = host_and_total(lambda: kernels.all_reduce(tensors, "mean"))
            out["torch's own: add, copy"] = host_and_total(
                lambda: (tensors[0].add_(tensors[1]), tensors[1].copy_(tensors[0]))
            )
        except Exception as error:
            out["torch"] = f"{type(error).__name__}: {error}"[:300]
        graphs = data["in_a_graph_us"] = {}
        replay = gpu.graph(lambda: empty((1,), (32,), ()), 100)
        graphs["an empty kernel"] = round(1e4 * _replayed(gpu, replay), 3)
    else:
        graphs = data["in_a_graph_us"] = {}
    for count in (2, 4, 8):
        for length in (1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 22):
            if DRY and length > 1 << 10:
                continue
            buffers = [gpu.array(np.ones(length, "f4")) for _ in range(count)]
            call = lambda: kernels.all_reduce(buffers, "mean")  # noqa: E731, B023
            call()
            replay = gpu.graph(call, 100 if not DRY else 2)
            graphs[f"x{count}, {4 * length >> 10} KiB"] = round(1e4 * _replayed(gpu, replay), 3)
    save(data)
    if not DRY:  # the values that a graph leaves, and that PyTorch's capture takes us in
        buffers = [gpu.array(np.full(1000, k + 1.0, "f4")) for k in range(2)]
        kernels.all_reduce(buffers)
        replay = gpu.graph(lambda: kernels.all_reduce(buffers), 1)
        for _ in range(3):
            with replay.stream:
                replay()
        gpu.sync()
        data["graph_leaves"] = float(buffers[0][0]), "24 is right"
        try:
            import torch

            tensors = [torch.full((1000,), k + 1.0, device="cuda") for k in range(2)]
            kernels.all_reduce(tensors)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                kernels.all_reduce(tensors)
            for _ in range(3):
                graph.replay()
            torch.cuda.synchronize()
            data["torch_graph_leaves"] = float(tensors[0][0])
        except Exception as error:
            data["torch_graph_leaves"] = f"{type(error).__name__}: {error}"[:300]


def _replayed(gpu, replay):
    """Return the seconds of one of a hundred calls' graph, in units of its calls."""
    if DRY:
        return gpu.seconds(replay, 1) / 100
    with replay.stream:
        return gpu.seconds(replay, 20) / 100


@section
def compare(data, _):
    """The same result by CuPy and by PyTorch."""
    prepare()
    import numpy as np

    gpu = Gpu()
    from dvkernels import kernels

    length = 1 << 8 if DRY else 64 << 20
    for count in (2, 4, 8):
        buffers = [gpu.random(length, "f4", seed) for seed in range(count)]
        found = {"ours": lambda: kernels.all_reduce(buffers, "mean")}  # noqa: B023

        def by_adding(buffers=buffers):
            total = buffers[0] + buffers[1]
            for buffer in buffers[2:]:
                total += buffer
            total /= len(buffers)
            for buffer in buffers:
                buffer[...] = total

        found["cupy add"] = by_adding
        if not DRY:
            # The best that CuPy offers: one elementwise kernel that reads and writes all.
            names = [f"x{k}" for k in range(count)]
            body = f"float s = ({' + '.join(names)}) / {count}; " + "".join(
                f"y{k} = s; " for k in range(count)
            )
            fused = gpu.cp.ElementwiseKernel(
                ", ".join(f"float32 {name}" for name in names),
                ", ".join(f"float32 y{k}" for k in range(count)), body, f"fused{count}",
            )  # fmt: skip
            found["cupy ElementwiseKernel"] = lambda: fused(*buffers, *buffers)  # noqa: B023
            try:
                import torch

                tensors = [torch.from_dlpack(buffer) for buffer in buffers]

                def by_torch(tensors=tensors):
                    total = tensors[0] + tensors[1]
                    for tensor in tensors[2:]:
                        total += tensor
                    total /= len(tensors)
                    for tensor in tensors:
                        tensor.copy_(total)

                found["torch add"] = by_torch
                found["torch stack"] = lambda tensors=tensors: [
                    [tensor.copy_(total) for tensor in tensors]
                    for total in [torch.stack(tensors).mean(0)]
                ]
            except Exception as error:
                data["torch"] = f"{type(error).__name__}: {error}"[:300]
        data[f"x{count}"] = contest(gpu, found, 1 if DRY else 10, 1 if DRY else 5)
        save(data)
    data["dtype"] = str(np.dtype("f4"))


@section
def correct(data, part):
    """Every operation on every dtype, whole, misaligned and strided, against the CPU's bits."""
    prepare()
    import ml_dtypes
    import numpy as np

    gpu = Gpu()
    from dvkernels import errors, kernels, reduce_op
    from dvkernels.kernels import cpu

    names = ["f2", ml_dtypes.bfloat16, "f4", "f8", "c8", "c16", "?",
             *(f"{sign}{size}" for sign in "iu" for size in (1, 2, 4, 8))]  # fmt: skip
    own, total = part
    dtypes = [np.dtype(name) for name in names][own::total]
    checked, failures = 0, data.setdefault("failures", [])
    rng = np.random.default_rng(own)
    lengths = (1, 3, 20) if DRY else (1, 7, 1000, 4099, 100_003, (1 << 22) + 5)

    def some(length, dtype):
        if dtype.kind == "c":
            return (rng.standard_normal(length) + 1j * rng.standard_normal(length)).astype(dtype)
        if dtype.kind == "b":
            return rng.integers(0, 2, length).astype(dtype)
        if dtype.kind in "iu":
            return rng.integers(-100 if dtype.kind == "i" else 0, 100, length).astype(dtype)
        return rng.standard_normal(length).astype(dtype)

    def views(array, how, on_gpu):
        if how == "whole":
            return array
        if how == "misaligned":
            return array[1:]
        if how == "strided":
            return array[::2]
        del on_gpu
        return array[: len(array) // 2 * 2].reshape(2, -1).T

    def check(name, calls):
        nonlocal checked
        checked += 1
        try:
            found, right = calls()
        except Exception as error:
            failures.append(f"{name}: {type(error).__name__}: {error}"[:300])
            return
        for k, (one, other) in enumerate(zip(found, right, strict=True)):
            one = gpu.host(one) if not isinstance(one, np.ndarray) else one
            if np.ascontiguousarray(one).tobytes() != np.ascontiguousarray(other).tobytes():
                where = np.flatnonzero(np.ravel(one != other))[:5].tolist()
                failures.append(f"{name}: result {k} differs at {where}")
                return

    for dtype in dtypes:
        for op in ("sum", "mean", "min", "max", "prod"):
            try:
                reduce_op.check_dtype("check", reduce_op.ReduceOp(op), dtype)
            except (errors.DvKernelsError, ValueError, KeyError):
                continue
            if DRY and dtype.kind == "c" and op == "prod":
                continue  # the simulator's is NumPy's, which fuses
            for length in lengths:
                for count in (2, 3) if length > 5000 else (2, 3, 8):
                    for how in ("whole", "misaligned", "strided", "transposed"):
                        if length < 4 and how != "whole":
                            continue
                        base = [some(length, dtype) for _ in range(count)]
                        there = [gpu.array(one) for one in base]
                        host = [views(one, how, False) for one in base]
                        device = [views(one, how, True) for one in there]

                        def both(host=host, device=device, op=op):
                            right = cpu.reduce(host, op)
                            out = kernels.reduce(device, op)
                            kernels.all_reduce(device, op)
                            return [out, *device], [right] * (1 + len(device))

                        check(f"{dtype} {op} x{count} [{length}] {how}", both)
                        if DRY:
                            break
        for length in (1, 1000, 4099) if not DRY else (5,):
            base = [some(length, dtype) for _ in range(3)]
            there = [gpu.array(one) for one in base]
            for verb in ("all_gather", "all_to_all"):
                check(
                    f"{dtype} {verb} [{length}]",
                    lambda verb=verb, there=there, base=base: (
                        getattr(kernels, verb)(there), getattr(cpu, verb)(base)
                    ),
                )  # fmt: skip
            copies = [one.copy() for one in base]
            check(
                f"{dtype} broadcast [{length}]",
                lambda there=there, copies=copies: (
                    kernels.broadcast(there, 1), cpu.broadcast(copies, 1)
                ),
            )  # fmt: skip
        data["checked"], data["failed"] = checked, len(failures)
        save(data)
    if own == 0:  # NaN, infinities, signed zeros: which elements are NaN, and the bits of the rest
        special = np.float32([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, 3.4e38, -3.4e38] * 9)
        for op in ("sum", "min", "max"):
            base = [np.roll(special, k) for k in range(3)]
            right = cpu.reduce(base, op)
            found = gpu.host(kernels.reduce([gpu.array(one) for one in base], op))
            alike = (np.isnan(found) == np.isnan(right)) & (np.isnan(right) | (found == right))
            if not alike.all():
                failures.append(f"special numbers, {op}: differ at {np.flatnonzero(~alike)[:5]}")
    data["checked"], data["failed"] = checked, len(failures)
    del failures[40:]


@section
def teams(data, _):
    """The kernels that wait, with two to four ranks on one GPU: they fit at once on an idle one."""
    prepare()
    import numpy as np

    if DRY:
        data["note"] = "the simulator runs one launch after another: not run"
        return
    gpu = Gpu()
    from dvkernels.errors import CollectiveTimeoutError
    from dvkernels.kernels.cuda.multi_gpu import group, peer_access
    from dvkernels.reduce_op import ReduceOp
    from dvkernels.schedules import flag_all_reduce
    from dvkernels.schedules.flag_selection import Route

    found, cp = driver(), gpu.cp
    dtype = np.dtype("f4")
    rng = np.random.default_rng(0)

    def streams_of(count):
        return [cp.cuda.Stream(non_blocking=True) for _ in range(count)]

    def route(name, count, waits=True):
        return Route(flag_all_reduce.PROTOCOLS[name], tuple(range(count)), waits)

    outcome = data["protocols"] = {}
    for count in (2, 4):
        own = group.DeviceGroup((0,) * count, peer_access.PeerAccess(found), timeout_seconds=5)
        streams = streams_of(count)
        for name in flag_all_reduce.PROTOCOLS:
            wrong, turns = 0, 0
            try:
                for turn in range(150):
                    length = int(rng.choice([1, 33, 1000, 4099, 1 << 16, (1 << 20) + 3]))
                    host = [np.float32(np.arange(length) % 97 + turn + k) for k in range(count)]
                    arrays = [gpu.array(one) for one in host]
                    outs = [cp.full(length, -1, dtype) for _ in host]
                    gpu.sync()
                    job = group.AllReduceCall(
                        [one.data.ptr for one in arrays], [one.data.ptr for one in outs], length,
                        dtype, ReduceOp.SUM, [stream.ptr for stream in streams],
                    )  # fmt: skip
                    for _ in range(3):  # back to back: slots and epochs
                        own.all_reduce(job, route(name, count))
                    for stream in streams:
                        stream.synchronize()
                    own.check()
                    right = cp.asarray(np.sum(host, axis=0))
                    wrong += sum(int((one != right).sum()) for one in outs)
                    turns += 1
                outcome[f"{name} x{count}"] = {"turns": turns, "wrong": wrong}
            except Exception as error:
                outcome[f"{name} x{count}"] = f"turn {turns}: {type(error).__name__}: {error}"[:300]
                with contextlib.suppress(Exception):
                    own.recover()
            save(data)
        times = data.setdefault("us_a_call", {})
        shapes = [(name, length, False) for name in ("one_shot", "two_shot", "ring")
                  for length in (1 << 10, 1 << 16, 1 << 20, 1 << 24)]  # fmt: skip
        # Without bounds, ptxas loads later.
        shapes += [("two_shot", 1 << 24, True)]
        for name, length, is_unbound in shapes:
            with variant(without_bounds) if is_unbound else contextlib.nullcontext():
                own._most_blocks.clear()
                told = f"{name} x{count} {4 * length >> 10} KiB{' no bounds' * is_unbound}"
                arrays = [cp.ones(length, dtype) for _ in range(count)]
                outs = [cp.empty(length, dtype) for _ in range(count)]
                gpu.sync()
                job = group.AllReduceCall(
                    [one.data.ptr for one in arrays], [one.data.ptr for one in outs], length,
                    dtype, ReduceOp.SUM, [stream.ptr for stream in streams],
                )  # fmt: skip
                try:
                    own.all_reduce(job, route(name, count))
                    found.synchronize(0)
                    began = time.perf_counter()
                    for _ in range(100):
                        own.all_reduce(job, route(name, count))
                    found.synchronize(0)
                    own.check()
                    spent = (time.perf_counter() - began) / 100
                    times[told] = round(1e6 * spent, 1)
                except Exception as error:
                    times[told] = str(error)[:200]
                    with contextlib.suppress(Exception):
                        own.recover()
    save(data)

    class Forgetful(peer_access.PeerAccess):
        def launch(self, device, kernel, num_blocks, stream, words):
            self.count = getattr(self, "count", 0) + 1
            if self.count != 2:
                super().launch(device, kernel, num_blocks, stream, words)

    buffers = [cp.ones(5000, dtype) for _ in range(2)]
    gpu.sync()
    places = [one.data.ptr for one in buffers]
    for what in ("deadline", "abort"):
        lonely = group.DeviceGroup(
            (0, 0), Forgetful(found), timeout_seconds=0.5 if what == "deadline" else 30
        )
        streams = streams_of(2)
        job = group.AllReduceCall(
            places, places, 5000, dtype, ReduceOp.SUM, [stream.ptr for stream in streams]
        )
        began = time.perf_counter()
        lonely.all_reduce(job, route("two_shot", 2))
        if what == "abort":
            time.sleep(0.1)
            lonely.abort()
        found.synchronize(0)
        data[f"{what}_seconds"] = round(time.perf_counter() - began, 3)
        try:
            lonely.check()
            data[what] = "nothing was raised"
        except CollectiveTimeoutError as error:
            data[what] = str(error)[:300]
        lonely.recover()


@section
def frameworks(data, _):
    """Arrays of PyTorch on a stream of their own, of Numba, of JAX."""
    prepare()
    import numpy as np

    from dvkernels import kernels

    if DRY:
        data["note"] = "not run"
        return

    def tried(name, call):
        try:
            data[name] = call()
        except Exception as error:
            data[name] = f"{type(error).__name__}: {error}"[:400]

    def with_torch():
        import torch

        bad = 0
        stream = torch.cuda.Stream()
        for _ in range(50):
            with torch.cuda.stream(stream):
                slow = [torch.zeros(1 << 22, device="cuda") for _ in range(2)]
                for one in slow:
                    for _ in range(10):
                        one += 1
                total = kernels.reduce(slow)
                kernels.all_reduce(slow)
                bad += int((total != 20).sum()) + int((slow[0] != 20).sum())
        return {"type": str(type(total)), "wrong": bad}

    def with_numba():
        from numba import cuda as numba_cuda

        arrays = [numba_cuda.to_device(np.full(7, k + 1.0)) for k in range(3)]
        kernels.all_reduce(arrays)
        result = kernels.reduce(arrays)
        return {"type": str(type(result)), "values": arrays[0].copy_to_host().tolist()[:2]}

    def with_jax():
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        import jax

        wrong = 0
        for _ in range(30):  # read before JAX has made them? it says nothing of its stream
            made = [jax.jit(lambda x: (x @ x) * 0 + 1)(jax.numpy.ones((3000, 3000)) + k)
                    for k in range(2)]  # fmt: skip
            total = kernels.reduce(made)
            wrong += int((total != 2).sum())
        return {"type in": str(type(made[0])), "type out": str(type(total)), "wrong": wrong}

    def jax_bfloat16():
        import jax

        made = [jax.numpy.ones(100, jax.numpy.bfloat16) for _ in range(2)]
        return str(type(kernels.reduce(made)))

    tried("torch", with_torch)
    tried("numba", with_numba)
    tried("jax", with_jax)
    tried("jax bfloat16", jax_bfloat16)


@section
def train(data, _):
    """The digits on two replicas of one GPU; and ``info``."""
    for name, arguments in (
        ("info", ["info"]),
        ("train", ["train", "--device", "cuda", "--replicas", "2", "--json"]),
    ):
        if DRY:
            arguments = ["info"]
        began = time.perf_counter()
        ended = subprocess.run(
            [sys.executable, "-m", "dvkernels", *arguments], cwd=ROOT, capture_output=True,
            text=True, timeout=150, check=False,
        )  # fmt: skip
        data[name] = {
            "rc": ended.returncode, "seconds": round(time.perf_counter() - began, 1),
            "stdout": ended.stdout[-1500:], "stderr": ended.stderr[-1500:],
        }  # fmt: skip
        if name == "train":
            with contextlib.suppress(ValueError):
                report = json.loads(ended.stdout)
                data[name]["stdout"] = {
                    key: report[key] for key in report if isinstance(report[key], (int, float, str))
                }


@section
def body_of_sanitizer(data, _):
    """What the sanitizer looks at: short, and with tails."""
    prepare()
    gpu = Gpu()
    import numpy as np

    from dvkernels import kernels

    for length in (1, 7, 1000, 100_003) if not DRY else (3,):
        arrays = [gpu.array(np.ones(length, "f4")) for _ in range(2)]
        kernels.all_reduce(arrays)
        kernels.all_gather(arrays)
        kernels.reduce_scatter(arrays)
        if length > 1:
            kernels.all_reduce([one[1:] for one in arrays])
    gpu.sync()


@section
def body_of_ncu(data, _):
    """A few launches, for the counters."""
    prepare()
    gpu = Gpu()
    import ml_dtypes

    from dvkernels import kernels

    for dtype in ("f4", ml_dtypes.bfloat16):
        for count in (2, 8):
            length = 64 if DRY else (256 << 20) // gpu.np.dtype(dtype).itemsize
            arrays = [gpu.random(length, dtype, seed) for seed in range(count)]
            for _ in range(2):
                kernels.all_reduce(arrays, "mean")
            gpu.sync()
            del arrays


# ---------------------------------------------------------------- writing


_part = None


def save(data):
    if _part is not None:
        _part.write_text(json.dumps(data, default=str))


def run_section(name, part, slice_text):
    global _part
    _part = part
    own, total = (int(number) for number in slice_text.split("/"))
    data = {
        "section": name, "slice": slice_text, "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "commit": said("git", "-C", str(ROOT), "rev-parse", "HEAD"),
    }  # fmt: skip
    began = time.perf_counter()
    try:
        SECTIONS[name](data, (own, total))
        data["ok"] = True
    except BaseException as error:
        data["ok"] = False
        data["error"] = f"{type(error).__name__}: {error}"[:600]
        data["traceback"] = traceback.format_exc()[-3000:]
        print(data["traceback"], file=sys.stderr)
    data["seconds"] = round(time.perf_counter() - began, 1)
    save(data)
    print(json.dumps(data, default=str)[:1500])
    return 0 if data["ok"] else 1


def merge(parts, out):
    """Write all that is there so far, earlier calls included: results.json, summary.txt."""
    results = out / "results.json"
    found = json.loads(results.read_text()) if results.exists() else {}
    for path in sorted(parts.glob("*.rc")):
        found.pop(path.stem, None)
    for path in sorted(parts.glob("*.json")):
        with contextlib.suppress(ValueError):
            found[path.stem] = json.loads(path.read_text())
    for path in sorted(parts.glob("*.log")):
        found.setdefault(path.stem, {})["log"] = path.read_text(errors="replace")[-6000:]
    for path in sorted(parts.glob("*.rc")):
        found.setdefault(path.stem, {})["rc"] = path.read_text().strip()
    results.write_text(json.dumps(found, indent=1, default=str))
    lines = []
    for name, one in found.items():
        lines.append(f"== {name}: rc {one.get('rc')}, ok {one.get('ok')}, {one.get('seconds')} s")
        if one.get("error"):
            lines.append(f"   ERROR {one['error']}")
        for line in one.get("all_reduce", []):
            lines.append(
                f"   {line['dtype']:9} x{line['replicas']}: {line['of_copy']} of the copy, "
                f"{line['tb_per_s']} TB/s, wrong {line['wrong']}"
            )
        for key in (
            "missing", "device", "numba_cuda_alone", "cuda_kernels", "attributes",
            "attributes_float32", "attributes_bfloat16", "attributes_adam", "adam",
            "loaded_numba", "by_numba", "waves", "by_size_mib", "variants",
            "from_python", "in_a_graph_us", "graph_leaves",
            "torch_graph_leaves", "x2", "x4", "x8", "checked", "failed", "failures", "protocols",
            "us_a_call", "deadline", "deadline_seconds", "abort", "abort_seconds", "torch", "numba",
            "jax", "jax bfloat16", "packages", "libnvvm", "libnvJitLink",
        ):  # fmt: skip
            if key in one and one[key] not in ([], "", None):
                lines.append(f"   {key}: {json.dumps(one[key], default=str)[:1200]}")
        spent = {key[8:]: one[key] for key in one if key.startswith("seconds_")}
        lines += [f"   seconds: {json.dumps(spent)}"] * bool(spent)
        if name.startswith(("pytest", "sanitize", "ncu", "train")):
            text = json.dumps(one.get("train") or one.get("info") or "")[:800]
            tail = [row for row in one.get("log", "").splitlines() if row.strip()][-14:]
            lines += [f"   {text}"] * (text != '""') + [f"   | {row[:200]}" for row in tail]
    (out / "summary.txt").write_text("\n".join(lines) + "\n")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", choices=[*SECTIONS, "merge", "prebuild"])
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--part", type=Path)
    parser.add_argument("--slice", default="0/1")
    told = parser.parse_args()
    if told.section == "merge":
        print(merge(*told.paths)[-11_000:])
        return 0
    if told.section == "prebuild":
        prebuild(*told.paths)
        return 0
    return run_section(told.section, told.part, told.slice)


if __name__ == "__main__":
    sys.exit(main())
