"""The two ways of a training step that exps/bench/train.py compares, on the same random items.

`Ours` is built and stepped by the functions of `finetune_solver.py`. `Recipe` works as the recipe does: stock decoder,
one batch padded to the longest item, no compilation, an fp32 copy of the logits for the cross-entropy and another for
the z-loss, AdamW that is not fused. Attention is torch's sdpa; sharding and mixed precision are ours.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data._utils.pin_memory import pin_memory
from transformers import ChameleonForConditionalGeneration

from data.epoch.rows import collate_row
from data.formats.token_file import TokenItem
from data.items.vocab import IGNORE_INDEX
from exps.bench.synthetic import fill_weights
from model.decoder.chameleon import ChameleonXLLMXConfig, build_config
from model.decoder.trainable import init_adapters
from model.plan.plan import IMAGE_TOKENS, VOCAB_SIZE
from model.run.metrics import MetricSums
from model.run.options import Options
from model.training.optim import BETAS, build_optimizer, set_lr, split_by_decay
from model.training.parallelize import (
    ParallelOptions,
    allocate,
    begin_micro_step,
    build_mesh,
    clip_grad_norm,
    parallelize,
)
from model.training.step import build_sharded, micro_step, optimizer_step
from model.training.step_guard import StepGuard

PAD_ID = 1
# Of `tiny`, about as large as its tokenizer's; all other sizes have Chameleon's, 65,536.
TINY_VOCAB_SIZE = 2048
# Share of an item without targets, as a caption before its image.
PROMPT_SHARE = 0.1
# Different lengths of items that fill rows.
NUM_LENGTHS = 8


@dataclass(frozen=True)
class Work:
    """One optimizer step: in each micro-step, the tokens of each item and of the row that holds all items."""

    item_lens: tuple[int, ...]
    row_len: int
    micro_steps: int = 1

    @property
    def num_tokens(self) -> int:
        """Tokens of items in the whole step, without filler and padding."""
        return sum(self.item_lens) * self.micro_steps

    @property
    def mean_context(self) -> float:
        """Length of a token's item, on average over tokens: the cost of attention depends on it."""
        return sum(length**2 for length in self.item_lens) / sum(self.item_lens)


def fill_rows(num_tokens: int, shortest: int, longest: int) -> tuple[int, ...]:
    """Lengths that fill `num_tokens`: evenly spread from `shortest` to `longest`, repeated, the last one cut."""
    lengths, left = [], num_tokens
    for length in itertools.cycle(spread_lengths(NUM_LENGTHS, shortest, longest)):
        lengths.append(min(length, left))
        left -= lengths[-1]
        # An item of one token has no target.
        if left < 2:
            return tuple(lengths)


def spread_lengths(num_items: int, shortest: int, longest: int) -> tuple[int, ...]:
    """`num_items` lengths, evenly spread from `shortest` to `longest`."""
    return tuple(np.linspace(shortest, longest, num_items).round().astype(int).tolist())


def make_items(lengths: Sequence[int], vocab_size: int, seed: int) -> list[TokenItem]:
    """Items of random tokens, the first `PROMPT_SHARE` of each without targets."""
    rng = np.random.default_rng(seed)
    items = []
    for number, length in enumerate(lengths):
        token = rng.integers(PAD_ID + 1, vocab_size, length).astype(np.int32)
        label = token.copy()
        label[: max(1, int(length * PROMPT_SHARE))] = IGNORE_INDEX
        items.append(TokenItem(token, label, number))
    return items


