"""What a run will need before it is paid for: memory of a rank, steps, arithmetic and disk. No weights, no GPU.

    python finetune_solver.py --plan --plan_world_size 32 --model_size 34B --batch_size 8 --checkpointing

The plan takes an optimizer step of the run itself (model/training.py: the sharding, the loss, the optimizer) on
tensors without values, as rank 0 of a process group that sends nothing, and counts what is alive
(model/storage_tracker.py). Its rows are the largest that the options allow, every token a target. It runs on any
machine: tensors stand on the CPU, and where CUDA computes otherwise the plan does as CUDA does (the flash kernel, one
byte per element for dropout).

Not in it: the CUDA context, buffers of NCCL and cuBLAS, and fragmentation, for all of which `needed_gib` leaves room;
what `--compile` saves (layers are planned uncompiled); the answers of `--sample_interval`, for which all weights stay
gathered where there is room (model/samples.py); and, under `--cpu_offload`, the copies on the GPU of what a rank holds
of one layer, while it is gathered.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from data.data_config import load_data_config
from data.dataset import TokenDataset
from data.item_processor import load_text_tokenizer
from data.packing import PlanOptions, plan_epoch, round_row_len
from model.attention import as_on_cuda
from model.convert import load_config
from model.decoder.chameleon import IMAGE_TOKEN_PREFIX, ChameleonXLLMXConfig, build_config, build_model, grow_positions
from model.distributed import Launch, stop_at_start
from model.flops import mean_document_len, trained_flops_per_token
from model.optim import OptimOptions, build_optimizer
from model.parallelize import allocate, build_mesh
from model.plan_disk import checkpoint_bytes, vqgan_bytes
from model.step_guard import StepGuard
from model.storage_tracker import (
    ACTIVATIONS,
    GRADIENTS,
    KINDS,
    LOSS,
    OPTIMIZER,
    PARAMETERS,
    StorageTracker,
)
from model.trainable import choose_trainable
from model.trained_rows import ROWS_NAME
from model.training import build_sharded, micro_step, optimizer_step

if TYPE_CHECKING:
    from model.options import Options

GIB = 2**30
# Chameleon's vocabulary, where no tokenizer and no config.json is at hand; for memory the number of names is enough.
VOCAB_SIZE = 65536
IMAGE_TOKENS = {f"{IMAGE_TOKEN_PREFIX}{number}": 4 + number for number in range(8192)}
RANKS_PER_NODE = 8  # what --data_parallel hsdp takes for a node; --hsdp_shard_size says otherwise
# Memory that torch finds on cards by the gigabytes they are sold with: RTX 4090, L40, H100, H200 (the least seen in
# messages of CUDA out of memory, rounded down; a card may have some tenths more).
CARDS_GIB = {24: 23.5, 48: 44.4, 80: 79.1, 141: 139.0}
# Room beside the peak: the context of CUDA and the buffers of NCCL and cuBLAS, about a GiB and a half, and 5% for holes
# between allocations and for what the plan gets wrong.
FIXED_HEADROOM_GIB = 1.5
HEADROOM_SHARE = 0.05
HOST_KINDS = (PARAMETERS, GRADIENTS, OPTIMIZER)  # under --cpu_offload
MAX_ROW_LEN = 2**31 - 1
ROW_TENSORS = ("input_ids", "labels", "position_ids")


@dataclass(frozen=True)
class MemoryPlan:
    """What rank 0 needs, in bytes, and what the model is like.

    `most` is the largest figure of each of `KINDS` at any moment, and those `on_host` are not on the GPU; `at_peak` has
    the figures at the moment of the largest sum, `peak`, which is reached in `peak_during`. `checkpoint` is what one
    takes on disk, by part. Trained image rows are rows of matrices that `num_parameters` has in it.
    """

    num_parameters: int
    num_trained: int
    most: Mapping[str, int]
    on_host: Collection[str]
    at_peak: Mapping[str, int]
    peak: int
    peak_during: str
    checkpoint: Mapping[str, int]
    flops_per_token: float


@dataclass(frozen=True)
class EpochSize:
    """The first epoch of the data: optimizer steps, tokens of items, and the longest row that any epoch may have.

    `mean_document_len` is that of `model/flops.py`, as the run's own figures of speed have it.
    """

    num_steps: int
    num_tokens: int
    max_row_len: int
    max_document_len: int
    mean_document_len: float


def print_plan(options: Options, launch: Launch) -> int:
    """Prints the plan, a JSON object as its last line.

    Returns the exit code: 0 for a plan, whether it fits or not, and 2 where options or the model's configuration are
    wrong. Under a launcher the first rank plans, and the others have nothing to do.
    """
    if not launch.is_main:
        return 0
    from model.options import find_number_problems  # which imports this module

    world_size = options.planning.plan_world_size
    problems = [
        *options.planning.problems(),
        *find_number_problems(options),
        *options.model.problems(),
        *options.optim.problems(),
        *options.parallel.problems(world_size, min(RANKS_PER_NODE, world_size)),
        *options.trainable.problems(is_plan=True),
        *options.float8.problems(
            None, options.parallel.precision, options.trainable.is_partial, options.data.max_row_len
        ),
    ]
    try:
        config = find_config(options)
        carried = vqgan_bytes(options)
        choose_trainable(build_model(config, device="meta"), options.trainable)
    except (ValueError, OSError, ImportError) as error:
        problems.append(str(error))
    if problems:
        lines = ["finetune_solver.py: there is nothing to plan:", *dict.fromkeys(problems)]
        return stop_at_start(launch, "\n  - ".join(lines))
    epoch, unknown = None, None
    try:
        epoch = size_epoch(options, world_size)
    except (ValueError, OSError) as error:
        unknown = str(error)
    row_len = epoch.max_row_len if epoch else options.data.max_row_len
    if row_len > MAX_ROW_LEN:
        problem = f"a row of {row_len:,} tokens is too long (places in it are int32)"
        return stop_at_start(launch, f"finetune_solver.py: {problem}: lower --batch_size or --max_seq_len")
    document_len = epoch.max_document_len if epoch else options.data.max_seq_len
    mean_len = epoch.mean_document_len if epoch else document_len
    memory = plan_memory(config, options, world_size, row_len, document_len, mean_len)
    if carried and not options.trainable.is_partial:
        memory = dataclasses.replace(memory, checkpoint=memory.checkpoint | {"VQGAN": carried})
    figures = summarize_plan(options, memory, epoch, row_len)
    print("\n".join(describe(figures, memory, unknown)))
    print(json.dumps(figures), flush=True)
    return 0


def find_config(options: Options) -> ChameleonXLLMXConfig:
    """The configuration of the model to train: that of `--init_from`, else of `--model_size`.

    The recipe's weights are not asked for: they have the shape of the size and Chameleon's vocabulary.
    """
    model = options.model
    # Masked or not, the logits take the same memory; but masking looks at the targets, and here they have no value.
    changes = {"dropout": model.dropout, "z_loss_weight": model.z_loss_weight, "mask_image_logits": False}
    if model.init_from:
        config = load_config(model.init_from, **changes)
    elif model.tokenizer and Path(model.tokenizer).is_dir():
        config = build_config(model.model_size, load_text_tokenizer(model.tokenizer), **changes)
    else:
        config = build_config(model.model_size, IMAGE_TOKENS, vocab_size=VOCAB_SIZE, **changes)
    grow_positions(config, options.data.max_seq_len)
    return config


def size_epoch(options: Options, world_size: int) -> EpochSize:
    """Steps and tokens of the first epoch, from the records themselves.

    Raises what `load_data_config` and `TokenDataset` raise, and ValueError without a data config.
    """
    data = options.data
    if data.data_config is None:
        raise ValueError("no --data_config was given")
    dataset = TokenDataset(load_data_config(data.data_config), data.max_seq_len, data.overlong, say=lambda line: None)
    planned = PlanOptions(
        batch_size=data.batch_size,
        max_seq_len=data.max_seq_len,
        units_per_step=data.accum_iter * world_size,
        packing=data.packing,
        length_clustering=data.length_clustering,
        seed=options.run.seed,
        context_dropout=data.context_dropout,
    )
    plan = plan_epoch(dataset.table, planned, 0)
    longest = int(dataset.table.lengths.max())
    max_row_len = planned.max_row_len
    if not data.packing:
        max_row_len = min(int(round_row_len(data.batch_size * longest)), max_row_len)
    mean_len = mean_document_len(dataset.table.lengths)
    return EpochSize(plan.num_steps, plan.num_tokens, max_row_len, longest, mean_len)


def plan_memory(
    config: ChameleonXLLMXConfig,
    options: Options,
    world_size: int,
    row_len: int,
    document_len: int,
    mean_document_len: float | None = None,
) -> MemoryPlan:
    """Counts the memory of an optimizer step over rows of `row_len` tokens, in documents of `document_len`.

    FLOPs are those of a token in a document of `mean_document_len`; None: of `document_len`.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Compiled layers hold no tensors that a plan could see, and keep less than these.
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
            model.train()
            count_step(model, mesh, optimizer, tracker, options, cu_seqlens)
            named = list(model.named_parameters())
            return MemoryPlan(
                num_parameters=sum(p.numel() for name, p in named if not name.endswith(f".{ROWS_NAME}")),
                num_trained=sum(p.numel() for _, p in named if p.requires_grad),
                most=dict(tracker.most),
                on_host=tracker.on_host,
                at_peak=dict(tracker.at_peak),
                peak=tracker.peak,
                peak_during=tracker.peak_during,
                checkpoint=checkpoint_bytes(model, optimizer),
                flops_per_token=trained_flops_per_token(model, mean_document_len or document_len),
            )


