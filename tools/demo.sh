#!/usr/bin/env bash
# The whole way on real text: prepare, train a small TTT model and a plain control in two stages,
# evaluate both, generate. What is finished is not done again, so an interrupted demo goes on.
# $CORPUS names other text (a file, a folder, .jsonl or .jsonl.gz); `make demo` calls this.
set -euo pipefail

corpus=${CORPUS:-}
[[ -z $corpus ]] || corpus=$(realpath -m "$corpus") # before the folder changes
cd "$(dirname "$0")/.."
ttt=.venv/bin/ttt-megatron
python=.venv/bin/python
if [[ ! -x $ttt ]]; then
    echo "error: $PWD/$ttt is missing: run make install" >&2
    exit 2
fi
if [[ -n $corpus && ! -e $corpus ]]; then
    echo "error: CORPUS=$corpus does not exist: check the path" >&2
    exit 2
fi

# Two processes share two cores: more threads would only get into each other's way.
export OMP_NUM_THREADS=1
export CUDA_VISIBLE_DEVICES= # a model this small is trained on the CPU, GPU or not
length=4096 # tokens a sequence at stage 2
bpe_size=1024
out=demo
if [[ -n $corpus ]]; then
    name=$(basename "$corpus" | tr -cs '[:alnum:]._\n' '-')
    out=demo/$name-$(printf %s "$corpus" | cksum | cut -d' ' -f1)
fi
done_dir=$out/finished   # an empty file a step
seconds_dir=$out/seconds # a file a step, holding the seconds it took so far
mkdir -p "$done_dir" "$seconds_dir"
current= # the step that runs
started=0
# Processes started in the background must not outlive this script; time spent in vain counts too.
trap 'jobs -p | xargs -r kill 2>/dev/null || true; account' EXIT

elapsed() { printf '%d:%02d' $((SECONDS / 60)) $((SECONDS % 60)); }
heading() { printf '\n==== [%s] %s\n' "$(elapsed)" "$1"; }

# Adds the time of the step that runs to what it took before.
account() {
    [[ -n $current ]] || return 0
    local file=$seconds_dir/$current before=0
    [[ ! -f $file ]] || before=$(<"$file")
    echo $((before + SECONDS - started)) >"$file"
    current=
}

# step NAME TITLE COMMAND...: runs the command unless it is done.
step() {
    local name=$1 title=$2
    shift 2
    if [[ -f $done_dir/$name ]]; then
        heading "$title (done before)"
        return
    fi
    heading "$title"
    current=$name started=$SECONDS
    "$@"
    account
    touch "$done_dir/$name"
}

