#!/usr/bin/env bash
# Every bench of this repo, one after the other: a JSON object for each, and one table with versions, device and date.
#
#   bash exps/bench/all.sh
#
# OUT (default output/bench) is the folder of the results: NAME.json, NAME.log, NAME.err, and table.md. SCALE says how
# large they are: gpu (within 8 minutes on one GPU), cpu or ci (the smallest); by default what the machine has. BENCHES
# (default: all of them) names those to run, LIMIT_S (default 240) the longest that one may take, TOTAL_S (default 480
# on a GPU, else no limit) the longest that all may take. A bench that fails, or that no time is left for, is a line of
# the table that says so, beside what it measured before, and the script then ends with exit code 1.
set -euo pipefail
cd "$(dirname "$0")/../.."

OUT=${OUT:-output/bench}
PYTHON=${PYTHON:-python}
LIMIT_S=${LIMIT_S:-}
ALL="train generate checkpoint pre_tokenize data"
BENCHES=${BENCHES:-$ALL}
SCALE=${SCALE:-$("$PYTHON" -c 'import torch; print("gpu" if torch.cuda.is_available() else "cpu")')}
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
for name in $BENCHES; do
  if [[ " $ALL " != *" $name "* ]]; then
    echo "exps/bench/all.sh: BENCHES may name $ALL, got '$name'" >&2
    exit 2
  fi
done
total=${TOTAL_S:-}
case $SCALE in
  gpu) limit=${LIMIT_S:-240} total=${TOTAL_S:-480} ;;
  cpu) limit=${LIMIT_S:-1800} ;;
  ci) limit=${LIMIT_S:-240} ;;
  *) echo "exps/bench/all.sh: SCALE must be gpu, cpu or ci, got '$SCALE'" >&2 && exit 2 ;;
esac

failed=0
mkdir -p "$OUT"
date +%F > "$OUT/table.md"
# shellcheck disable=SC2154
trap 'running=$(jobs -p); if [[ -n $running ]]; then kill $running; wait; fi' EXIT

# bench SCRIPT FLAGS...: runs it if BENCHES names it. One that fails may have measured one of its ways: its object stays.
bench() {
  local name start=$SECONDS code=0 seconds=$limit
  name=$(basename "$1" .py)
  [[ " $BENCHES " == *" $name "* ]] || return 0
  printf '[%3d s] %s\n' "$SECONDS" "$*"
  rm -f "$OUT/$name.json" "$OUT/$name.log"
  if [[ -n $total ]] && ((total - SECONDS < seconds)); then seconds=$((total - SECONDS)); fi
  if ((seconds > 0)); then
    timeout --kill-after=10 "$seconds" "$PYTHON" -u "$@" > "$OUT/$name.log" 2> "$OUT/$name.err" &
    wait $! || code=$?
    if [[ $(tail -n 1 "$OUT/$name.log") == "{"*"}" ]]; then
      tail -n 1 "$OUT/$name.log" > "$OUT/$name.json.part" && mv "$OUT/$name.json.part" "$OUT/$name.json"
    fi
  else
    code=124 # as `timeout` says it
    echo "no time was left of TOTAL_S=$total" > "$OUT/$name.err"
  fi
  if ((code != 0)); then
    failed=1
    echo "exps/bench/all.sh: $name ended with exit code $code after $((SECONDS - start)) s:" >&2
    tail -n 5 "$OUT/$name.err" >&2
  fi
  {
    printf '\n## %s\n\n    python %s  # %d s\n\n' "$name" "$*" $((SECONDS - start))
    if ((code != 0)); then printf 'failed: exit code %d, see %s.err\n\n' "$code" "$name"; fi
    if [[ -s $OUT/$name.log ]]; then grep -v '^{' "$OUT/$name.log" || true; fi
  } >> "$OUT/table.md"
}

if [[ $SCALE == gpu ]]; then
  bench exps/bench/train.py --rows 2 --checkpointing --baseline
  bench exps/bench/generate.py --model_size 1B --batch_sizes 8 --cfg 4 --num_tokens 256 --repeats 1 --ways ours batched
  bench exps/bench/checkpoint.py --gigabytes 2 --repeats 1
  bench exps/bench/pre_tokenize.py --target_size 768 --precision tf32 fp16
  bench exps/bench/data.py --num_items 100000 --repeats 1 --num_workers 0 4
elif [[ $SCALE == cpu ]]; then
  bench exps/bench/train.py --model_size bench --baseline --num_items 4 --item_len 300 1100 --precision fp32 bf16
  bench exps/bench/generate.py --model_size tiny --batch_sizes 8 --cfg 4 --repeats 1
  bench exps/bench/checkpoint.py --gigabytes 0.5
  bench exps/bench/pre_tokenize.py --num_images 16 --target_size 512
  bench exps/bench/data.py --num_items 100000 --repeats 1
else
  bench exps/bench/train.py --model_size tiny --baseline --num_items 2 --item_len 20 40 --repeats 1
  bench exps/bench/generate.py --model_size tiny --batch_sizes 2 --cfg 1 --num_tokens 8 --repeats 1 --ways ours batched
  bench exps/bench/checkpoint.py --gigabytes 0.15 --num_tokens 16 --repeats 1
  bench exps/bench/pre_tokenize.py --num_images 1 --target_size 64 --precision fp32 --vqgan_dir exps/tiny/vqgan
  bench exps/bench/data.py --num_items 2000 --num_rows 100 --batch_size 4 --num_ranks 1 --lengths 30 80 \
    --max_seq_len 832 --num_workers 0 --repeats 1
fi

cat "$OUT/table.md"
exit $failed
