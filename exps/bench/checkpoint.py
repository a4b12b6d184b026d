"""How long a training step stands still for a checkpoint: written by a thread, against written at once.

    python exps/bench/checkpoint.py --gigabytes 0.5

One decoder is trained on random tokens in one process, and saved several times: weights, both Adam moments and the
Hugging Face files, put on disk. The baseline is `--no_async_save`: training stands still until the checkpoint is
whole. Ours copies and goes on; what the writing thread takes from the steps beside it is measured too. The last line
printed is one JSON object.
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
from model.async_checkpoint import CheckpointSaver  # noqa: E402
from model.checkpoint import CheckpointOptions, Position, TrainerState, read_state  # noqa: E402
from model.cpu_memory import keep_freed_memory  # noqa: E402
from model.decoder.chameleon import build_config, build_model, init_weights, reset_rotary_buffers  # noqa: E402
from model.distributed import Launch, process_group  # noqa: E402
from model.optim import OptimOptions, build_optimizer  # noqa: E402
from model.parallelize import ParallelOptions, build_mesh, parallelize  # noqa: E402

BYTES_PER_PARAMETER = 16  # fp32 weights twice (for resuming, and in the Hugging Face files) and two moments
VOCAB_SIZE, HIDDEN_SIZE, INTERMEDIATE_SIZE = 8192, 512, 1376
NUM_PLAIN_STEPS = 3  # before each save
COLUMNS = ("gigabytes", "step_s", "stall_s", "slowed_s", "lost_s", "whole_s", "peak_gib")


def build_parser() -> argparse.ArgumentParser:
    parser = common.build_bench_parser(__doc__, repeats="saves measured, after one to warm up")
    add = parser.add_argument
    add("--gigabytes", type=float, default=0.5, help="size of a checkpoint, by the number of layers (default 0.5)")
    add("--num_tokens", type=common.positive, default=256, help="of a training step (default 256)")
    add("--output_dir", type=Path, help="folder on the disk to measure (default: a temporary one)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    device = common.choose_device(args.device)
    task = {"gigabytes": args.gigabytes, "num_tokens": args.num_tokens, "repeats": args.repeats, "device": device}
    results = []
    for async_save in (False, True):
        with tempfile.TemporaryDirectory(dir=args.output_dir) as folder:
            results.append(common.run_alone("checkpoint:measure", async_save=async_save, folder=folder, **task))
    baseline, ours = results
    row = common.compare({"gigabytes": args.gigabytes}, ours, baseline, way="--no_async_save")
    return common.report("checkpoint", "A checkpoint, one process", device, [row], COLUMNS)


def measure(
    async_save: bool, folder: str, gigabytes: float, num_tokens: int, repeats: int, device: str
) -> dict[str, float]:
    """Medians over the saves after the first one, in seconds; size of a checkpoint in GB; peak host memory in GiB.

    `stall_s` is how long `save` keeps the training, `slowed_s` how much longer than others the steps take that run
    while the thread writes, `lost_s` both, `whole_s` the time from the call until the checkpoint is whole.
    """
    if device == "cpu":
        keep_freed_memory()
    with process_group(Launch(), device, timeout_s=600) as torch_device:
        step, saver = build_training(Path(folder), gigabytes, num_tokens, torch_device, async_save)
        step()  # allocates moments and gradients
        saves = [measure_save(step, saver, number) for number in range(1 + repeats)]
    (checkpoint,) = Path(folder).glob("epoch*")
    size = sum(read_state(checkpoint).files.values())
    figures = {name: statistics.median(save[name] for save in saves[1:]) for name in saves[0]}
    return {**figures, "gigabytes": size / 1e9, "peak_gib": common.resident_gib()}


def build_training(
    folder: Path, gigabytes: float, num_tokens: int, device: torch.device, async_save: bool
) -> tuple[Callable[[], None], CheckpointSaver]:
    """A training step without arguments, which waits for the device, and the saver of its model."""
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
    """Widths fixed, as many layers as make a checkpoint of that size, at least one."""
    per_layer = 4 * HIDDEN_SIZE**2 + 3 * HIDDEN_SIZE * INTERMEDIATE_SIZE
    rest = gigabytes * 1e9 / BYTES_PER_PARAMETER - 2 * VOCAB_SIZE * HIDDEN_SIZE
    shape = {"vocab_size": VOCAB_SIZE, "hidden_size": HIDDEN_SIZE, "intermediate_size": INTERMEDIATE_SIZE}
    return {**shape, "num_hidden_layers": max(1, round(rest / per_layer))}


def measure_save(step: Callable[[], None], saver: CheckpointSaver, number: int) -> dict[str, float]:
    """Some plain steps, a save, and steps beside it until it is whole."""
    plain = statistics.median(timed(step) for _ in range(NUM_PLAIN_STEPS))
    state = TrainerState(Position(0, number + 1, number + 1), 1, 1, {})
    began = time.perf_counter()
    stall = timed(lambda: saver.save(f"epoch0-iter{number + 1}", state))
    slowed = []
    while saver.is_writing:
        slowed.append(timed(step) - plain)
    saver.wait()
    # The last step runs on after the checkpoint is whole, by half its length on average.
    whole = time.perf_counter() - began - (plain / 2 if slowed else 0)
    lost = stall + sum(slowed)
    return {"step_s": plain, "stall_s": stall, "slowed_s": sum(slowed), "lost_s": lost, "whole_s": whole}


def timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    common.start(main)
