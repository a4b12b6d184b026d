"""Steps that are not taken: those with a gradient that is not finite, or far too large.

The decision falls on the device, so that the host waits for nothing: AdamW's fused kernel leaves weights, moments and
step counts as they were where `found_inf` is set. What was skipped is read with the figures of the next log line.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from data.flags import flag


@dataclass(frozen=True)
class GuardOptions:
    """`skip_grad_norm`: a step with a gradient's norm above it is skipped; 0 or less: only one that is not finite."""

    max_bad_steps: int = flag(5, "number of skipped steps in a row that ends the run", least=1)
    skip_grad_norm: float = flag(0.0, "skip steps whose gradient has a larger norm; 0: only those that are not finite")


class StepGuard:
    """Watches the norm of the whole gradient, which is the same number on every rank."""

    def __init__(self, options: GuardOptions, device: torch.device) -> None:
        self.options = options
        self._in_a_row = torch.zeros((), dtype=torch.float64, device=device)
        self._most_in_a_row = torch.zeros_like(self._in_a_row)
        self._flags: list[torch.Tensor] = []
        self._items: list[tuple[int, list[int]]] = []

    def check(self, grad_norm: torch.Tensor, step: int, items: Sequence[int]) -> torch.Tensor:
        """1.0 on the device if this step must not be taken, else 0.0. `items` are those of this rank's rows."""
        is_bad = ~torch.isfinite(grad_norm)
        if self.options.skip_grad_norm > 0:
            is_bad = is_bad | (grad_norm > self.options.skip_grad_norm)
        self._in_a_row = (self._in_a_row + 1) * is_bad
        self._most_in_a_row = torch.maximum(self._most_in_a_row, self._in_a_row)
        self._flags.append(is_bad)
        self._items.append((step, list(items)))
        return is_bad.float()

    def numbers(self) -> torch.Tensor:
        """What `read` needs from the device, float64 [1 + steps since the last log line]."""
        flags = [flag.double().reshape(1) for flag in self._flags]
        return torch.cat([self._most_in_a_row.reshape(1), *flags])

    def read(self, numbers: Sequence[float]) -> tuple[list[tuple[int, list[int]]], bool]:
        """From `numbers()` on the host: the skipped steps with this rank's items, and whether there were too many in a
        row. Begins anew."""
        skipped = [place for place, is_bad in zip(self._items, numbers[1:], strict=True) if is_bad]
        self._flags, self._items = [], []
        is_too_many = numbers[0] >= self.options.max_bad_steps
        self._most_in_a_row = torch.zeros_like(self._in_a_row)
        return skipped, is_too_many
