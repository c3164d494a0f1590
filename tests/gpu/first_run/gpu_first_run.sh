#!/usr/bin/env bash
# The first run on a real GPU: everything at once, at most ten minutes, each section by itself.
#
# On the machine with the GPU, from the checkout's root: bash gpu_first_run.sh; gpu_first_run.py lies beside it.
# Results: results.json, summary.txt, all.log in the folder $OUT (/tmp/gpu_first_run if unset). Sections that
# a later call does not repeat keep the results that they have there.
# Without a network there: wheels of missing packages (optree) in .whl/ are installed into a folder of their own.
# Optional, should that machine's compiler fail, made where dvkernels[cuda-compile] is installed:
#   python gpu_first_run.py prebuild cubins   (the folder cubins beside this file)
#
# DVK_BUDGET: seconds in all (570). DVK_DRY=1: the same code in Numba's simulator, without a GPU.
# DVK_SECTIONS: which parts to run, comma-separated, such as "bandwidth,latency,tests"; unset: all.
set -u
ALL=env,first,bandwidth,latency,compare,teams,correct,frameworks,train,tests,sanitize,ncu
SECTIONS=${DVK_SECTIONS:-$ALL}
for name in ${SECTIONS//,/ }; do
    case ",$ALL," in
        *",$name,"*) ;;
        *) echo "DVK_SECTIONS: no section $name; there are $ALL" >&2; exit 2 ;;
    esac
done
wanted() { case ",$SECTIONS," in *",$1,"*) ;; *) return 1 ;; esac; }
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export DVK_ROOT=${DVK_ROOT:-$(cd "$HERE/../../.." && pwd)}
OUT=${OUT:-/tmp/gpu_first_run}
PARTS=$(mktemp -d)
BUDGET=${DVK_BUDGET:-570}
PYTHON=${PYTHON:-python3}
HELPER=$HERE/gpu_first_run.py
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 XLA_PYTHON_CLIENT_PREALLOCATE=false

# ---- packages from .whl/
export DVK_SITE=$PARTS/site
if compgen -G ".whl/*.whl" >/dev/null; then
    $PYTHON -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$DVK_SITE" .whl/*.whl >"$PARTS/wheels.log" 2>&1 || echo "wheels: see all.log"
fi
export PYTHONPATH="$DVK_SITE:$DVK_ROOT${PYTHONPATH:+:$PYTHONPATH}"
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
wanted env && ours env 70 env
wanted first && ours first 90 first
if [ -e "$PARTS/first.rc" ] && [ "$(cat "$PARTS/first.rc")" != 0 ] && [ -d "$HERE/cubins" ]; then
    export DVK_PREBUILT=$HERE/cubins
    ours first_prebuilt 60 first
fi
gather
for part in "bandwidth 150" "latency 60" "compare 50" "teams 60"; do
    read -r name seconds <<<"$part"
    if wanted "$name"; then
        ours "$name" "$seconds" "$name"
        gather
    fi
done

# ---- B: several at once; nothing here is timed
MARK=gpu
PARALLEL=$($PYTHON -c 'import xdist' 2>/dev/null && echo "-n 6")
[ "${DVK_DRY:-}" = 1 ] && MARK='gpu and not gpu'
if wanted correct; then
    for k in 0 1 2 3 4; do ours "correct_$k" 150 correct --slice "$k/5" & done
fi
wanted frameworks && ours frameworks 90 frameworks &
wanted train && ours train 120 train &
# The tests of the CPU's kernels over CuPy, which take longest, by themselves.
tests() { # tests NAME SECONDS OPTIONS...
    cd "$DVK_ROOT" && section "$1" "$2" "$PYTHON" -m pytest tests/gpu -p no:cacheprovider -q -rfE \
        --tb=short "${@:3}"
}
if wanted tests; then
    (tests pytest_gpu 150 -m "$MARK and not slow") &
    (tests pytest_bodies 200 -m "$MARK and slow" -k of_the_cpu $PARALLEL) &
fi
SANITIZER=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if ! wanted sanitize; then
    :
elif [ -n "$SANITIZER" ]; then
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
if wanted ncu && [ -n "$NCU" ] && [ "$(left)" -gt 40 ]; then
    section ncu 80 "$NCU" --clock-control none --kernel-name-base mangled -k regex:dvkernels -c 8 \
        --metrics gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__warps_active.avg.pct_of_peak_sustained_active,smsp__issue_active.avg.pct_of_peak_sustained_active,l1tex__data_bank_conflicts_pipe_lsu.sum \
        "$PYTHON" "$HELPER" body_of_ncu
fi
