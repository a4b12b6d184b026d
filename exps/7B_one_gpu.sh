#!/usr/bin/env bash
# Fine-tunes all weights of the 7B model on one GPU, on rows of 4,096 tokens (flags that follow are passed on and win):
#
#   bash exps/7B_one_gpu.sh  (80 GB: split masters and moments in 8 bits; pip install --no-deps torchao==0.18.0)
#   CARD_GB=141 bash exps/7B_one_gpu.sh  (141 GB: fp32 masters and moments, 4 items in a row)
#
# DATA_CONFIG is the data, OUTPUT_DIR the folder of the results. `bash exps/7B_one_gpu.sh --plan` prints the memory
# before anything is loaded. Speed: 141 GB was measured at 10,458 tokens/s (one H200), 80 GB was not measured.
set -euo pipefail
# Before `cd`: a relative path belongs to the caller's working directory.
for name in DATA_CONFIG OUTPUT_DIR; do
  if [[ -n ${!name:-} && ${!name} != /* ]]; then printf -v "$name" %s "$PWD/${!name}"; fi
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Constant: min_lr is the same.
lr=2e-5

options=(
  --model_size 7B
  --epochs 2
  --warmup_epochs 0.01
  --lr "$lr"
  --min_lr "$lr"
  --wd 0.1
  --clip_grad 4
  --data_config "${DATA_CONFIG:-exps/data/sample.yaml}"
  --cache_ann_on_disk
  --num_workers 8
  --output_dir "${OUTPUT_DIR:-output/7B_one_gpu}"
  --save_iteration_interval 1000
  --max_seq_len 4096
  --unmask_image_logits
  --dropout 0.05
  --z_loss_weight 1e-5
)
# Both ways take steps of 8 items.
if [[ ${CARD_GB:-80} -ge 141 ]]; then
  options+=(--batch_size 4 --accum_iter 2 --checkpointing_selective)
else
  options+=(--batch_size 1 --accum_iter 8 --checkpointing --master_weights split --optim adamw_8bit)
fi

# Near the limit of a GPU, blocks of fixed size leave gaps between them that no tensor fits.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
# exec: a launcher's signals must reach the training itself.
exec python -u finetune_solver.py "${options[@]}" "$@"
