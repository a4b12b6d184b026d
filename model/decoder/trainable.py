"""What of a decoder is trained: everything, LoRA adapters (by peft), the rows of image tokens, or named parameters.

Frozen weights are in bf16 (fp32 if the run computes in fp32), without gradient and moments; trained ones are fp32
masters. model/weights/adapter_folder.py has the files of such a training.
"""

import fnmatch
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from data.flags import flag
from model.decoder.local_shards import copy_into_parameter
from model.decoder.trained_rows import ROWS_NAME, TrainedRowsEmbedding, TrainedRowsHead

PEFT_PIN = "peft==0.21.2"
IMAGE_HEAD = "image_head"
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@dataclass(frozen=True)
class TrainableOptions:
    """What is trained; by default everything."""

    lora_rank: int = flag(0, "rank of the LoRA adapters to train, by peft; 0: no adapters")
    lora_alpha: float = flag(16.0, "adapters are scaled by lora_alpha / lora_rank")
    lora_targets: list[str] | None = flag(None, f"projections with adapters, of {LORA_TARGETS}", metavar="NAME")
    train_only: list[str] | None = flag(
        None,
        f"{IMAGE_HEAD} (rows of image tokens in lm_head and embedding) or patterns of parameter names; by default "
        "everything, with --lora_rank the adapters alone",
        metavar="NAME",
    )

    @property
    def is_partial(self) -> bool:
        """Whether anything is frozen."""
        return self.lora_rank > 0 or self.train_only is not None

    @property
    def patterns(self) -> list[str]:
        """`train_only` without `image_head`."""
        return [pattern for pattern in self.train_only or [] if pattern != IMAGE_HEAD]

    @property
    def trains_image_rows(self) -> bool:
        return IMAGE_HEAD in (self.train_only or [])

    def problems(self, is_plan: bool = False) -> list[str]:
        """What is wrong with these options, one sentence each; a plan needs no peft."""
        found = []
        if self.lora_rank < 0:
            found.append(f"--lora_rank must not be negative, got {self.lora_rank}")
        if not 0 < self.lora_alpha < math.inf:
            found.append(f"--lora_alpha must be above 0, got {self.lora_alpha:g}")
        if self.lora_targets is not None and not self.lora_rank:
            found.append("--lora_targets has a meaning only with --lora_rank")
        unknown = sorted(set(self.lora_targets or []) - set(LORA_TARGETS))
        if unknown:
            found.append(f"--lora_targets {' '.join(unknown)}: no such projection; choose of {' '.join(LORA_TARGETS)}")
        if self.lora_rank and self.patterns:
            found.append(
                f"--train_only {' '.join(self.patterns)}: with --lora_rank it may only be {IMAGE_HEAD}; train the "
                "adapters, or name parameters without --lora_rank"
            )
        if self.lora_rank and not is_plan:
            try:
                import_peft()
            except ImportError as error:
                found.append(str(error))
        return found


def choose_trainable(
    model: nn.Module, options: TrainableOptions, frozen_dtype: torch.dtype = torch.bfloat16
) -> nn.Module:
    """Freezes what is not trained, and adds adapters and trained rows, in place, in a decoder on meta.

    Raises ImportError if peft does not work, and ValueError if a pattern matches no parameter, or if the vocabulary has
    no image tokens.
    """
    if not options.is_partial:
        return model
    trained = _match_names([name for name, _ in model.named_parameters()], options)
    if options.lora_rank:
        _add_adapters(model, options)
    master_dtype = model.lm_head.weight.dtype
    for name, parameter in list(model.named_parameters()):
        module, _, kind = name.rpartition(".")
        is_trained = name in trained or is_added(name)
        # A new parameter, because the type of an old one is fixed.
        values = parameter.detach().to(master_dtype if is_trained else frozen_dtype)
        setattr(model.get_submodule(module), kind, nn.Parameter(values, requires_grad=is_trained))
    if options.trains_image_rows:
        ids = model.image_token_ids(torch.device("cpu"))
        if not len(ids):
            raise ValueError(f"--train_only {IMAGE_HEAD}: the vocabulary of the model has no image tokens (IMGIMG...)")
        model.model.embed_tokens = TrainedRowsEmbedding(model.model.embed_tokens.weight.data, ids, master_dtype)
        model.lm_head = TrainedRowsHead(model.lm_head.weight.data, ids, master_dtype)
    return model


