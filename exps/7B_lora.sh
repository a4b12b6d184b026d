#!/usr/bin/env bash
# Fine-tunes LoRA adapters and the image rows of the 7B model on one card of 24 or 48 GB (flags that follow are passed
# on and win):
#
#   pip install peft==0.21.2
#   bash exps/7B_lora.sh  (one GPU of 24 GB)
#   CARD_GIB=48 bash exps/7B_lora.sh  (one GPU of 48 GB: less recomputation)
#   NPROC=2 bash exps/7B_lora.sh  (several GPUs of one machine, by torchrun)
#
# DATA_CONFIG is the data, OUTPUT_DIR the folder of the results. `bash exps/7B_lora.sh --plan` prints the memory before
# anything is loaded. Other options are those of exps/7B.sh.
set -euo pipefail

# Adapters start from zero. Constant: min_lr is the same.
lr=1e-4
options=(
  --lora_rank 16
  --lora_alpha 32
  --train_only image_head
  --batch_size 1
  --accum_iter 8
  --lr "$lr"
  --min_lr "$lr"
  --num_workers 4
)
if [[ ${CARD_GIB:-24} -ge 48 ]]; then
  options+=(--no-checkpointing --checkpointing_selective)
fi
if [[ -z ${OUTPUT_DIR:-} ]]; then
  options+=(--output_dir output/7B_lora)
fi

export PACKING=0

# exec: a launcher's signals must reach the training itself.
exec bash "$(dirname "${BASH_SOURCE[0]}")/7B.sh" "${options[@]}" "$@"
