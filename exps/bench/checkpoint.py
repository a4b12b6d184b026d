"""How long a checkpoint delays training: written by a background thread, against `--no_async_save`.

    python exps/bench/checkpoint.py --gigabytes 0.5

One process trains a decoder on random tokens and saves several times. With `--no_async_save`, training waits until the
checkpoint is on disk. Our way only waits for a copy; steps that run while the thread writes are slower, which is
measured too. The last line printed is one JSON object.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from exps.bench import common  # noqa: E402
from model.decoder.chameleon import build_config, build_model, init_weights, reset_rotary_buffers  # noqa: E402
from model.training.async_checkpoint import CheckpointSaver  # noqa: E402
from model.training.checkpoint import CheckpointOptions, Position, TrainerState, read_state  # noqa: E402
from model.training.cpu_memory import keep_freed_memory  # noqa: E402
from model.training.distributed import Launch, process_group  # noqa: E402
from model.training.optim import OptimOptions, build_optimizer  # noqa: E402
from model.training.parallelize import ParallelOptions, build_mesh, parallelize  # noqa: E402

# fp32 weights twice (for resuming, and in the Hugging Face files) and two moments.
BYTES_PER_PARAMETER = 16
VOCAB_SIZE, HIDDEN_SIZE, INTERMEDIATE_SIZE = 8192, 512, 1376
# Before each save.
NUM_PLAIN_STEPS = 3
COLUMNS = ("gigabytes", "step_s", "stall_s", "slowed_s", "lost_s", "whole_s", "peak_gib")


def build_parser() -> argparse.ArgumentParser:
    parser = common.build_bench_parser(__doc__, repeats="saves to measure, after one to warm up")
    add = parser.add_argument
    size_help = "size of a checkpoint in GB, which gives the number of layers (default 0.5)"
    add("--gigabytes", type=float, default=0.5, help=size_help)
    add("--num_tokens", type=common.positive, default=256, help="tokens of a training step (default 256)")
    add("--output_dir", type=Path, help="folder on the disk to measure (default: a temporary one)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    device = common.choose_device(args.device)
    task = {"gigabytes": args.gigabytes, "num_tokens": args.num_tokens, "repeats": args.repeats, "device": device}

    def run(async_save: bool) -> dict[str, float]:
        with tempfile.TemporaryDirectory(dir=args.output_dir) as folder:
            return common.run_alone("checkpoint:measure", async_save=async_save, folder=folder, **task)

    baseline, ours = run(False), run(True)
    row = common.compare({"gigabytes": args.gigabytes}, ours, baseline, way="--no_async_save")
    return common.report("checkpoint", "A checkpoint, one process", device, [row], COLUMNS)


def measure(
    async_save: bool, folder: str, gigabytes: float, num_tokens: int, repeats: int, device: str
) -> dict[str, float]:
    """Medians over the saves after the first one, in seconds; size of a checkpoint in GB; peak host memory in GiB.

    `stall_s`: duration of `save`. `slowed_s`: delay of the steps that run while the thread writes. `lost_s`: the sum of
    both. `whole_s`: time from the call until the checkpoint is complete.
    """
    if device == "cpu":
        keep_freed_memory()
    with process_group(Launch(), device, timeout_s=600) as torch_device:
        step, saver = build_training(Path(folder), gigabytes, num_tokens, torch_device, async_save)
        # Allocates moments and gradients.
        step()
        saves = [measure_save(step, saver, number) for number in range(1 + repeats)]
    (checkpoint,) = Path(folder).glob("epoch*")
    size = sum(read_state(checkpoint).files.values())
    figures = {name: statistics.median(save[name] for save in saves[1:]) for name in saves[0]}
    return {**figures, "gigabytes": size / 1e9, "peak_gib": common.resident_gib()}


def build_training(
    folder: Path, gigabytes: float, num_tokens: int, device: torch.device, async_save: bool
) -> tuple[Callable[[], None], CheckpointSaver]:
    """A training step, which waits for the device, and the saver of its model."""
    config = build_config("tiny", **model_shape(gigabytes))
    options = ParallelOptions(precision="bf16" if device.type == "cuda" else "fp32", compile=False)
    model = parallelize(build_model(config), build_mesh(options, device.type, 1), options).to_empty(device=device)
    reset_rotary_buffers(model)
    init_weights(model, 0)
    optimizer = build_optimizer(model, OptimOptions())
    input_ids = torch.randint(0, VOCAB_SIZE, (1, num_tokens), generator=torch.Generator().manual_seed(0)).to(device)

    def step() -> None:
        model(input_ids, input_ids, loss_scale=1 / num_tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    keep = CheckpointOptions(folder, ckpt_max_keep=1, async_save=async_save)
    return step, CheckpointSaver(keep, model, optimizer, config, lambda folder: None, lambda line: None)


def model_shape(gigabytes: float) -> dict[str, int]:
    """A decoder of fixed widths, with as many layers as make a checkpoint of that size."""
    per_layer = 4 * HIDDEN_SIZE**2 + 3 * HIDDEN_SIZE * INTERMEDIATE_SIZE
    rest = gigabytes * 1e9 / BYTES_PER_PARAMETER - 2 * VOCAB_SIZE * HIDDEN_SIZE
    shape = {"vocab_size": VOCAB_SIZE, "hidden_size": HIDDEN_SIZE, "intermediate_size": INTERMEDIATE_SIZE}
    return {**shape, "num_hidden_layers": max(1, round(rest / per_layer))}


def measure_save(step: Callable[[], None], saver: CheckpointSaver, number: int) -> dict[str, float]:
    """Times some plain steps, a save, and the steps until the checkpoint is complete."""
    plain = statistics.median(timed(step) for _ in range(NUM_PLAIN_STEPS))
    state = TrainerState(Position(0, number + 1, number + 1), 1, 1, {})
    began = time.perf_counter()
    stall = timed(lambda: saver.save(f"epoch0-iter{number + 1}", state))
    slowed = []
    while saver.is_writing:
        slowed.append(timed(step) - plain)
    saver.wait()
    # The checkpoint is complete before the last step ends, half a step on average.
    whole, slowed_s = time.perf_counter() - began - (plain / 2 if slowed else 0), sum(slowed)
    return {"step_s": plain, "stall_s": stall, "slowed_s": slowed_s, "lost_s": stall + slowed_s, "whole_s": whole}


def timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    common.start(main)
