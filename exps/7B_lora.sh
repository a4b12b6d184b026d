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
# anything is loaded.
set -euo pipefail
# Before `cd`: a relative path belongs to the caller's working directory.
for name in DATA_CONFIG OUTPUT_DIR; do
  if [[ -n ${!name:-} && ${!name} != /* ]]; then printf -v "$name" %s "$PWD/${!name}"; fi
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Adapters start from zero. Constant: min_lr is the same.
lr=1e-4

options=(
  --model_size 7B
  --lora_rank 16
  --lora_alpha 32
  --train_only image_head
  --batch_size 1
  --accum_iter 8
  --epochs 2
  --warmup_epochs 0.01
  --lr "$lr"
  --min_lr "$lr"
  --wd 0.1
  --clip_grad 4
  --data_config "${DATA_CONFIG:-exps/data/sample.yaml}"
  --cache_ann_on_disk
  --num_workers 4
  --output_dir "${OUTPUT_DIR:-output/7B_lora}"
  --save_iteration_interval 1000
  --max_seq_len 4096
  --unmask_image_logits
  --dropout 0.05
  --z_loss_weight 1e-5
)
if [[ ${CARD_GIB:-24} -ge 48 ]]; then
  options+=(--checkpointing_selective)
else
  options+=(--checkpointing)
fi

launcher=(python -u)
if [[ -n ${NPROC:-} ]]; then
  launcher=(torchrun --nproc_per_node="$NPROC" --nnodes=1 --rdzv_backend=c10d --rdzv_endpoint=localhost:0)
fi

# exec: a launcher's signals must reach the training itself.
exec "${launcher[@]}" finetune_solver.py "${options[@]}" "$@"