def bench_config(options: Options) -> ChameleonXLLMXConfig:
    """The decoder's shape by `--model_size`; as in Chameleon, an eighth of the tokens are image tokens."""
    changes = {name: getattr(options.model, name) for name in ("dropout", "z_loss_weight", "mask_image_logits")}
    is_tiny = options.model.model_size == "tiny"
    changes["vocab_size"] = TINY_VOCAB_SIZE if is_tiny else VOCAB_SIZE
    image_tokens = itertools.islice(IMAGE_TOKENS.items(), changes["vocab_size"] // 8)
    return build_config(options.model.model_size, dict(image_tokens), **changes)


class Ours:
    """The step of finetune_solver.py in a group of one, on packed rows."""

    def __init__(
        self,
        work: Work,
        options: Options,
        config: ChameleonXLLMXConfig,
        device: torch.device,
        compile_backend: str | Callable = "inductor",
    ) -> None:
        """Builds and fills model and optimizer, in the order of `Solver.build`."""
        self.work, self.options, self.device = work, options, device
        self.mesh = build_mesh(options.parallel, device.type, 1)
        self.model = build_sharded(
            config, self.mesh, options.parallel, options.trainable, options.float8, compile_backend
        )
        fill(self.model, device, options)
        self.optimizer = build_optimizer(self.model, options.optim)
        self.guard, self.sums = StepGuard(options.guard), MetricSums(device)
        batches = (make_items(work.item_lens, config.vocab_size, seed) for seed in range(work.micro_steps))
        self.rows = [collate_row(items, work.row_len, PAD_ID, options.data.max_seq_len) for items in batches]
        if device.type == "cuda" and options.data.pin_mem:
            self.rows = pin_memory(self.rows)

    def step(self, mark: Callable[[str], None] = lambda phase: None) -> torch.Tensor:
        """One optimizer step, as `Solver.train_step`; returns its loss on the device. `mark(phase)` ends a phase."""
        num_valid, losses = sum(row["num_valid_tokens"] for row in self.rows), []
        for number, row in enumerate(self.rows):
            with marked_head(self.model, mark):
                output = micro_step(
                    self.model,
                    row,
                    self.device,
                    self.options.parallel,
                    is_last=number == len(self.rows) - 1,
                    max_seqlen=self.options.data.max_seq_len,
                    divisor=num_valid,
                )
            self.sums.add(output, row["num_tokens"])
            losses.append(output.loss.detach())
            mark("backward")
        set_lr(self.optimizer, self.options.optim.lr)
        optimizer_step(self.model, self.mesh, self.optimizer, self.guard, self.options.optim.clip_grad, 1, [])
        mark("optimizer")
        return torch.stack(losses).sum()


class Recipe:
    """The recipe's step on the same items."""

    def __init__(self, work: Work, options: Options, config: ChameleonXLLMXConfig, device: torch.device) -> None:
        self.work, self.device = work, device
        parallel = ParallelOptions(
            precision=options.parallel.precision,
            grad_precision=options.parallel.grad_precision,
            checkpointing=options.parallel.recompute_every > 0,
            compile=False,
        )
        self.options = dataclasses.replace(options, parallel=parallel)
        self.mesh = build_mesh(parallel, device.type, 1)
        with torch.device("meta"):
            model = RecipeDecoder(config)
            del model.model.vqmodel
        self.model = parallelize(model, self.mesh, parallel)
        fill(self.model, device, self.options)
        decayed, kept = split_by_decay(self.model.named_parameters(), options.optim.decay_all)
        groups = [{"params": decayed, "weight_decay": options.optim.wd}, {"params": kept, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=options.optim.lr, betas=BETAS)
        self.batches = [
            pad_items(make_items(work.item_lens, config.vocab_size, seed)) for seed in range(work.micro_steps)
        ]

    def step(self, mark: Callable[[str], None] = lambda phase: None) -> torch.Tensor:
        """As `Ours.step`; every micro-step has the same weight."""
        losses = []
        for number, (input_ids, labels) in enumerate(self.batches):
            begin_micro_step(self.model, self.options.parallel, is_last=number == len(self.batches) - 1)
            with marked_head(self.model, mark):
                loss = self.model(input_ids.to(self.device), labels.to(self.device)) / len(self.batches)
            mark("loss")
            loss.backward()
            losses.append(loss.detach())
            mark("backward")
        clip_grad_norm(self.model, self.mesh, self.options.optim.clip_grad)
        set_lr(self.optimizer, self.options.optim.lr)
        self.optimizer.step()
        self.optimizer.zero_grad()
        mark("optimizer")
        return torch.stack(losses).sum()


class RecipeDecoder(ChameleonForConditionalGeneration):
    """Stock layers and head, and the recipe's loss: mean cross-entropy, and z-loss from the logits once more."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """int64 [B, T] twice, padded to the right -> the loss, a scalar."""
        hidden = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
        # Stock `forward` would mask the logits of image tokens.
        logits = self.lm_head(hidden).float()
        targets = labels[:, 1:].contiguous()
        shifted = logits[:, :-1].contiguous()
        loss = F.cross_entropy(shifted.view(-1, shifted.shape[-1]), targets.view(-1), ignore_index=IGNORE_INDEX)
        if self.config.z_loss_weight > 0:
            again = logits[:, :-1].contiguous()
            loss = loss + self.config.z_loss_weight * again.logsumexp(-1).square()[targets >= 0].mean()
        return loss


WAYS: dict[str, Callable[..., Any]] = {"ours": Ours, "baseline": Recipe}


def pad_items(items: Sequence[TokenItem]) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and labels int64 [B, longest]; padding is on the right: a causal mask is enough."""
    shape = len(items), max(len(item.token) for item in items)
    input_ids, labels = torch.full(shape, PAD_ID), torch.full(shape, IGNORE_INDEX)
    for number, item in enumerate(items):
        input_ids[number, : len(item.token)] = torch.from_numpy(item.token)
        labels[number, : len(item.label)] = torch.from_numpy(item.label)
    return input_ids, labels


def fill(model: nn.Module, device: torch.device, options: Options) -> None:
    """Allocates a sharded model and gives it weights."""
    allocate(model, device, options.parallel)
    fill_weights(model)
    init_adapters(model, options.run.seed)
    model.train()


@contextlib.contextmanager
def marked_head(model: nn.Module, mark: Callable[[str], None]) -> Iterator[None]:
    """Marks the end of the forward of the layers, and of the head (with our loss)."""
    handles = [
        model.lm_head.register_forward_pre_hook(lambda *_: mark("forward")),
        model.lm_head.register_forward_hook(lambda *_: mark("loss")),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
