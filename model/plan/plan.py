"""What a run will need before it is paid for: memory of a rank, steps, arithmetic and disk. No weights, no GPU.

    python finetune_solver.py --plan --plan_world_size 32 --model_size 34B --batch_size 8 --checkpointing

The plan takes an optimizer step of the run itself on tensors without values, as rank 0 of a process group that sends
nothing, with the largest rows that the options allow. `StorageTracker` counts what is alive. Tensors are on the CPU;
where CUDA computes otherwise (the flash kernel, one byte per element for dropout) the plan does as CUDA does.

The peak leaves out what `--compile` saves, the samples of `--sample_interval`, and the copies of a layer's shards on
the GPU under `--cpu_offload`. `needed_gib` adds room for the context of CUDA, NCCL, cuBLAS and fragmentation.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from data.epoch.dataset import TokenDataset
from data.epoch.packing import plan_epoch, round_row_len
from data.formats.data_config import load_data_config
from data.items.item_processor import load_text_tokenizer
from model.decoder.attention import as_on_cuda
from model.decoder.chameleon import IMAGE_TOKEN_PREFIX, ChameleonXLLMXConfig, build_config, build_model, grow_positions
from model.decoder.trainable import choose_trainable
from model.decoder.trained_rows import ROWS_NAME
from model.plan.storage_tracker import ACTIVATIONS, GRADIENTS, KINDS, LOSS, OPTIMIZER, PARAMETERS, StorageTracker
from model.run.flops import mean_document_len, trained_flops_per_token
from model.run.options import Options
from model.training.distributed import Launch, stop_at_start
from model.training.optim import OptimOptions, build_optimizer
from model.training.parallelize import allocate, build_mesh
from model.training.step import build_sharded, micro_step, optimizer_step
from model.training.step_guard import StepGuard
from model.weights.hf_folder import load_config

GIB = 2**30
# Chameleon's vocabulary, where no tokenizer and no config.json is at hand. For memory the number of names is enough.
VOCAB_SIZE = 65536
IMAGE_TOKENS = {f"{IMAGE_TOKEN_PREFIX}{number}": 4 + number for number in range(8192)}
# Positions in a row are int32.
MAX_ROW_LEN = 2**31 - 1
# The node of --data_parallel hsdp, unless --hsdp_shard_size says otherwise.
RANKS_PER_NODE = 8
# Memory that torch finds on cards by the gigabytes they are sold with: RTX 4090, L40, H100, H200 (the least seen in
# messages of CUDA out of memory, rounded down).
CARDS_GIB = {24: 23.5, 48: 44.4, 80: 79.1, 141: 139.0}
# Room beside the peak: the context of CUDA and the buffers of NCCL and cuBLAS, and 5% for holes and errors of the plan.
FIXED_HEADROOM_GIB = 1.5
HEADROOM_SHARE = 0.05
# What --cpu_offload moves to the host.
HOST_KINDS = (PARAMETERS, GRADIENTS, OPTIMIZER)
# Both moments of a trained parameter in a checkpoint. In 8 bits: a code per value, and an fp32 scale per 256 codes.
MOMENTS_BYTES = {"adamw": 8.0, "adamw_8bit": 2 * (1 + 4 / 256)}


@dataclass(frozen=True)
class EpochSize:
    """The first epoch of the data, lengths in tokens."""

    # None: no data are known.
    num_steps: int | None
    num_tokens: int | None
    # The longest row that any epoch may have.
    max_row_len: int
    max_document_len: int
    mean_document_len: float


def print_plan(options: Options, launch: Launch) -> int:
    """Prints the plan, a JSON object as its last line; under a launcher the first rank plans alone.

    Returns the exit code: 0 for a plan, whether it fits or not, 2 for wrong options or a wrong model.
    """
    if not launch.is_main:
        return 0
    world_size = options.planning.plan_world_size
    problems = options.problems(world_size, min(RANKS_PER_NODE, world_size), is_plan=True)
    if options.data.max_row_len > MAX_ROW_LEN:
        row = f"a row of {options.data.max_row_len:,} tokens is too long (at most {MAX_ROW_LEN:,})"
        problems.append(f"{row}: lower --batch_size or --max_seq_len")
    try:
        config = find_config(options)
        model = choose_trainable(build_model(config, device="meta"), options.trainable)
    except (ValueError, OSError, ImportError) as error:
        problems.append(str(error))
    if problems:
        lines = ["finetune_solver.py: there is nothing to plan:", *dict.fromkeys(problems)]
        return stop_at_start(launch, "\n  - ".join(lines))
    unknown, longest = None, options.data.max_seq_len
    try:
        epoch = size_epoch(options, world_size)
    except (ValueError, OSError) as error:
        unknown, epoch = str(error), EpochSize(None, None, options.data.max_row_len, longest, longest)
    memory = plan_memory(config, options, world_size, epoch.max_row_len, epoch.max_document_len)
    disk = checkpoint_bytes(model, options)
    figures = summarize_plan(options, memory, epoch) | {
        # Trained image rows are rows of matrices that are counted already.
        "num_parameters": sum(p.numel() for name, p in model.named_parameters() if not name.endswith(f".{ROWS_NAME}")),
        "num_trained_parameters": count_trained(model),
        "flops_per_token": trained_flops_per_token(model, epoch.mean_document_len),
        "checkpoint_gib": round(sum(disk.values()) / GIB, 2),
    }
    print("\n".join(describe(figures, memory.on_host, disk, unknown)))
    print(json.dumps(figures), flush=True)
    return 0


def find_config(options: Options) -> ChameleonXLLMXConfig:
    """The configuration of the model to train: that of `--init_from`, else of `--model_size`; no hub is asked."""
    model = options.model
    # Masking looks at the values of targets, which a plan lacks. It changes no memory.
    changes = {"dropout": model.dropout, "z_loss_weight": model.z_loss_weight, "mask_image_logits": False}
    if model.init_from:
        config = load_config(model.init_from, **changes)
    elif model.tokenizer and Path(model.tokenizer).is_dir():
        config = build_config(model.model_size, load_text_tokenizer(model.tokenizer), **changes)
    else:
        config = build_config(model.model_size, IMAGE_TOKENS, vocab_size=VOCAB_SIZE, **changes)
    grow_positions(config, options.data.max_seq_len)
    return config


def count_trained(model: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def checkpoint_bytes(model: nn.Module, options: Options) -> dict[str, float]:
    """Bytes of a checkpoint's large parts: fp32 weights for Hugging Face, and the training state."""
    trained = count_trained(model)
    return {"weights": 4 * trained, "training state": (4 + MOMENTS_BYTES[options.optim.optim]) * trained}


