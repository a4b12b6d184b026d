#!/usr/bin/env bash
# Fine-tunes the 34B model as the recipe does, with the options of exps/7B.sh. Flags that follow are passed on and win:
#
#   srun -n32 --ntasks-per-node=8 --gres=gpu:8 bash exps/34B.sh  (one task per GPU; exps/slurm.sh does it by sbatch)
#   NPROC=8 bash exps/34B.sh  (the GPUs of one machine, by torchrun)
#   NPROC=8 NNODES=4 RDZV_ENDPOINT=host:29500 bash exps/34B.sh  (the same line on each of four machines)
#
# DATA_CONFIG is the data, OUTPUT_DIR the folder of the results; PACKING=1 fills rows of batch_size x max_seq_len tokens.
set -euo pipefail

options=(--model_size 34B)
if [[ -z ${OUTPUT_DIR:-} ]]; then
  options+=(--output_dir output/34B)
fi

# exec: a launcher's signals must reach the training itself.
exec bash "$(dirname "${BASH_SOURCE[0]}")/7B.sh" "${options[@]}" "$@"
