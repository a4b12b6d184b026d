"""What a training run does with a model: building, micro-step and optimizer step; the host never waits for the device.

`model/plan/plan.py` calls the same functions on tensors without values, to count the memory of a run.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from model.decoder.chameleon import ChameleonXLLMXConfig, ChameleonXLLMXOutput, build_model
from model.decoder.trainable import TrainableOptions, choose_trainable
from model.training.float8 import Float8Options, use_float8
from model.training.optim import SplitMasters
from model.training.parallelize import (
    DTYPES,
    SPLIT,
    ParallelOptions,
    begin_micro_step,
    clip_factor,
    clip_grad_norm,
    parallelize,
)
from model.training.step_guard import StepGuard


def build_sharded(
    config: ChameleonXLLMXConfig,
    mesh: DeviceMesh,
    parallel: ParallelOptions,
    trainable: TrainableOptions,
    float8: Float8Options,
    compile_backend: str | Callable = "inductor",
) -> nn.Module:
    """The decoder of a run, sharded over the ranks of `mesh`, on meta: `allocate` gives it memory."""
    model = build_model(config, "meta", torch.bfloat16 if parallel.master_weights == SPLIT else torch.float32)
    if float8.float8:
        use_float8(model)
    model = choose_trainable(model, trainable, DTYPES[parallel.precision])
    return parallelize(model, mesh, parallel, compile_backend)


def micro_step(
    model: nn.Module,
    row: Mapping[str, Any],
    device: torch.device,
    options: ParallelOptions,
    *,
    is_last: bool,
    max_seqlen: int,
    divisor: float,
) -> ChameleonXLLMXOutput:
    """Forward and backward of one row (as `data.epoch.rows.collate_row` makes it), added to the gradients.

    `max_seqlen` bounds the longest document. The sum of the loss over targets is divided by `divisor`, at least by 1.
    """
    begin_micro_step(model, options, is_last=is_last)
    output = forward_row(model, row, device, max_seqlen, 1.0 / max(divisor, 1))
    output.loss.backward()
    return output


def forward_row(
    model: nn.Module, row: Mapping[str, Any], device: torch.device, max_seqlen: int, loss_scale: float = 1.0
) -> ChameleonXLLMXOutput:
    """The model's output for one row; the loss is the sum over targets times `loss_scale`."""
    # Copied here, non-blocking: FSDP's root would copy tensors of the host itself, and wait for all queued work.
    names = ("input_ids", "labels", "position_ids", "cu_seqlens")
    tensors = {name: row[name].to(device, non_blocking=True) for name in names}
    # With the lengths known on the host, nothing of the forward waits for the device either.
    return model(**tensors, max_seqlen=max_seqlen, num_valid=row["num_valid_tokens"], loss_scale=loss_scale)


def optimizer_step(
    model: nn.Module,
    mesh: DeviceMesh,
    optimizer: torch.optim.Optimizer,
    guard: StepGuard,
    clip_grad: float,
    step: int,
    items: list[int],
) -> torch.Tensor:
    """Takes the step, unless the guard skips it, and clears the gradients. Returns the gradient's norm (a scalar).

    `step` and `items` (of this rank's rows) are for the guard's report.
    """
    if isinstance(optimizer, SplitMasters):
        # Scaled in fp32 by the optimizer: in bf16 the gradient would be rounded once more.
        grad_norm = clip_grad_norm(model, mesh, 0.0)
        optimizer.clip_factor = clip_factor(grad_norm, clip_grad) if clip_grad > 0 else None
    else:
        grad_norm = clip_grad_norm(model, mesh, clip_grad)
    # AdamW reads this flag on the device.
    optimizer.found_inf = guard.check(grad_norm, step, items)
    optimizer.step()
    optimizer.zero_grad()
    return grad_norm