def size_epoch(options: Options, world_size: int) -> EpochSize:
    """Steps and tokens of the first epoch, from the records themselves. Raises ValueError without a data config."""
    data = options.data
    if data.data_config is None:
        raise ValueError("no --data_config was given")
    dataset = TokenDataset(load_data_config(data.data_config), data.max_seq_len, data.overlong, say=lambda line: None)
    planned = options.order_options(data.accum_iter * world_size)
    plan = plan_epoch(dataset.table, planned, 0)
    longest = int(dataset.table.lengths.max())
    max_row_len = planned.max_row_len
    if not data.packing:
        max_row_len = min(int(round_row_len(data.batch_size * longest)), max_row_len)
    mean_len = mean_document_len(dataset.table.lengths)
    return EpochSize(plan.num_steps, plan.num_tokens, max_row_len, longest, mean_len)


def plan_memory(
    config: ChameleonXLLMXConfig, options: Options, world_size: int, row_len: int, document_len: int
) -> StorageTracker:
    """The bytes of rank 0 in an optimizer step over rows of `row_len` tokens, in documents of `document_len`."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    # The tensors inside compiled layers cannot be seen. Uncompiled layers keep more.
    options = dataclasses.replace(options, parallel=dataclasses.replace(options.parallel, compile=False))
    device = torch.device("cpu")
    tracker = StorageTracker(on_host=HOST_KINDS if options.parallel.cpu_offload else ())
    _fill_caches(options.optim)
    cu_seqlens = torch.tensor([*range(0, row_len, document_len), row_len], dtype=torch.int32)
    with _fake_process_group(world_size):
        mesh = build_mesh(options.parallel, device.type, min(RANKS_PER_NODE, world_size))
        model = build_sharded(config, mesh, options.parallel, options.trainable, options.float8)
        with FakeTensorMode(allow_non_fake_inputs=True), as_on_cuda(), _dropout_as_on_cuda():
            allocate(model, device, options.parallel)
            optimizer = build_optimizer(model, options.optim)
            _init_states(model.train(), optimizer)
            _name_kinds(model, optimizer, tracker)
            with tracker:
                tracker.during = "forward and backward"
                # More than two micro-steps add to the same gradients.
                for is_last in (False, True) if options.data.accum_iter > 1 else (True,):
                    names = ("input_ids", "labels", "position_ids")
                    row = {name: torch.zeros(1, row_len, dtype=torch.int64) for name in names}
                    row |= {"cu_seqlens": cu_seqlens, "num_valid_tokens": row_len - len(cu_seqlens) + 1}
                    settings = {"is_last": is_last, "max_seqlen": options.data.max_seq_len, "divisor": row_len}
                    micro_step(model, row, device, options.parallel, **settings)
                tracker.during, tracker.kind = "optimizer step", OPTIMIZER
                guard, clip_grad = StepGuard(options.guard), options.optim.clip_grad
                optimizer_step(model, mesh, optimizer, guard, clip_grad, 1, [])
    return tracker


def needed_gib(peak_gib: float) -> float:
    """Memory of a GPU on which a peak fits, including room for what the plan does not see."""
    return peak_gib * (1 + HEADROOM_SHARE) + FIXED_HEADROOM_GIB


def summarize_plan(options: Options, memory: StorageTracker, epoch: EpochSize) -> dict[str, Any]:
    """The figures of memory and data by name, ready for JSON; unknown ones are None."""
    planning, data, row_len = options.planning, options.data, epoch.max_row_len
    peak_gib = memory.peak / GIB
    needed = needed_gib(peak_gib)
    return {
        "model_size": options.model.init_from or options.model.model_size,
        "world_size": planning.plan_world_size,
        "row_tokens": row_len,
        "accum_iter": data.accum_iter,
        "max_tokens_per_step": row_len * data.accum_iter * planning.plan_world_size,
        "peak_gib": round(peak_gib, 2),
        "needed_gib": round(needed, 2),
        "host_gib": round(sum(memory.most[kind] for kind in memory.on_host) / GIB, 2),
        **{f"{kind}_gib": round(memory.most[kind] / GIB, 2) for kind in KINDS},
        "at_peak_gib": {kind: round(memory.at_peak[kind] / GIB, 2) for kind in KINDS},
        "peak_during": memory.peak_during,
        "fits_cards_gb": [card for card, gib in CARDS_GIB.items() if needed <= gib],
        "plan_gpu_gib": planning.plan_gpu_gib,
        "fits": None if planning.plan_gpu_gib is None else needed <= planning.plan_gpu_gib,
        "tokens_per_epoch": epoch.num_tokens,
        "steps_per_epoch": epoch.num_steps,
        "epochs": options.optim.epochs,
    }


def describe(
    figures: Mapping[str, Any], on_host: tuple[str, ...], disk: Mapping[str, float], unknown: str | None
) -> list[str]:
    """The plan in lines for people; `unknown` says why steps and tokens are not known, if so."""
    ranks = f"{figures['world_size']} rank{'s' if figures['world_size'] > 1 else ''}"
    trained = figures["num_trained_parameters"] / figures["num_parameters"]
    lines = [
        f"{figures['model_size']} on {ranks}: {figures['num_parameters']:,} parameters, {trained:.2%} of them trained",
        f"rows of up to {figures['row_tokens']:,} tokens, {figures['accum_iter']} per rank and step: up to "
        f"{figures['max_tokens_per_step']:,} tokens per step",
        "",
        f"{'GiB per rank':<14}{'most':>10}{'at the peak':>14}",
    ]
    for kind in KINDS:
        place = "  (on the host)" if kind in on_host else ""
        lines.append(f"{kind:<14}{figures[f'{kind}_gib']:>10.2f}{figures['at_peak_gib'][kind]:>14.2f}{place}")
    verdict = {True: "fits", False: "does not fit"}
    parts = ", ".join(f"{name} {num_bytes / GIB:.2f}" for name, num_bytes in disk.items())
    flops = figures["flops_per_token"]
    lines += [
        f"{'peak':<14}{'':>10}{figures['peak_gib']:>14.2f}  (in the {figures['peak_during']})",
        "",
        f"needed with {HEADROOM_SHARE:.0%} and {FIXED_HEADROOM_GIB} GiB of room for CUDA, NCCL and fragmentation: "
        f"{figures['needed_gib']:.2f} GiB",
        *(
            f"  {card} GB card ({gib} GiB): {verdict[card in figures['fits_cards_gb']]}"
            for card, gib in CARDS_GIB.items()
        ),
    ]
    if figures["fits"] is not None:
        lines.append(f"  --plan_gpu_gib {figures['plan_gpu_gib']:g}: {verdict[figures['fits']]}")
    lines += [
        "",
        f"a checkpoint takes {figures['checkpoint_gib']:.2f} GiB of disk ({parts})",
        f"{flops / 1e9:.2f} GFLOPs per token, forward and backward (model/run/flops.py)",
    ]
    if unknown is not None:
        return [*lines, f"steps and tokens per epoch are not known: {unknown}"]
    tokens, epochs = figures["tokens_per_epoch"], figures["epochs"]
    total = f"{flops * tokens * epochs:.3g} FLOPs in {epochs} epoch{'s' if epochs > 1 else ''}"
    return [*lines, f"{tokens:,} tokens and {figures['steps_per_epoch']:,} steps per epoch; {total}"]


@contextlib.contextmanager
def _fake_process_group(world_size: int) -> Iterator[None]:
    """This process as rank 0 of `world_size`; nothing is sent, and the other ranks do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _dropout_as_on_cuda() -> Iterator[None]:
    """Inside, dropout keeps a mask of one byte per element, as on CUDA. On a CPU the mask has its input's type."""
    dropout = F.dropout

    def native_dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False):
        return torch.native_dropout(input, p, training)[0] if training and p else input

    F.dropout = native_dropout
    try:
        yield
    finally:
        F.dropout = dropout


