"""
What a training run does with a model, from building to the optimizer step.

Where it stands: `finetune_solver.py` calls these functions on real tensors, `model/plan.py` the same ones on tensors
without values, to count the memory of a run before there is one. They read no file and wait for no device.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from model.decoder.chameleon import ChameleonXLLMXConfig, ChameleonXLLMXOutput, build_model
from model.float8 import Float8Options, use_float8
from model.parallelize import DTYPES, ParallelOptions, begin_micro_step, clip_grad_norm, parallelize
from model.step_guard import StepGuard
from model.trainable import TrainableOptions, choose_trainable


def build_sharded(
    config: ChameleonXLLMXConfig,
    mesh: DeviceMesh,
    parallel: ParallelOptions,
    trainable: TrainableOptions,
    float8: Float8Options,
    compile_backend: str | Callable = "inductor",
) -> nn.Module:
    """The decoder that a run trains, with what is trained chosen, spread over the ranks of `mesh`; still on meta.

    `model.parallelize.allocate` gives it memory. Raises what `use_float8` and `choose_trainable` raise.
    """
    model = build_model(config, device="meta")
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
    """Forward and backward of one row (as `data.rows.collate_row` makes it): adds its part to the gradients.

    Args:
        is_last: whether it is the last micro-step of the optimizer step.
        max_seqlen: an upper bound of the longest document, in tokens.
        divisor: what the sum of the loss over the row's targets is divided by; 0 counts as 1.
    """
    begin_micro_step(model, options, is_last=is_last)
    output = forward_row(model, row, device, max_seqlen, 1.0 / max(divisor, 1))
    output.loss.backward()
    return output


def forward_row(
    model: nn.Module, row: Mapping[str, Any], device: torch.device, max_seqlen: int, loss_scale: float = 1.0
) -> ChameleonXLLMXOutput:
    """The model's output for one row, its loss the sum over targets times a scale.

    Everything goes through the forward of the root, which gathers what the ranks share. What FSDP finds there on the
    host it copies itself, and waits until the device has done all that was queued: so nothing is left for it to copy.
    """
    return model(
        input_ids=row["input_ids"].to(device, non_blocking=True),
        labels=row["labels"].to(device, non_blocking=True),
        position_ids=row["position_ids"].to(device, non_blocking=True),
        cu_seqlens=row["cu_seqlens"].to(device, non_blocking=True),
        max_seqlen=max_seqlen,
        num_valid=row["num_valid_tokens"],
        loss_scale=loss_scale,
    )


def optimizer_step(
    model: nn.Module,
    mesh: DeviceMesh,
    optimizer: torch.optim.Optimizer,
    guard: StepGuard,
    clip_grad: float,
    step: int,
    items: list[int],
) -> torch.Tensor:
    """Takes the step, unless the guard forbids it, and clears the gradients. Returns the gradient's norm (a scalar).

    `step` and `items` (those of this rank's rows) are for the guard, which names them if the step is not taken.
    """
    grad_norm = clip_grad_norm(model, mesh, clip_grad)
    optimizer.found_inf = guard.check(grad_norm, step, items)
    optimizer.step()
    optimizer.zero_grad()
    return grad_norm