def count_step(
    model: nn.Module,
    mesh: DeviceMesh,
    optimizer: torch.optim.Optimizer,
    tracker: StorageTracker,
    options: Options,
    cu_seqlens: torch.Tensor,
) -> None:
    """Takes an optimizer step under a tracker, with the optimizer's states there already, as in any step but the first.

    It has two micro-steps at most (more add to the same gradients) of a row with the documents `cu_seqlens` (int32
    [num_documents + 1], with values, on the host). The tensors of the model may have values or not.
    """
    device, row_len = torch.device(mesh.device_type), cu_seqlens.tolist()[-1]
    num_micro = min(options.data.accum_iter, 2)
    guard = StepGuard(options.guard)
    _init_states(model, optimizer)
    _name_kinds(model, optimizer, tracker)
    with tracker:
        tracker.during = "forward and backward"
        for micro in range(num_micro):
            row = {name: torch.zeros(1, row_len, dtype=torch.int64) for name in ROW_TENSORS}
            row |= {"cu_seqlens": cu_seqlens, "num_valid_tokens": row_len - len(cu_seqlens) + 1}
            micro_step(
                model, row, device, options.parallel, is_last=micro == num_micro - 1,
                max_seqlen=options.data.max_seq_len, divisor=row_len,
            )  # fmt: skip
        tracker.during = "optimizer step"
        with tracker.counting(OPTIMIZER):
            optimizer_step(model, mesh, optimizer, guard, options.optim.clip_grad, 1, [])


