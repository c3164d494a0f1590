#!/usr/bin/env bash
# The first run on a real GPU: everything at once, at most ten minutes, each section by itself.
#
# On the machine with the GPU, from the checkout's root: bash gpu_first_run.sh; gpu_first_run.py lies beside it.
# Results: results.json, summary.txt, all.log in the folder $OUT (/tmp/gpu_first_run if unset).
# Without a network there: wheels of missing packages (optree) in .whl/ are installed into a folder of their own.
# Optional, should that machine's compiler fail, made where dvkernels[cuda-compile] is installed:
#   python gpu_first_run.py prebuild cubins   (the folder cubins beside this file)
#
# DVK_BUDGET: seconds in all (570). DVK_DRY=1: the same code in Numba's simulator, without a GPU.
set -u
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export DVK_ROOT=${DVK_ROOT:-$(cd "$HERE/../../.." && pwd)}
OUT=${OUT:-/tmp/gpu_first_run}
PARTS=$(mktemp -d)
BUDGET=${DVK_BUDGET:-570}
PYTHON=${PYTHON:-python3}
HELPER=$HERE/gpu_first_run.py
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 XLA_PYTHON_CLIENT_PREALLOCATE=false

# ---- packages from .whl/, and a NumPy beside which numba-cuda 0.30 loads
if compgen -G ".whl/*.whl" >/dev/null; then
    $PYTHON -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target /tmp/site .whl/*.whl >"$PARTS/wheels.log" 2>&1 || echo "wheels: see all.log"
fi
SHIM=$PARTS/shim
mkdir -p "$SHIM"
cat >"$SHIM/sitecustomize.py" <<'EOF'
import os
import site

if os.path.isdir("/tmp/site"):
    site.addsitedir("/tmp/site")  # and its .pth files: numba-cuda's redirector is one
try:
    import numpy

    if not hasattr(numpy, "row_stack"):  # NVIDIA/numba-cuda#907
        numpy.row_stack = numpy.vstack
except ImportError:
    pass
EOF
export PYTHONPATH="$SHIM:/tmp/site:$DVK_ROOT${PYTHONPATH:+:$PYTHONPATH}"
if [ -z "${CUDA_HOME:-}" ] && [ -d /usr/local/cuda ]; then
    export CUDA_HOME=/usr/local/cuda # where libNVVM is looked for last
fi

left() { echo $((BUDGET - SECONDS)); }

# section NAME SECONDS COMMAND...: with its own limit, its log and its exit status
section() {
    local name=$1 limit=$2
    shift 2
    local rest
    rest=$(left)
    if [ "$rest" -lt 15 ]; then
        echo "left out: no time" >"$PARTS/$name.rc"
        return
    fi
    if [ "$limit" -gt "$((rest - 5))" ]; then limit=$((rest - 5)); fi
    timeout -k 5 "$limit" "$@" >"$PARTS/$name.log" 2>&1
    echo "$?" >"$PARTS/$name.rc"
    echo "[$SECONDS s] $name: $(cat "$PARTS/$name.rc")"
}

ours() { # ours NAME SECONDS SECTION [--slice k/n]
    local name=$1 limit=$2 what=$3
    shift 3
    section "$name" "$limit" "$PYTHON" "$HELPER" "$what" --part "$PARTS/$name.json" "$@"
}

gather() {
    $PYTHON "$HELPER" merge "$PARTS" "$OUT" >"$PARTS/merged.txt" 2>&1
    for log in "$PARTS"/*.log; do
        [ -e "$log" ] && printf '\n######## %s\n' "$(basename "$log")" && tail -c 60000 "$log"
    done >"$OUT/all.log"
}
trap 'gather; tail -c 11000 "$PARTS/merged.txt"' EXIT

# ---- A: alone on the GPU, one after another
ours env 70 env
ours first 90 first
if [ "$(cat "$PARTS/first.rc")" != 0 ] && [ -f "$HERE/cubins/index.json" ]; then
    export DVK_PREBUILT=$HERE/cubins
    ours first_prebuilt 60 first
fi
gather
ours bandwidth 150 bandwidth
gather
ours latency 60 latency
ours compare 50 compare
ours teams 60 teams
gather

# ---- B: several at once; nothing here is timed
OPTIONS="-o faulthandler_timeout=0 -W \"ignore:The 'generic' unit:DeprecationWarning\""
OPTIONS="$OPTIONS -W \"ignore:ExternalStream is deprecated:DeprecationWarning\""
export PYTEST_ADDOPTS="$OPTIONS"
MARK=gpu
PARALLEL=$($PYTHON -c 'import xdist' 2>/dev/null && echo "-n 6")
[ "${DVK_DRY:-}" = 1 ] && MARK='gpu and not gpu'
for k in 0 1 2 3 4; do ours "correct_$k" 150 correct --slice "$k/5" & done
ours frameworks 90 frameworks &
ours train 120 train &
# Each test file of tests/gpu; the bodies of the CPU's tests, which take longest, by themselves.
(cd "$DVK_ROOT" && section pytest_gpu 150 "$PYTHON" -m pytest -m "$MARK" tests/gpu -p no:cacheprovider \
    -k "not bodies and not sanitizer" -q -rfE --tb=short) &
(cd "$DVK_ROOT" && section pytest_bodies 200 "$PYTHON" -m pytest -m "$MARK" tests/gpu/test_real_gpu.py \
    -p no:cacheprovider -k bodies -q -rfE --tb=short $PARALLEL) &
SANITIZER=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if [ -n "$SANITIZER" ]; then
    for tool in memcheck racecheck synccheck; do
        section "sanitize_$tool" 150 "$SANITIZER" --tool "$tool" --error-exitcode 9 \
            "$PYTHON" "$HELPER" body_of_sanitizer &
    done
else
    echo "compute-sanitizer is not there" >"$PARTS/sanitize.log"
fi
wait
gather

# ---- C: counters, alone again, if there is time
NCU=$(command -v ncu || ls /usr/local/cuda/bin/ncu 2>/dev/null)
if [ -n "$NCU" ] && [ "$(left)" -gt 40 ]; then
    section ncu 80 "$NCU" --clock-control none --kernel-name-base mangled -k regex:dvkernels -c 8 \
        --metrics gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__warps_active.avg.pct_of_peak_sustained_active,smsp__issue_active.avg.pct_of_peak_sustained_active,l1tex__data_bank_conflicts_pipe_lsu.sum \
        "$PYTHON" "$HELPER" body_of_ncu
fi
