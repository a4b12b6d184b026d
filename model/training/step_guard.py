"""Skipped steps: those with a gradient that is not finite, or far too large.

The device decides, and the host does not wait: AdamW's fused kernel changes nothing if `found_inf` is set.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from data.flags import flag


@dataclass(frozen=True)
class GuardOptions:
    """Which steps are skipped, and how many in a row end the run."""

    max_bad_steps: int = flag(5, "number of skipped steps in a row that ends the run", least=1)
    skip_grad_norm: float = flag(0.0, "skip steps whose gradient has a larger norm; 0: only those that are not finite")


class StepGuard:
    """Watches the norm of the whole gradient, which is the same on every rank: all ranks skip the same steps."""

    def __init__(self, options: GuardOptions) -> None:
        self.options = options
        self._in_a_row = 0
        # Since the last log line: whether the step is bad (a scalar on the device), its number, its items.
        self._steps: list[tuple[torch.Tensor, int, list[int]]] = []

    def check(self, grad_norm: torch.Tensor, step: int, items: Sequence[int]) -> torch.Tensor:
        """1.0 on the device if this step must be skipped, else 0.0. `items`: of this rank's rows, for the report."""
        is_bad = ~torch.isfinite(grad_norm)
        if self.options.skip_grad_norm > 0:
            is_bad = is_bad | (grad_norm > self.options.skip_grad_norm)
        self._steps.append((is_bad, step, list(items)))
        return is_bad.float()

    def numbers(self) -> torch.Tensor:
        """The input of `read`, float64 [steps since the last log line] on the device."""
        return torch.stack([is_bad for is_bad, _, _ in self._steps]).double()

    def read(self, numbers: Sequence[float]) -> tuple[list[tuple[int, list[int]]], bool]:
        """From `numbers()` on the host: the skipped steps with this rank's items, and whether too many are in a row."""
        skipped, is_too_many = [], False
        for is_bad, (_, step, items) in zip(numbers, self._steps, strict=True):
            self._in_a_row = self._in_a_row + 1 if is_bad else 0
            is_too_many |= self._in_a_row >= self.options.max_bad_steps
            if is_bad:
                skipped.append((step, items))
        self._steps = []
        return skipped, is_too_many
