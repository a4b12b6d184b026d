#!/usr/bin/env bash
# Pre-tokenizes with one worker per GPU, then merges their records. Flags are those of pre_tokenize.py:
#
#   bash exps/pre_tokenize.sh --in_filename in.json --out_dir out --target_size 768  (the GPUs of this machine)
#   GPUS=2 bash exps/pre_tokenize.sh --in_filename in.json --out_dir out  (that many workers)
#   sbatch exps/pre_tokenize.sh --in_filename in.json --out_dir out  (one worker per task of srun; from the checkout)
#
# Each worker has a log in out/logs. The exit code is that of the worst worker (3: rejected items). The same command
# resumes. Before SLURM ends the job it sends SIGTERM to the workers, which finish their window; preempted, the job is
# requeued.
#SBATCH --job-name=pre_tokenize
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -uo pipefail

# SLURM runs a copy of this file.
root="$(dirname "${BASH_SOURCE[0]}")/.."
if [[ ! -f $root/pre_tokenize/pre_tokenize.py ]]; then root="${SLURM_SUBMIT_DIR:-.}"; fi
script="$root/pre_tokenize/pre_tokenize.py"

out_dir=""
for ((index = 1; index <= $#; index++)); do
  following=$((index + 1))
  case "${!index}" in
    --out_dir) out_dir="${!following:-}" ;;
    --out_dir=*) out_dir="${!index#*=}" ;;
  esac
done
if [[ -z $out_dir ]]; then
  echo "exps/pre_tokenize.sh: --out_dir is missing: the folder for token files and records" >&2
  exit 2
fi
mkdir -p "$out_dir/logs" || exit 2
code=0

# A worker that rejected items (3) has done its share; with any other code its share is not complete.
note() {
  if [[ $1 == 3 && $code == 0 ]]; then code=3; fi
  if [[ $1 != 0 && $1 != 3 ]]; then code=$1; fi
}

# In a job, but not inside of a step of it (srun --pty bash).
if [[ -n ${SLURM_JOB_ID:-} && -z ${SLURM_STEP_ID:-} ]]; then
  # srun does not take over the cores of the job's tasks. Each task sees its own alone, none of which it shares.
  # shellcheck disable=SC2016
  srun --kill-on-bad-exit=0 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    --output="$out_dir/logs/%t-of-$SLURM_NTASKS.log" bash -c \
    'exec python -u "$0" --splits="$SLURM_NTASKS" --rank="$SLURM_PROCID" --num_workers="${SLURM_CPUS_PER_TASK:-2}" "$@"' \
    "$script" "$@"
  note $?
else
  if [[ -v CUDA_VISIBLE_DEVICES ]]; then
    IFS=, read -ra devices <<< "$CUDA_VISIBLE_DEVICES"
  else
    mapfile -t devices < <(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null)
  fi
  workers="${GPUS:-${#devices[@]}}"
  if ((workers < 1)); then workers=1; fi
  if ((${#devices[@]} && workers > ${#devices[@]})); then
    echo "exps/pre_tokenize.sh: GPUS=$workers, but ${#devices[@]} GPUs are visible; give at most that many" >&2
    exit 2
  fi
  echo "$workers workers, logs in $out_dir/logs"
  pids=()
  for ((rank = 0; rank < workers; rank++)); do
    CUDA_VISIBLE_DEVICES="${devices[rank]:-}" python -u "$script" --splits="$workers" --rank="$rank" "$@" \
      > "$out_dir/logs/$rank-of-$workers.log" 2>&1 &
    pids+=($!)
  done
  trap 'kill -TERM "${pids[@]}" 2> /dev/null' TERM INT
  for ((rank = 0; rank < workers; rank++)); do
    status=0
    wait "${pids[rank]}" || status=$?
    # A signal ends `wait` before the worker.
    while kill -0 "${pids[rank]}" 2> /dev/null; do
      status=0
      wait "${pids[rank]}" || status=$?
    done
    if [[ $status != 0 ]]; then
      log="$out_dir/logs/$rank-of-$workers.log"
      echo "rank $rank ended with exit code $status, see $log: $(tail -n 1 "$log")" >&2
    fi
    note "$status"
  done
fi

if [[ $code == 0 || $code == 3 ]]; then
  python -u "$root/pre_tokenize/concat_record.py" --sub_record_dir "$out_dir" --save_path "$out_dir/record.json" ||
    code=$?
fi
exit "$code"
