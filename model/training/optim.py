"""The optimizer, AdamW as the recipe sets it, and the learning rate, a pure function of the position in the run.

If `found_inf` is set (model/training/step_guard.py), a step of an optimizer changes nothing.
"""

import argparse
import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from data.flags import flag
from model.decoder.local_shards import join_master, set_local

# By torchao.
ADAMW_8BIT = "adamw_8bit"
TORCHAO_PIN = "torchao==0.18.0"
OPTIMIZERS = ("adamw", ADAMW_8BIT)
# The recipe's.
BETAS = (0.9, 0.95)


def parse_optim(name: str) -> str:
    """The value of `--optim`. Raises ArgumentTypeError for one that is gone."""
    if name == "adamw_bf16_states":
        raise argparse.ArgumentTypeError(f"{name} is gone: use adamw, which resumes its checkpoints")
    return name


@dataclass(frozen=True)
class OptimOptions:
    """The optimizer and the curve of its learning rate."""

    optim: str = flag(
        "adamw", "moments in fp32, or in 8 bits by torchao (a quarter)", choices=OPTIMIZERS, type=parse_optim
    )
    lr: float = flag(2e-5, "highest learning rate")
    min_lr: float = flag(0.0, "learning rate at the end, after a cosine over all epochs")
    warmup_epochs: float = flag(0.03, "epochs, or a fraction of one, of linear warm-up from 0; 0: none")
    epochs: int = flag(1, "number of passes over the data", least=1)
    wd: float = flag(0.0, "weight decay of AdamW, on matrices; betas are 0.9 and 0.95", least=0)
    clip_grad: float = flag(4.0, "largest norm of the gradient; 0: no clipping")
    decay_all: bool = flag(False, "apply weight decay to norms and biases too, as the recipe does")

    def problems(self) -> list[str]:
        """What is wrong with these options, one sentence each."""
        found = []
        if not 0 < self.lr < math.inf:
            found.append(f"--lr must be above 0, got {self.lr:g}")
        if not 0 <= self.min_lr <= self.lr:
            found.append(f"--min_lr must lie between 0 and --lr ({self.lr:g}), got {self.min_lr:g}")
        if not 0 <= self.warmup_epochs <= max(self.epochs, 0):
            found.append(f"--warmup_epochs must lie between 0 and --epochs ({self.epochs}), got {self.warmup_epochs:g}")
        if self.optim == ADAMW_8BIT:
            try:
                import_adamw_8bit()
            except ImportError as error:
                found.append(str(error))
        return found


