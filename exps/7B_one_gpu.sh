#!/usr/bin/env bash
# Fine-tunes all weights of the 7B model on one GPU, on rows of 4,096 tokens (flags that follow are passed on and win):
#
#   bash exps/7B_one_gpu.sh  (80 GB: split masters and moments in 8 bits; pip install --no-deps torchao==0.18.0)
#   CARD_GIB=141 bash exps/7B_one_gpu.sh  (141 GB: fp32 masters and moments, 4 items in a row)
#
# DATA_CONFIG is the data, OUTPUT_DIR the folder of the results. Other options are those of exps/7B.sh. `bash
# exps/7B_one_gpu.sh --plan` prints the memory before anything is loaded. Speed: 141 GB was measured at 10,458 tokens/s
# (one H200), 80 GB was not measured.
set -euo pipefail

# Both ways take steps of 8 items.
if [[ ${CARD_GIB:-80} -ge 141 ]]; then
  options=(--batch_size 4 --accum_iter 2 --no-checkpointing --checkpointing_selective)
else
  options=(--batch_size 1 --accum_iter 8 --master_weights split --optim adamw_8bit)
fi
if [[ -z ${OUTPUT_DIR:-} ]]; then
  options+=(--output_dir output/7B_one_gpu)
fi

# Near the limit of a GPU, blocks of fixed size leave gaps between them that no tensor fits.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}" NPROC=

# exec: a launcher's signals must reach the training itself.
exec bash "$(dirname "${BASH_SOURCE[0]}")/7B.sh" "${options[@]}" "$@"
