#!/usr/bin/env bash
# Fine-tunes the 7B model as the recipe does. Flags that follow are passed on and win:
#
#   srun -n32 --ntasks-per-node=8 --gres=gpu:8 bash exps/7B.sh  (one task per GPU; exps/slurm.sh does it by sbatch)
#   NPROC=8 bash exps/7B.sh  (the GPUs of one machine, by torchrun)
#   NPROC=8 NNODES=4 RDZV_ENDPOINT=host:29500 bash exps/7B.sh  (the same line on each of four machines)
#
# DATA_CONFIG is the data, OUTPUT_DIR the folder of the results; PACKING=1 fills rows of batch_size x max_seq_len tokens.
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
  --batch_size 8
  --accum_iter 1
  --epochs 2
  --warmup_epochs 0.01
  --lr "$lr"
  --min_lr "$lr"
  --wd 0.1
  --clip_grad 4
  --data_config "${DATA_CONFIG:-exps/data/sample.yaml}"
  --cache_ann_on_disk
  --num_workers 8
  --output_dir "${OUTPUT_DIR:-output/7B}"
  --save_iteration_interval 1000
  --checkpointing
  --max_seq_len 4096
  --unmask_image_logits
  --dropout 0.05
  --z_loss_weight 1e-5
)
if [[ ${PACKING:-0} == 1 ]]; then
  options+=(--packing)
fi

launcher=(python -u)
if [[ -n ${NPROC:-} ]]; then
  launcher=(
    torchrun --nproc_per_node="$NPROC" --nnodes="${NNODES:-1}"
    --rdzv_backend=c10d --rdzv_endpoint="${RDZV_ENDPOINT:-localhost:0}"
  )
fi

# exec: a launcher's signals must reach the training itself.
exec "${launcher[@]}" finetune_solver.py "${options[@]}" "$@"
