#!/usr/bin/env bash
# A complete SLURM job; run from the checkout (edit the sizes, activate the environment before or below):
#
#   sbatch exps/slurm.sh  (trains exps/7B.sh)
#   sbatch exps/slurm.sh exps/34B.sh --epochs 3  (another script, with flags of its own)
#
# 120 seconds before its time ends, SLURM sends SIGTERM to the training, which saves; requeued, it resumes from there.
#SBATCH --job-name=finetune
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=2-00:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

script="${1:-exps/7B.sh}"
# srun starts one task per GPU; torchrun must not start in each.
unset NPROC

# exec: SIGTERM reaches srun, and the exit code of the training is the job's.
exec srun --kill-on-bad-exit=1 bash "$script" "${@:2}"