def needed_gib(peak_gib: float) -> float:
    """Memory of a GPU on which a peak fits, the room for what the plan does not see included."""
    return peak_gib * (1 + HEADROOM_SHARE) + FIXED_HEADROOM_GIB


def summarize_plan(options: Options, memory: MemoryPlan, epoch: EpochSize | None, row_len: int) -> dict[str, Any]:
    """The figures of the plan by name, ready for JSON; what is not known is None."""
    planning, data = options.planning, options.data
    peak_gib = memory.peak / GIB
    needed = needed_gib(peak_gib)
    tokens_per_step = row_len * data.accum_iter * planning.plan_world_size
    return {
        "model_size": options.model.model_size if options.model.init_from is None else options.model.init_from,
        "world_size": planning.plan_world_size,
        "row_tokens": row_len,
        "accum_iter": data.accum_iter,
        "max_tokens_per_step": tokens_per_step,
        "num_parameters": memory.num_parameters,
        "num_trained_parameters": memory.num_trained,
        "peak_gib": round(peak_gib, 2),
        "needed_gib": round(needed, 2),
        "host_gib": round(sum(memory.most.get(kind, 0) for kind in memory.on_host) / GIB, 2),
        **{f"{kind}_gib": round(memory.most.get(kind, 0) / GIB, 2) for kind in KINDS},
        "at_peak_gib": {kind: round(memory.at_peak.get(kind, 0) / GIB, 2) for kind in KINDS},
        "peak_during": memory.peak_during,
        "fits_cards_gb": [card for card, gib in CARDS_GIB.items() if needed <= gib],
        "plan_gpu_gib": planning.plan_gpu_gib,
        "fits": None if planning.plan_gpu_gib is None else needed <= planning.plan_gpu_gib,
        "tokens_per_epoch": epoch and epoch.num_tokens,
        "steps_per_epoch": epoch and epoch.num_steps,
        "epochs": options.optim.epochs,
        "flops_per_token": memory.flops_per_token,
        "checkpoint_gib": round(sum(memory.checkpoint.values()) / GIB, 2),
    }