prepare() {
    local input options=()
    if [[ -z $corpus ]]; then
        input=$("$python" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
        # Installed packages are not the library, and tables are not prose: they flatter every model.
        options=(--include '*.py')
        local name
        for name in site-packages dist-packages encodings pydoc_data lib2to3/tests/data \
            test_stable_abi_ctypes.py '_sysconfigdata*'; do
            options+=(--exclude "$name")
        done
    elif [[ -f $corpus && $corpus != *.jsonl && $corpus != *.jsonl.gz ]]; then
        # One file is one document; pieces of it leave something to hold out.
        local bytes
        bytes=$(($(stat -L -c %s "$corpus") / 40))
        bytes=$((bytes < 16384 ? 16384 : bytes > 65536 ? 65536 : bytes))
        input=$out/pieces
        rm -rf "$input"
        mkdir -p "$input"
        split --line-bytes="$bytes" --numeric-suffixes --suffix-length=5 \
            --additional-suffix=.txt "$corpus" "$input/"
    else
        input=$corpus
    fi
    echo "text: $input"
    local replace=()
    [[ ! -e $out/data ]] || replace=(--overwrite)
    "$ttt" prepare "$input" "${options[@]}" --non-utf8 skip --tokenizer "bpe:$bpe_size" \
        --output "$out/data" "${replace[@]}"
}

# train RECIPE key=value...
train() {
    local name=$1
    shift
    "$ttt" train "recipes/demo/$name.yaml" "data.path=$out/data" "training.output=$out/runs/$name" "$@"
}

train_stage2() {
    train "$1" "training.init_from=$out/runs/$2" "data.packing=$packing"
}

# Both stages at once, one on each core.
evaluate() {
    local stage processes=()
    for stage in 1 2; do
        "$ttt" evaluate "$out/runs/stage$stage" --control "$out/runs/control-stage$stage" \
            --length "$evaluation_length" --documents 64 --batch 4 \
            >"$out/evaluate-stage$stage.log" 2>&1 &
        processes+=($!)
    done
    for stage in 1 2; do
        if ! wait "${processes[stage - 1]}"; then
            cat "$out/evaluate-stage$stage.log" >&2
            return 1
        fi
    done
    "$ttt" compare "stage 2=$out/runs/stage2" "stage 1=$out/runs/stage1" \
        --title "held-out text, before (dashed) and after stage 2" \
        --output "$out" --log-to "$out/runs/stage2"
}

generate() {
    "$python" tools/demo_data.py prompt "$out/data" 1500 >"$out/prompt.txt"
    "$ttt" generate "$out/runs/stage2" --prompt-file "$out/prompt.txt" --tokens 200 \
        --temperature 1.0 --top-p 0.9 >"$out/continuation.txt"
    {
        echo "----- a held-out document was read, $(wc -c <"$out/prompt.txt") bytes; its end:"
        tail -c 400 "$out/prompt.txt" | iconv -c -f utf-8 -t utf-8
        printf '\n----- the model went on:\n'
        cat "$out/continuation.txt"
    } >"$out/sample.txt"
}

# Seconds that the steps of these names took, whenever they ran.
seconds_of() {
    local path total=0
    for path in "$@"; do
        total=$((total + $(<"$path")))
    done
    echo $total
}

minutes() { printf '%d.%d minutes' $(($1 / 60)) $(($1 % 60 / 6)); }

report() {
    local training all
    training=$(seconds_of "$seconds_dir"/train-*)
    all=$(seconds_of "$seconds_dir"/*)
    {
        printf '# Demo\n\n'
        cat "$out/comparison.md"
        printf '\n![loss by position](comparison.png)\n\n## Sample\n\n```\n'
        cat "$out/sample.txt"
        printf '```\n\nIt took %s, of which training %s.\n' "$(minutes "$all")" "$(minutes "$training")"
    } >"$out/report.md"
    cat <<END

report       $out/report.md
plot         $out/comparison.png
checkpoints  $out/runs/{stage1,stage2,control-stage1,control-stage2}/checkpoints
MLflow       ${MLFLOW_TRACKING_URI:-sqlite:///$PWD/$out/runs/mlflow.db}
time         $(minutes "$all") for all steps, of which training $(minutes "$training")

next:
  $ttt generate $out/runs/stage2 --prompt 'BEGINNING OF A TEXT' --tokens 200
  $ttt evaluate $out/runs/stage2 --length 8192
  .venv/bin/mlflow ui --backend-store-uri ${MLFLOW_TRACKING_URI:-sqlite:///$out/runs/mlflow.db}
  rm -r $out    # to start over
END
}

step prepare "1/6 Prepare text" prepare
read -r packing evaluation_length < <("$python" tools/demo_data.py lengths "$out/data" "$length") ||
    exit 2
if [[ $packing != spans ]]; then
    echo "No document is longer than $length tokens: stage 2 reads them end to end."
fi
step train-stage1 "2/6 Train, stage 1: 256 tokens a sequence" train stage1
step train-stage2 "3/6 Train, stage 2: $length tokens a sequence" train_stage2 stage2 stage1
step train-control1 "4/6 Train the plain control, stage 1" train control-stage1
step train-control2 "4/6 Train the plain control, stage 2" \
    train_stage2 control-stage2 control-stage1
step evaluate "5/6 Evaluate: loss by position, inner steps on, off, and the control" evaluate
step generate "6/6 Generate" generate
heading "Sample"
cat "$out/sample.txt"
heading "Done"
report
