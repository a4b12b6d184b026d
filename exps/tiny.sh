#!/usr/bin/env bash
# The whole road on a laptop, without GPU and without network: data, tokenizers, tokens, training on two ranks, images.
#
#   bash exps/tiny.sh
#
# A second run resumes an interrupted one. OUT (default output/tiny) is the folder of all results.
# ITEMS, STEPS and PROMPTS shrink the run for a test; RANKS is the number of workers and of training ranks (default 2,
# but 1 training rank where there is one GPU).
set -euo pipefail
# Before `cd`: a relative path belongs to the caller's working directory.
if [[ -n ${OUT:-} && $OUT != /* ]]; then OUT=$PWD/$OUT; fi
cd "$(dirname "$0")/.."

OUT=${OUT:-output/tiny}
ITEMS=${ITEMS:-16000}
PROMPTS=${PROMPTS:-256}
PYTHON=${PYTHON:-python}
for name in ITEMS PROMPTS ${RANKS:+RANKS} ${STEPS:+STEPS}; do
  if [[ ! ${!name} =~ ^[1-9][0-9]*$ ]]; then
    echo "exps/tiny.sh: $name must be a whole number from 1 on, got '${!name}'" >&2
    exit 2
  fi
done
splits=${RANKS:-2}
if [[ -z ${RANKS:-} && $("$PYTHON" -c 'import torch; print(torch.cuda.device_count())') == 1 ]]; then RANKS=1; fi
RANKS=${RANKS:-2}
# One rank, too, has steps of 2 rows.
accum_iter=$((RANKS == 1 ? 2 : 1))
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > splits ? cores / splits : 1))}
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
seconds_at_start=$SECONDS

# Ctrl-C does not reach a worker in the background; a worker that outlives this script would block the next run.
# shellcheck disable=SC2154
trap 'running=$(jobs -p); if [[ -n $running ]]; then kill $running; wait; fi' EXIT

stage() { printf '\n[%3d s] %s\n' $((SECONDS - seconds_at_start)) "$*"; }

stage "1/6 scenes and conversations"
"$PYTHON" -u exps/tiny/make_data.py --out_dir "$OUT/data" --num_items "$ITEMS" --num_val_items $((ITEMS / 40 + 1))

stage "2/6 text tokenizer (the VQGAN is in exps/tiny/vqgan)"
"$PYTHON" -u exps/tiny/train_tokenizer.py --in_filename "$OUT/data/train.json" --out_dir "$OUT/tokenizer"

stage "3/6 tokens: $splits workers, and one for the validation items"
# NAME OUT_DIR SPLITS RANK, in the background: `exec` makes the worker itself the job, so that the trap reaches it.
tokenize() {
  exec "$PYTHON" -u pre_tokenize/pre_tokenize.py --splits="$3" --rank="$4" --in_filename "$OUT/data/$1.json" \
    --out_dir "$2" --target_size 64 --tokenizer "$OUT/tokenizer" --vqgan_dir exps/tiny/vqgan \
    --device cpu --precision fp32
}
workers=()
for rank in $(seq 0 $((splits - 1))); do
  tokenize train "$OUT/tokens" "$splits" "$rank" &
  workers+=($!)
done
tokenize val "$OUT/val_tokens" 1 0 &
workers+=($!)
for worker in "${workers[@]}"; do wait "$worker"; done

stage "4/6 one record"
"$PYTHON" -u pre_tokenize/concat_record.py --sub_record_dir "$OUT/tokens" --save_path "$OUT/tokens/record.json"
"$PYTHON" -u pre_tokenize/concat_record.py --sub_record_dir "$OUT/val_tokens" --save_path "$OUT/val_tokens/record.json"
printf 'META:\n  - path: tokens/record.json\n' > "$OUT/data.yaml"
printf 'META:\n  - path: val_tokens/record.json\n' > "$OUT/val_data.yaml"

stage "5/6 training, ranks: $RANKS"
"$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$RANKS" finetune_solver.py \
  --model_size tiny --tokenizer "$OUT/tokenizer" --data_config "$OUT/data.yaml" --output_dir "$OUT/checkpoints" \
  --batch_size 8 --accum_iter "$accum_iter" --epochs 2 --warmup_epochs 0.1 --lr 3e-3 --min_lr 3e-5 --wd 0.1 --clip_grad 4 \
  --max_seq_len 80 --disable_length_clustering --z_loss_weight 1e-5 --precision fp32 --data_parallel sdp \
  --num_workers 0 --save_iteration_interval $((400 * accum_iter)) --ckpt_max_keep 2 --auto_resume --log_interval 20 \
  --val_data_config "$OUT/val_data.yaml" --val_interval 400 --sample_interval 400 --vqgan_dir exps/tiny/vqgan \
  --sample_prompts "$OUT/data/samples.json" --target_size 64 --sample_max_gen_len 80 --sample_cfg 1 \
  --sample_temperature 0 \
  ${STEPS:+--max_steps "$STEPS"}

stage "6/6 images and scores"
"$PYTHON" -u exps/tiny/score.py --model_path "$OUT/checkpoints" --vqgan_dir exps/tiny/vqgan --out_dir "$OUT" \
  --num_prompts "$PROMPTS"
stage "done: look at $OUT/contact_sheet.png and $OUT/checkpoints/report.html"