def describe(figures: Mapping[str, Any], memory: MemoryPlan, unknown: str | None) -> list[str]:
    """The plan in lines for people; `unknown` says why the data are not known, if they are not."""
    ranks = f"{figures['world_size']} rank{'s' if figures['world_size'] > 1 else ''}"
    trained = memory.num_trained / memory.num_parameters
    lines = [
        f"{figures['model_size']} on {ranks}: {memory.num_parameters:,} parameters, {trained:.2%} of them trained",
        f"rows of up to {figures['row_tokens']:,} tokens, {figures['accum_iter']} per rank and step: up to "
        f"{figures['max_tokens_per_step']:,} tokens per step",
        "",
        f"{'GiB per rank':<14}{'most':>10}{'at the peak':>14}",
    ]
    for kind in KINDS:
        place = "  (on the host)" if kind in memory.on_host else ""
        lines.append(f"{kind:<14}{figures[f'{kind}_gib']:>10.2f}{figures['at_peak_gib'][kind]:>14.2f}{place}")
    lines += [
        f"{'peak':<14}{'':>10}{figures['peak_gib']:>14.2f}  (in the {memory.peak_during})",
        "",
        f"needed with {HEADROOM_SHARE:.0%} and {FIXED_HEADROOM_GIB} GiB of room for CUDA, NCCL and fragmentation: "
        f"{figures['needed_gib']:.2f} GiB",
        *(
            f"  {card} GB card ({gib} GiB): {'fits' if card in figures['fits_cards_gb'] else 'does not fit'}"
            for card, gib in CARDS_GIB.items()
        ),
    ]
    if figures["fits"] is not None:
        lines.append(f"  --plan_gpu_gib {figures['plan_gpu_gib']:g}: {'fits' if figures['fits'] else 'does not fit'}")
    flops = figures["flops_per_token"]
    parts = ", ".join(f"{name} {num_bytes / GIB:.2f}" for name, num_bytes in memory.checkpoint.items())
    lines += ["", f"a checkpoint takes {figures['checkpoint_gib']:.2f} GiB of disk ({parts})"]
    lines.append(f"{flops / 1e9:.2f} GFLOPs per token, forward and backward (model/flops.py)")
    if unknown is not None:
        return [*lines, f"steps and tokens per epoch are not known: {unknown}"]
    tokens, epochs = figures["tokens_per_epoch"], figures["epochs"]
    total = f"{flops * tokens * epochs:.3g} FLOPs in {epochs} epoch{'s' if epochs > 1 else ''}"
    return [*lines, f"{tokens:,} tokens and {figures['steps_per_epoch']:,} steps per epoch; {total}"]


@contextlib.contextmanager
def _fake_process_group(world_size: int) -> Iterator[None]:
    """This process as rank 0 of `world_size`, the others of which do not exist: what is sent is lost."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _dropout_as_on_cuda() -> Iterator[None]:
    """Inside, dropout keeps a mask of one byte per element, as on CUDA, where a CPU keeps one of its input's type."""
    dropout = F.dropout

    def native_dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False):
        return torch.native_dropout(input, p, training)[0] if training and p else input

    F.dropout = native_dropout
    try:
        yield
    finally:
        F.dropout = dropout


def _fill_caches(options: OptimOptions) -> None:
    """Takes a step with real numbers: torchao makes a table at the first, which needs values, and keeps it."""
    model = nn.Linear(64, 64)
    model(torch.ones(1, 64)).sum().backward()
    build_optimizer(model, options).step()


def _init_states(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Takes a step without gradients to speak of.

    Not under the tracker: the first time, sharded tensors find out the shapes of results by tensors as large as the
    model, which a run does without values.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.found_inf = torch.zeros((), device=next(model.parameters()).device)
    optimizer.step()
    optimizer.zero_grad()


def _name_kinds(model: nn.Module, optimizer: torch.optim.Optimizer, tracker: StorageTracker) -> None:
    """Tells the tracker what is a parameter or a state, and lets it hear of gradients and of what the loss makes."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                tracker.mark(value, OPTIMIZER)
    for parameter in model.parameters():
        tracker.mark(parameter, PARAMETERS)
        if parameter.requires_grad:  # FSDP calls it once the sharded gradient is in its place
            parameter.register_post_accumulate_grad_hook(lambda parameter: tracker.mark(parameter.grad, GRADIENTS))

    def set_kind(kind: str) -> None:
        tracker.kind = kind

    model.lm_head.register_forward_pre_hook(lambda *_: set_kind(LOSS))
    model.lm_head.register_forward_hook(lambda *_: set_kind(ACTIVATIONS))