@torch.no_grad()
def init_adapters(model: nn.Module, seed: int = 0) -> None:
    """Fills the adapters of a plain or sharded model, if it has any: A uniform within 1 / sqrt(its inputs), B zero."""
    # As peft does it. Every rank draws every full A and keeps its part, so the number of ranks does not matter.
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.zero_()
        elif ".lora_A." in name:
            bound = 1 / math.sqrt(parameter.shape[1])
            full = torch.empty(parameter.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
            copy_into_parameter(parameter, full)


def is_added(name: str) -> bool:
    """Whether `choose_trainable` adds the parameter of that name, so that no other checkpoint has it."""
    return ".lora_" in name or name.endswith(f".{ROWS_NAME}")


def lora_config(options: TrainableOptions, **more: Any) -> Any:
    """peft's configuration of the adapters, with the fields `more`. Raises what `import_peft` raises."""
    targets = list(options.lora_targets or LORA_TARGETS)
    values = {"r": options.lora_rank, "lora_alpha": options.lora_alpha, "target_modules": targets, "bias": "none"}
    return import_peft().LoraConfig(**values, **more)


def import_peft() -> Any:
    """The peft library. Raises ImportError, with the command that installs it."""
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"--lora_rank needs peft: pip install {PEFT_PIN} ({error})") from error
    return peft


def _match_names(names: list[str], options: TrainableOptions) -> set[str]:
    """The parameters that `train_only` names. Raises ValueError for a pattern that matches none."""
    matched: set[str] = set()
    for pattern in options.patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise ValueError(
                f"--train_only {pattern} names no parameter. Give {IMAGE_HEAD}, or a name or pattern (quoted) like "
                f"'model.layers.0.*', '*norm*' or {HEAD}.weight"
            )
        matched.update(found)
    doubled = {f"{EMBEDDING}.weight", f"{HEAD}.weight"} & matched if options.trains_image_rows else ()
    if doubled:
        raise ValueError(
            f"--train_only {IMAGE_HEAD} trains the image rows of {EMBEDDING} and {HEAD}, but another pattern names "
            f"{' and '.join(sorted(doubled))} as a whole: leave one of them away"
        )
    return matched


def _add_adapters(model: nn.Module, options: TrainableOptions) -> None:
    """Puts peft's adapters beside the projections of a model on meta; each weight then belongs to a `base_layer`."""
    try:
        peft = import_peft()
    except ImportError:
        # Only a plan comes this far without peft (`TrainableOptions.problems`).
        for name, module in list(model.named_modules()):
            if name.rpartition(".")[2] in (options.lora_targets or LORA_TARGETS):
                model.set_submodule(name, _PlannedAdapter(module, options))
        return
    try:
        peft.inject_adapter_in_model(lora_config(options), model, low_cpu_mem_usage=True)
    except ImportError as error:
        # peft looks for other libraries here, and rejects versions that are too old.
        raise ImportError(f"--lora_rank: peft does not work here: {error}; upgrade or uninstall it") from error


class _PlannedAdapter(nn.Module):
    """Stands in for peft's adapter in a plan: the same names, shapes, and tensors of the forward."""

    def __init__(self, base_layer: nn.Linear, options: TrainableOptions) -> None:
        super().__init__()
        self.base_layer, self.scaling = base_layer, options.lora_alpha / options.lora_rank
        like = {"bias": False, "device": base_layer.weight.device, "dtype": base_layer.weight.dtype}
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, options.lora_rank, **like)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(options.lora_rank, base_layer.out_features, **like)})

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        added = self.lora_B["default"](self.lora_A["default"](hidden_states)) * self.scaling
        return self.base_layer(hidden_states) + added
