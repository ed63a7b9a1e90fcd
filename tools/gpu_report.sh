#!/usr/bin/env bash
# Usage: tools/gpu_report.sh [--rehearse] [--seconds N] [--work DIR]
#
# On a machine with a GPU, within ten minutes: checks kernels and meta-gradients on it, measures
# kernels, meta steps and latencies by `ttt-megatron bench`, and writes the tables into
# docs/benchmarks.md (between its gpu markers) and the raw JSON and pictures under docs/benchmarks/.
# Ends with a summary; exit status 1 if a part failed or ran out of its time, 2 if it cannot begin.
#
# Every part has a time limit of its own, to which goes what the parts before it left over.
#
# --rehearse   walk through it on a CPU with tiny shapes; writes to DIR/docs alone
# --seconds N  for everything (default 590)
# --work DIR   for logs and what is under way (default build/gpu-report)
#
# $PYTHON names the interpreter (default .venv/bin/python, else python3). The package need not be
# installed for it, what it imports must be.
set -uo pipefail

fail() {
    echo "error: $1" >&2
    exit 2
}

rehearse=
seconds=590
work=build/gpu-report
while (($#)); do
    case $1 in
    --rehearse) rehearse=yes ;;
    --seconds)
        seconds=${2:-}
        [[ $seconds =~ ^[1-9][0-9]{0,5}$ ]] || fail "--seconds '$seconds': give a whole number above 0"
        shift
        ;;
    --work)
        [[ -n ${2:-} ]] || fail "--work names no folder: give one"
        work=$(realpath -m "$2")
        shift
        ;;
    -h | --help)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
        exit 0
        ;;
    *) fail "$1: the options are --rehearse, --seconds N, --work DIR and --help" ;;
    esac
    shift
done

