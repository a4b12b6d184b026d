"""AdamW with smaller moments: in bf16 (4 bytes per parameter instead of 8), or in 8 bits, from torchao (2 bytes).

Where it stands: beside torch's own fused AdamW under `build_optimizer` (model/optim.py). Like that one, both leave
weights, moments and step counts as they were where `found_inf` is set (model/step_guard.py), and the host waits for
nothing.
"""

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

ADAMW_8BIT = "adamw_8bit"  # as --optim names it
TORCHAO_PIN = "torchao==0.18.0"
# Values updated at once: the fp32 copies that a step makes are a few times 64 MiB, whatever the size of a parameter.
_CHUNK = 2**24


class AdamWBf16States(torch.optim.Optimizer):
    """
    AdamW (Loshchilov and Hutter, 2019) that keeps both moments in bf16, and computes in fp32.

    Rounded to nearest, so that a resumed run is the same to the bit. bf16 has steps of 1/256 to 1/128 of a value. A
    step moves a moment by the share 1 - beta of its distance to the gradient (its square): at betas of 0.9 and 0.95 it
    stands still only within 4 % or 8 % of where it should be, which changes the length of an update by as much at most.
    At beta2 = 0.999 it would stand still while it is several times too small: that would need rounding at random.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.found_inf: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        is_taken = torch.ones_like(state["step"]) if self.found_inf is None else 1 - self.found_inf.to(state["step"])
        state["step"] += is_taken
        (beta1, beta2), lr = group["betas"], group["lr"]
        count = state["step"] + (1 - is_taken)  # of the step as if it were taken: never 0
        bias1, bias2 = 1 - beta1**count, 1 - beta2**count
        tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        chunks = [plain_tensors(tensor)[0].reshape(-1).split(_CHUNK) for tensor in tensors]
        for weight, gradient, first, second in zip(*chunks, strict=True):
            gradient = gradient.float()
            new_first = first.float().lerp_(gradient, 1 - beta1)
            new_second = second.float().lerp_(gradient.square(), 1 - beta2)
            divisor = (new_second / bias2).sqrt_().add_(group["eps"])
            new_weight = (weight * (1 - lr * group["weight_decay"])).sub_(new_first / divisor * (lr / bias1))
            for old, new in ((weight, new_weight), (first, new_first), (second, new_second)):
                old.copy_(torch.where(is_taken.bool(), new.to(old.dtype), old))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # which gives the moments the type of the parameters
        for state in self.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(torch.bfloat16)


def build_adamw_8bit(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """
    torchao's AdamW8bit (Dettmers et al., 2022) that leaves everything as it was where `found_inf` is set.

    Moments of parameters with fewer than 4,096 values on a rank, or not in whole blocks of 256, stay in fp32.

    Raises what `import_adamw_8bit` raises.
    """
    adamw_8bit = import_adamw_8bit()

    class SkippingAdamW8bit(adamw_8bit):
        found_inf: torch.Tensor | None = None

        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            groups = self.param_groups
            try:
                for group in groups:
                    for parameter in group["params"]:
                        if parameter.grad is not None:
                            self.param_groups = [group | {"params": [parameter]}]
                            self._step_one(parameter)
            finally:
                self.param_groups = groups

        def _step_one(self, parameter: torch.Tensor) -> None:
            """A step of the only parameter in the groups, undone where it must not be taken."""
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = self._new_buffer(parameter, True)
                state["exp_avg_sq"] = self._new_buffer(parameter, False)
            state["step"] = state["step"].to(parameter.device)
            tensors = [part for tensor in (parameter, *state.values()) for part in plain_tensors(tensor)]
            before = [] if self.found_inf is None else [tensor.clone() for tensor in tensors]
            # Compiling is for GPUs: on a host it needs a C++ compiler, and takes longer than it saves.
            is_on_host = parameter.device.type == "cpu"
            with torch.compiler.set_stance("force_eager") if is_on_host else contextlib.nullcontext():
                super().step()
            for tensor, old in zip(tensors if before else (), before, strict=True):
                tensor.copy_(torch.where(self.found_inf.to(tensor.device).bool(), old, tensor))

    return SkippingAdamW8bit(groups, lr=lr, betas=betas)


def import_adamw_8bit() -> type[torch.optim.Optimizer]:
    """torchao's AdamW8bit. Raises ImportError, with the way out, if torchao is not there or too old to have it."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        way = f"pip install {TORCHAO_PIN}, or use adamw_bf16_states"
        raise ImportError(f"--optim {ADAMW_8BIT} needs torchao: {way} ({error})") from error
    return AdamW8bit


def plain_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What a tensor is made of on this rank: of a sharded one its shard, of a quantised one its codes and scales."""
    if isinstance(tensor, DTensor):
        return plain_tensors(tensor.to_local())
    if is_traceable_wrapper_subclass(tensor):
        return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [tensor.detach()]