def _fill_caches(options: OptimOptions) -> None:
    """Takes a step with values: the first one fills a table of torchao, which needs values, and is kept."""
    model = nn.Linear(64, 64)
    model(torch.ones(1, 64)).sum().backward()
    build_optimizer(model, options).step()


def _init_states(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Takes an optimizer step, outside the tracker."""
    # In the first step, sharded tensors find the shapes of results by tensors without values as large as the model.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.found_inf = torch.zeros((), device=next(model.parameters()).device)
    optimizer.step()
    optimizer.zero_grad()


def _name_kinds(model: nn.Module, optimizer: torch.optim.Optimizer, tracker: StorageTracker) -> None:
    """Marks parameters and states, and hooks the marking of gradients and of what the loss makes."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                tracker.mark(value, OPTIMIZER)
    for parameter in model.parameters():
        tracker.mark(parameter, PARAMETERS)
        if hasattr(parameter, "low_bits"):
            tracker.mark(parameter.low_bits, OPTIMIZER)
        # FSDP calls the hook once the sharded gradient is in its place.
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: tracker.mark(parameter.grad, GRADIENTS))

    def set_kind(kind: str) -> None:
        tracker.kind = kind

    model.lm_head.register_forward_pre_hook(lambda *_: set_kind(LOSS))
    model.lm_head.register_forward_hook(lambda *_: set_kind(ACTIVATIONS))