python=${PYTHON:-}
[[ $python != */* ]] || python=$(realpath -s "$python") # before the folder changes
cd "$(dirname "$0")/.." || exit 2
if [[ -z $python ]]; then
    python=.venv/bin/python
    [[ -x $python ]] || python=python3
fi
command -v "$python" >/dev/null || fail "$python is no command: name an interpreter, PYTHON=/path/to/python"
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1

missing=$("$python" - torch triton numpy yaml rich matplotlib tokenizers pytest <<'END'
import sys
from importlib.util import find_spec
print(" ".join(name for name in sys.argv[1:] if find_spec(name) is None))
END
) || fail "$python does not run: name another interpreter, PYTHON=/path/to/python"
[[ -z $missing ]] || fail "$python lacks $missing: install it, or name another interpreter, PYTHON=/path/to/python"

if [[ -n $rehearse ]]; then
    name=rehearsal
    docs=$work/docs
    precisions="bf16 fp8"
else
    # The GPU's name, and the precisions it multiplies in.
    found=$("$python" - <<'END'
import re
import torch
if torch.cuda.is_available():
    from ttt_megatron.bench.ceilings import named_gpu
    full = torch.cuda.get_device_name()
    gpu = named_gpu(full)
    print(gpu.name if gpu else re.sub(r"[^a-z0-9]+", "-", full.lower()).strip("-"))
    print("bf16 fp8" if torch.cuda.get_device_capability() >= (8, 9) else "bf16")
END
    ) || fail "$python cannot import torch and ttt_megatron: see above"
    [[ -n $found ]] || fail "torch finds no CUDA device here: run this on a machine with a GPU, or walk through it on the CPU with tools/gpu_report.sh --rehearse"
    { read -r name && read -r precisions; } <<<"$found"
    docs=docs
    [[ $precisions == *fp8* ]] || echo "$name multiplies no float8: bf16 alone is measured"
fi
read -ra precisions <<<"$precisions"
results=$docs/benchmarks/$name
mkdir -p "$work" "$results" || fail "$results cannot be made: check its permissions"
[[ -z $rehearse ]] || cp docs/benchmarks.md "$docs/benchmarks.md"
checks=$results/checks.tsv
: >"$checks"

# What the parts may take, of 590 seconds.
declare -A shares=([tests]=130 [golden]=70 [kernels]=160 [steps]=120 [long]=60 [latency]=50)
left_over=0
failed=0

elapsed() { printf '%d:%02d' $((SECONDS / 60)) $((SECONDS % 60)); }

# Seconds that a part may take now: at least one, as none would be no limit.
allowed() {
    local limit=$((shares[$1] * seconds / 590 + left_over))
    echo $((limit > 0 ? limit : 1))
}

# part NAME COMMAND...: within its time, its output shown and kept; notes down what came of it.
part() {
    local name=$1 limit begin status outcome took words
    shift
    limit=$(allowed "$name") begin=$SECONDS
    printf '\n==== [%s] %s, at most %d s: %s\n' "$(elapsed)" "$name" "$limit" "$*"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$work/$name.log"
    status=${PIPESTATUS[0]} took=$((SECONDS - begin))
    left_over=$((limit > took ? limit - took : 0))
    case $status in
    0) outcome=passed ;;
    124 | 137) outcome="out of time" ;;
    *) outcome=failed ;;
    esac
    [[ $outcome == passed ]] || failed=$((failed + 1))
    words=$(grep -v '^[[:space:]]*$' "$work/$name.log" | tail -n 1 | tr '\t' ' ' | cut -c -120)
    printf '%s\t%s\t%d\t%s\n' "$name" "$outcome" "$took" "$words" >>"$checks"
}

# bench NAME ARGUMENTS...: a part whose figures go where the tables are made from.
bench() {
    local name=$1 device=(--device cuda) folder=$work/$1 file
    shift
    [[ -z $rehearse ]] || device=(--device cpu --small)
    # What is measured when the time is nearly up may still end within it.
    local budget=$(($(allowed "$name") * 17 / 20))
    rm -rf "$folder" "$results/$name.json" "$results/$name.png"
    part "$name" "$python" -m ttt_megatron.cli.main bench "${device[@]}" "$@" \
        --budget "$((budget > 0 ? budget : 1))" --output "$folder"
    for file in json png; do
        [[ ! -f $folder/bench.$file ]] || mv "$folder/bench.$file" "$results/$name.$file"
    done
}

pytest=("$python" -m pytest --continue-on-collection-errors)
if [[ -n $rehearse ]]; then
    part tests "${pytest[@]}" tests/kernels/test_work.py tests/kernels/test_swa_attention_work.py
    part golden "$python" tools/check_golden.py --device cpu tests/golden/F.npz
    bench kernels --only kernels --precision "${precisions[@]}" --repeats 3
    bench steps --only meta --lengths 256 --precision "${precisions[@]}" --step-repeats 1
    bench long --only meta --lengths 512 --step-repeats 1
    bench latency --only inner,latency --lengths 256 --step-repeats 1
else
    # Compiling is most of it: several processes do it at once where pytest-xdist is there.
    ! "$python" -c 'import xdist' 2>/dev/null || pytest+=(-n 8)
    part tests "${pytest[@]}" -m gpu tests/kernels tests/meta
    part golden "$python" tools/check_golden.py --device cuda tests/golden/*.npz
    bench kernels --only kernels --precision "${precisions[@]}"
    bench steps --only meta --sizes 125m 760m --lengths 8192 --precision "${precisions[@]}"
    bench long --only meta --sizes 125m --lengths 131072 32768 --precision bf16
    bench latency --only inner,latency --sizes 125m --lengths 8192 32768 131072 --precision bf16
fi

printf '\n==== [%s] summary\n' "$(elapsed)"
if ! "$python" tools/gpu_tables.py "$docs/benchmarks.md" --results "$results"; then
    failed=$((failed + 1))
    echo "the tables were not written: the raw figures are in $results"
fi
cat <<END

tables  $docs/benchmarks.md
raw     $results
logs    $work

END
if ((failed)); then
    echo "$failed of the parts did not pass, after $(elapsed)"
    exit 1
fi
echo "all parts passed in $(elapsed)"
