#!/usr/bin/env bash
# What this checkout does on one GPU, in 5 to 16 minutes (the sum of the limits): the first thing to run on a GPU machine.
#
#   bash exps/bench/gpu.sh
#   STAGES="pre_tokenize train" OUT=/tmp/out bash exps/bench/gpu.sh
#
# STAGES (default: all) names what to run; each has a time limit:
#   tests         the tests marked `gpu`
#   encoder       the VQGAN's encoder alone in each precision: images per second, TFLOP/s, codes equal to fp32
#   tiny          the laptop default, exps/tiny.sh, with few items
#   pre_tokenize  images per second at 768 pixels: pre_tokenize.py, the recipe's way, and the host alone
#   train         five variants of the 7B step (1B on a GPU under 110 GiB) with memory and the allocator's counters;
#                 the one of exps/7B_one_gpu.sh only where torchao is installed
#   generate      one image of 768 x 768 pixels by 7B
# OUT (default output/gpu) gets NAME.log of each stage, one per variant, and summary.txt. A stage that fails
# stops no other one; the exit code is then 1. No network is needed: weights are random, and inputs are made here.
set -euo pipefail
cd "$(dirname "$0")/../.."

OUT=${OUT:-output/gpu}
PYTHON=${PYTHON:-python}
ALL="tests encoder tiny pre_tokenize train generate"
STAGES=${STAGES:-$ALL}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
for name in $STAGES; do
  if [[ " $ALL " != *" $name "* ]]; then
    echo "exps/bench/gpu.sh: STAGES may name $ALL, got '$name'" >&2
    exit 2
  fi
done
mkdir -p "$OUT"
# shellcheck disable=SC2154
trap 'running=$(jobs -p); if [[ -n $running ]]; then kill $running; wait; fi' EXIT

# stage NAME LOG SECONDS COMMAND...: runs the command if STAGES names it, and adds a line and the last lines of its log.
stage() {
  local name=$1 log=$2 limit=$3 code=0 start=$SECONDS
  shift 3
  [[ " $STAGES " == *" $name "* ]] || return 0
  timeout --kill-after=10 "$limit" "$@" > "$OUT/$log.log" 2>&1 &
  wait $! || code=$?
  {
    printf '\n## %s: exit code %d after %d s: %s\n' "$log" "$code" $((SECONDS - start)) "$*"
    # The JSON object of a bench stays in its log; progress bars end in carriage returns.
    tr '\r' '\n' < "$OUT/$log.log" | { grep -v '^{' || true; } | tail -n 12 | cut -c1-400
  } | tee -a "$OUT/summary.txt"
}

{
  date +%F
  nvidia-smi --query-gpu=name,memory.total --format=csv,noheader 2> /dev/null || echo "no GPU"
  "$PYTHON" -c 'import sys, torch, transformers; print(sys.version.split()[0], torch.__version__, transformers.__version__)'
} | tee "$OUT/summary.txt"

mapfile -t gpu_tests < <(grep -rl --include='test_*.py' mark.gpu tests)
stage tests tests 120 "$PYTHON" -m pytest -o addopts=--import-mode=importlib -q -p no:cacheprovider \
  --durations=5 -m gpu "${gpu_tests[@]}"
stage encoder encoder 110 "$PYTHON" exps/bench/encoder.py --batch_sizes 12
stage tiny tiny 90 env OUT="$OUT/tiny" ITEMS=800 STEPS=40 PROMPTS=8 PYTHON="$PYTHON" bash exps/tiny.sh
stage pre_tokenize pre_tokenize 130 "$PYTHON" exps/bench/pre_tokenize.py --target_size 768 --precision tf32 fp16
stage pre_tokenize pre_tokenize_host 50 "$PYTHON" exps/bench/pre_tokenize.py --target_size 768 --encoder none
stage train train_2rows 75 "$PYTHON" exps/bench/train.py --rows 2
stage train train_4rows_selective 75 "$PYTHON" exps/bench/train.py --rows 4 --checkpointing_selective
stage train train_8rows_checkpointing 75 "$PYTHON" exps/bench/train.py --rows 8 --checkpointing
stage train train_4rows_split 75 "$PYTHON" exps/bench/train.py --rows 4 --checkpointing_selective --master_weights split
if "$PYTHON" -c 'import torchao' 2> /dev/null; then
  stage train train_one_gpu 75 "$PYTHON" exps/bench/train.py --model_size 7B --rows 1 --checkpointing --accum_iter 2 \
    --master_weights split --optim adamw_8bit
fi
stage generate generate 75 "$PYTHON" exps/bench/generate.py --model_size 7B --batch_sizes 1 --cfg 4 --num_tokens 2300 \
  --repeats 1 --ways ours

! grep -q '^## .*: exit code [1-9]' "$OUT/summary.txt"
