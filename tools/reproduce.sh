#!/usr/bin/env bash
# Trains every system of recipes/reproduction on long texts, and evaluates all of them.
#
#   bash tools/reproduce.sh TRAIN.jsonl.gz HELD_OUT.jsonl.gz
#   JOBS=2 SEEDS="1 2 3" bash tools/reproduce.sh books.jsonl held-out.jsonl
#   SIZE=30m bash tools/reproduce.sh books.jsonl held-out.jsonl   # on a GPU
#
# The first seed trains all systems, the others HEADLINE alone; each the toy. What is finished is
# not done again: the same command goes on after an interruption. Output is in reproduction/logs,
# or reproduction-30m/logs. BIN is the folder of python and ttt-megatron.
# SETTINGS are of every training: SETTINGS="training.steps=20" looks whether all of it works.
set -euo pipefail

if [[ $# -ne 2 ]]; then
  sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
TRAIN=$1
HELD_OUT=$2
JOBS=${JOBS:-2}
SEEDS=${SEEDS:-1 2 3}
HEADLINE=${HEADLINE:-e2e swa}
SETTINGS=${SETTINGS:-}
SYSTEMS=${SYSTEMS:-e2e swa full gated_delta naive off mamba2 ttt_kvb ttt_kvb_simplified hybrid
  swa-compute full-compute e2e_all}
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
BIN=${BIN:-$ROOT/.venv/bin}
SIZE=${SIZE:-small}
case $SIZE in
  small)
    OUT=reproduction TITLE='The small reproduction' VOCABULARY=bpe:2048 PIECES=()
    EVALUATE='--length 4096 --last 256 --batch 4'
    TOY=${TOY-e2e naive off swa full}
    ;;
  30m)
    OUT=reproduction-30m TITLE='The reproduction at 30M' VOCABULARY=bpe:8192
    PIECES=(--characters 150000 --pieces 4)
    EVALUATE='--length 32768 --last 1024 --batch 8'
    TOY=
    ;;
  *)
    echo "SIZE=$SIZE: there are small and 30m" >&2
    exit 2
    ;;
esac
RECIPES=$ROOT/recipes/$OUT
export BIN RECIPES ROOT SETTINGS OUT EVALUATE
export OMP_NUM_THREADS=1

mkdir -p "$OUT/logs"
if [[ ! -f $OUT/data/index.json ]]; then
  "$BIN/python" "$ROOT/tools/cut_documents.py" "$HELD_OUT" "${PIECES[@]}" \
    --output "$OUT/held-out.jsonl"
  "$BIN/ttt-megatron" prepare "$TRAIN" --validation-input "$OUT/held-out.jsonl" \
    --tokenizer "$VOCABULARY" --output "$OUT/data"
fi

# The recipe of a system: the base's own is TTT-E2E's.
recipe_of() {
  if [[ $2 == e2e ]]; then echo "$RECIPES/$1.yaml"; else echo "$RECIPES/$1/$2.yaml"; fi
}

# A toy with one seed.
toy() {
  local run=$OUT/runs/toy-$1-seed$2
  "$BIN/ttt-megatron" train "$(recipe_of toy "$1")" "training.seed=$2" "data.seed=$2" \
    "training.output=$run" "name=toy-$1-seed$2" $SETTINGS || return
  if [[ ! -f $run/evaluation/by_position.json ]]; then
    "$BIN/ttt-megatron" evaluate "$run" --length 128 --documents 0 --batch 16 || return
  fi
}

# One system with one seed: both stages, then the evaluations.
one() {
  local system=$1 seed=$2 runs=$OUT/runs stage recipe first last
  for stage in 1 2; do
    recipe=$(recipe_of "stage$stage" "$system")
    first=$runs/stage1-$system-seed$seed
    set -- "$recipe" "training.seed=$seed" "data.seed=$seed" \
      "training.output=$runs/stage$stage-$system-seed$seed" "name=$system-seed$seed"
    [[ $stage == 2 ]] && set -- "$@" "training.init_from=$first"
    "$BIN/ttt-megatron" train "$@" $SETTINGS || return
  done
  last=$runs/stage2-$system-seed$seed
  if [[ ! -f $last/evaluation/context.json ]]; then
    "$BIN/ttt-megatron" evaluate "$last" --task position --task context \
      $EVALUATE || return
  fi
}
export -f recipe_of toy one

failed=0
plan() {
  local seed first=1 system
  for seed in $SEEDS; do
    for system in $([[ $first == 1 ]] && echo "$SYSTEMS" || echo "$HEADLINE"); do
      echo "one $system $seed"
    done
    first=0
  done
  for seed in $SEEDS; do
    for system in $TOY; do echo "toy $system $seed"; done
  done
}
# A word a run: what it is and how it ended.
plan | xargs -P "$JOBS" -L 1 bash -c '
  what=$1 log=$OUT/logs/$1-seed$2.log
  [[ $0 == toy ]] && what="toy $1" log=$OUT/logs/toy-$1-seed$2.log
  echo "$(date +%H:%M:%S) $what seed $2: begins, output in $log"
  if "$0" "$1" "$2" >>"$log" 2>&1; then
    echo "$(date +%H:%M:%S) $what seed $2: done"
  else
    echo "$(date +%H:%M:%S) $what seed $2: failed; the end of $log:"; tail -n 5 "$log"; exit 1
  fi' || failed=1
if [[ $failed == 1 ]]; then
  echo "some runs failed; the same command goes on with them" >&2
  exit 1
fi
if [[ -n $TOY ]]; then
  "$BIN/ttt-megatron" report "$OUT"/runs/toy-* --title 'The toy' \
    --output "$OUT/report-toy"
fi
"$BIN/ttt-megatron" report "$OUT"/runs/stage2-* --title "$TITLE" --output "$OUT/report"
