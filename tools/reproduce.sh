#!/usr/bin/env bash
# Trains every system of recipes/reproduction on long texts, and evaluates all of them.
#
#   bash tools/reproduce.sh TRAIN.jsonl.gz HELD_OUT.jsonl.gz
#   JOBS=2 SEEDS="1 2 3" bash tools/reproduce.sh books.jsonl held-out.jsonl
#
# The first seed trains all systems, the others HEADLINE alone. What is finished is not done again:
# the same command goes on after an interruption. Output of each run is in reproduction/logs.
set -euo pipefail

if [[ $# -ne 2 ]]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
TRAIN=$1
HELD_OUT=$2
JOBS=${JOBS:-2}
SEEDS=${SEEDS:-1 2 3}
HEADLINE=${HEADLINE:-e2e swa}
SYSTEMS=${SYSTEMS:-e2e swa full gated_delta naive off mamba2 ttt_kvb ttt_kvb_simplified hybrid e2e_all}
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
BIN=$ROOT/.venv/bin
RECIPES=$ROOT/recipes/reproduction
export BIN RECIPES ROOT
export OMP_NUM_THREADS=1

mkdir -p reproduction/logs
if [[ ! -f reproduction/data/index.json ]]; then
  "$BIN/python" "$ROOT/tools/cut_documents.py" "$HELD_OUT" --output reproduction/held-out.jsonl
  "$BIN/ttt-megatron" prepare "$TRAIN" --validation-input reproduction/held-out.jsonl \
    --tokenizer bpe:2048 --output reproduction/data
fi

# One system with one seed: both stages, then the evaluations.
one() {
  local system=$1 seed=$2 runs=reproduction/runs stage recipe first
  for stage in 1 2; do
    recipe=$RECIPES/stage$stage/$system.yaml
    [[ $system == e2e ]] && recipe=$RECIPES/stage$stage.yaml
    first=$runs/stage1-$system-seed$seed
    set -- "$recipe" "training.seed=$seed" "data.seed=$seed" \
      "training.output=$runs/stage$stage-$system-seed$seed" "name=$system-seed$seed-stage$stage"
    [[ $stage == 2 ]] && set -- "$@" "training.init_from=$first"
    "$BIN/ttt-megatron" train "$@" || return
  done
  if [[ ! -f $first/../stage2-$system-seed$seed/evaluation/context.json ]]; then
    "$BIN/ttt-megatron" evaluate "$runs/stage2-$system-seed$seed" --task position --task context \
      --length 4096 --last 256 --batch 4 || return
  fi
}
export -f one

failed=0
plan() {
  local seed first=1 system
  for seed in $SEEDS; do
    for system in $([[ $first == 1 ]] && echo "$SYSTEMS" || echo "$HEADLINE"); do
      echo "$system $seed"
    done
    first=0
  done
}
# A word a run: what it is and how it ended.
plan | xargs -P "$JOBS" -L 1 bash -c '
  log=reproduction/logs/$0-seed$1.log
  echo "$(date +%H:%M:%S) $0 seed $1: begins, output in $log"
  if one "$0" "$1" >>"$log" 2>&1; then
    echo "$(date +%H:%M:%S) $0 seed $1: done"
  else
    echo "$(date +%H:%M:%S) $0 seed $1: failed; the end of $log:"; tail -n 5 "$log"; exit 1
  fi' || failed=1
if [[ $failed == 1 ]]; then
  echo "some runs failed; the same command goes on with them" >&2
  exit 1
fi
"$BIN/ttt-megatron" report reproduction/runs/stage2-* --reference 'reproduction/runs/stage2-full-seed1' \
  --title 'The small reproduction' --output reproduction/report
