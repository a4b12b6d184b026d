"""The optimizer and its learning rate: AdamW as the recipe sets it, and the cosine curve as a pure function.

`finetune_solver.py` builds the optimizer once, after sharding, and sets `lr_at(epoch + step / num_steps)` before every
optimizer step, so that a resumed run finds its place on the curve without any state.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from model.small_states import ADAMW_8BIT, AdamWBf16States, build_adamw_8bit, import_adamw_8bit

OPTIMIZERS = ("adamw", "adamw_bf16_states", ADAMW_8BIT)
BETAS = (0.9, 0.95)  # the recipe's


@dataclass(frozen=True)
class OptimOptions:
    """Learning rate over epochs (fractions count), decoupled weight decay, and the bound of the gradient's norm.

    `optim`: one of `OPTIMIZERS`, which differ in the memory of the moments: 8, 4 or 2 bytes per parameter."""

    optim: str = "adamw"
    lr: float = 2e-5
    min_lr: float = 0.0
    warmup_epochs: float = 0.03
    epochs: int = 1
    wd: float = 0.0
    clip_grad: float = 4.0  # 0 or less: no bound
    decay_all: bool = False

    def problems(self) -> list[str]:
        """What is wrong with these options, one sentence each."""
        found = []
        if not 0 < self.lr < math.inf:
            found.append(f"--lr must be above 0, got {self.lr:g}")
        if not 0 <= self.min_lr <= self.lr:
            found.append(f"--min_lr must lie between 0 and --lr ({self.lr:g}), got {self.min_lr:g}")
        if self.epochs < 1:
            found.append(f"--epochs must be at least 1, got {self.epochs}")
        if not 0 <= self.warmup_epochs <= max(self.epochs, 0):
            found.append(f"--warmup_epochs must lie between 0 and --epochs ({self.epochs}), got {self.warmup_epochs:g}")
        if not 0 <= self.wd < math.inf:
            found.append(f"--wd must not be negative, got {self.wd:g}")
        if self.optim == ADAMW_8BIT:
            try:
                import_adamw_8bit()
            except ImportError as error:
                found.append(str(error))
        return found


def lr_at(epoch_fraction: float, options: OptimOptions) -> float:
    """The learning rate at a moment of the run, counted in epochs from 0.

    Linear from 0 to `lr` over `warmup_epochs`, then half a cosine down to `min_lr` at `epochs`, and `min_lr` after.
    """
    if epoch_fraction < options.warmup_epochs:
        return options.lr * epoch_fraction / options.warmup_epochs
    if epoch_fraction >= options.epochs:
        return options.min_lr
    progress = (epoch_fraction - options.warmup_epochs) / (options.epochs - options.warmup_epochs)
    return options.min_lr + (options.lr - options.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def build_optimizer(model: nn.Module, options: OptimOptions) -> torch.optim.Optimizer:
    """AdamW over all parameters of a (sharded) model that are trained; its moments as `options.optim` says.

    Weight decay applies to matrices only (projections, embedding, output head); with `decay_all` to gains and biases
    too, as the recipe does. Raises what `import_adamw_8bit` raises.
    """
    trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    decayed, kept = split_by_decay(trained, options.decay_all)
    groups = [{"params": decayed, "weight_decay": options.wd}, {"params": kept, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if options.optim == ADAMW_8BIT:
        return build_adamw_8bit(groups, options.lr, BETAS)
    if options.optim == "adamw_bf16_states":
        return AdamWBf16States(groups, lr=options.lr, betas=BETAS)
    return torch.optim.AdamW(groups, lr=options.lr, betas=BETAS, fused=True)


def split_by_decay(
    named_parameters: Iterable[tuple[str, nn.Parameter]], decay_all: bool
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters that weight decay shrinks, and those it leaves alone.

    Told apart by name as well as by shape: the gains of q_norm and k_norm are `[groups, head_dim]` and no matrices.
    """
    decayed, kept = [], []
    for name, parameter in named_parameters:
        is_matrix = parameter.ndim >= 2 and "norm" not in name
        (decayed if decay_all or is_matrix else kept).append(parameter)
    return decayed, kept


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every parameter group the learning rate of this step."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # torchao's
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