def lr_at(epoch_fraction: float, options: OptimOptions) -> float:
    """The learning rate at a position of the run, in epochs from 0.

    Linear from 0 to `lr` over `warmup_epochs`, then half a cosine down to `min_lr` at `epochs`, and `min_lr` after.
    """
    if epoch_fraction < options.warmup_epochs:
        return options.lr * epoch_fraction / options.warmup_epochs
    if epoch_fraction >= options.epochs:
        return options.min_lr
    progress = (epoch_fraction - options.warmup_epochs) / (options.epochs - options.warmup_epochs)
    return options.min_lr + (options.lr - options.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def build_optimizer(model: nn.Module, options: OptimOptions) -> torch.optim.Optimizer:
    """AdamW over the trained parameters of a plain or sharded model. Raises what `import_adamw_8bit` raises.

    Weight decay applies to matrices (projections, embedding, head), with `decay_all` to gains too, as in the recipe.
    """
    trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    decayed, kept = split_by_decay(trained, options.decay_all)
    groups = [{"params": decayed, "weight_decay": options.wd}, {"params": kept, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    kind, settings = torch.optim.AdamW, {"fused": True}
    if options.optim == ADAMW_8BIT:
        kind, settings = _skipping_adamw_8bit(), {}
    if any(hasattr(parameter, "low_bits") for group in groups for parameter in group["params"]):
        kind = type("SplitAdamW", (SplitMasters, kind), {})
    return kind(groups, lr=options.lr, betas=BETAS, **settings)


class SplitMasters(torch.optim.Optimizer):
    """Before an optimizer among the bases of a class: it steps fp32 masters whose lower halves are `low_bits`.

    One parameter after the other is joined, stepped and split (model/decoder/local_shards.py), so that only one master
    is in memory. Moments are those of fp32 masters.
    """

    # A factor on the gradients (a scalar on the device), None: 1.
    clip_factor: torch.Tensor | None = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Without states: torch would cast moments to the type of the parameters.
        super().load_state_dict(state_dict | {"state": {}})
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            self.state[parameter] = dict(state_dict["state"][number])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        groups = self.param_groups
        for group in groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = plain_tensors(parameter.grad)[0].float()
                if self.clip_factor is not None:
                    gradient.mul_(self.clip_factor)
                master = nn.Parameter(_sharded_like(parameter, join_local(parameter)))
                master.grad = _sharded_like(parameter, gradient)
                self.state[master] = self.state.pop(parameter, {})
                self.param_groups = [group | {"params": [master]}]
                super().step()
                set_local(parameter, plain_tensors(master)[0])
                self.state[parameter] = self.state.pop(master)
        self.param_groups = groups


def join_local(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of the fp32 master of a parameter with `low_bits`."""
    return join_master(plain_tensors(parameter)[0], parameter.low_bits)


def _sharded_like(parameter: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """A local tensor sharded as a parameter is."""
    if not isinstance(parameter, DTensor):
        return local
    place = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
    return DTensor.from_local(local, parameter.device_mesh, parameter.placements, **place)


def _skipping_adamw_8bit() -> type[torch.optim.Optimizer]:
    """torchao's AdamW8bit (Dettmers et al., 2022) that obeys `found_inf`; small or odd moments stay in fp32."""

    class SkippingAdamW8bit(import_adamw_8bit()):
        found_inf: torch.Tensor | None = None

        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            # One parameter after the other, so that only one has a copy in memory.
            groups = self.param_groups
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self.param_groups = [group | {"params": [parameter]}]
                        self._step_one(parameter)
            self.param_groups = groups

        def _step_one(self, parameter: torch.Tensor) -> None:
            """A step of the only parameter in the groups, undone on the device if `found_inf` is set there."""
            state = self.state[parameter]
            # As torchao does in its first step, but before the copy: an undone first step leaves moments of zero.
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = self._new_buffer(parameter, True)
                state["exp_avg_sq"] = self._new_buffer(parameter, False)
            state["step"] = state["step"].to(parameter.device)
            tensors = [part for tensor in (parameter, *state.values()) for part in plain_tensors(tensor)]
            before = [] if self.found_inf is None else [tensor.clone() for tensor in tensors]
            # torchao compiles its step. On a CPU that needs a C++ compiler, and takes longer than it saves.
            is_on_host = parameter.device.type == "cpu"
            with torch.compiler.set_stance("force_eager") if is_on_host else contextlib.nullcontext():
                super().step()
            for tensor, old in zip(tensors if before else (), before, strict=True):
                tensor.copy_(torch.where(self.found_inf.to(tensor.device).bool(), old, tensor))

    return SkippingAdamW8bit


def import_adamw_8bit() -> type[torch.optim.Optimizer]:
    """torchao's AdamW8bit. Raises ImportError, with the command that installs it, if torchao is missing or too old."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        way = f"pip install {TORCHAO_PIN}, or use adamw"
        raise ImportError(f"--optim {ADAMW_8BIT} needs torchao: {way} ({error})") from error
    return AdamW8bit


def plain_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The local tensors behind a tensor: the shard of a sharded one, codes and scales of a quantized one."""
    if isinstance(tensor, DTensor):
        return plain_tensors(tensor.to_local())
    if is_traceable_wrapper_subclass(tensor):
        return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [tensor.detach()]


def split_by_decay(
    named_parameters: Iterable[tuple[str, nn.Parameter]], decay_all: bool
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters with weight decay, and those without."""
    decayed, kept = [], []
    for name, parameter in named_parameters:
        # By name too: the gains of q_norm and k_norm are [groups, head_dim], but no matrices.
        is_matrix = parameter.ndim >= 2 and "norm" not in name
        (decayed if decay_all or is_matrix else kept).append(parameter)
    return decayed, kept


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every parameter group the learning rate of this step."""
    for group in optimizer.param_groups:
        # torchao holds it in a tensor, so that its compiled step is right for every value.
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
