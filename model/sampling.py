"""
Which token is drawn.

Where it stands: used by `model/generation.py` on the logits of every step. All functions here are pure: logits, the
state of the grammar and a number between 0 and 1 in, a token out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch

from model.image_grammar import GrammarState, Kind

MIN_TEMPERATURE = 1e-6  # below, what is not greedy would leave the range of fp32
NO_TOKEN = -1  # where no token can be drawn: the logits are not finite
MAX_SEED = 2**63 - 1  # of PyTorch's generators
_FEW = 64  # of so few, the largest are found faster by a partial sort than by a selection


@dataclass(frozen=True)
class SamplingOptions:
    """
    How tokens are drawn.

    Attributes:
        temperature: 0 is greedy; else at least MIN_TEMPERATURE.
        image_top_k, text_top_k: only the k most probable tokens (and those as probable as the last of them) are drawn
            from, inside and outside of images.
        cfg: classifier-free guidance inside images, `u + cfg * (c - u)` with the logits u of a branch that has seen
            nothing before the image; 1 is without.
        seed: prompt i draws with a generator seeded by seed + i.
    """

    temperature: float = 1.0
    image_top_k: int = 2000
    text_top_k: int = 10
    cfg: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not (_is_number(self.temperature) and (self.temperature == 0 or self.temperature >= MIN_TEMPERATURE)):
            problems.append(f"temperature is {self.temperature}; it must be 0 (greedy) or at least {MIN_TEMPERATURE}")
        if not _is_number(self.cfg):
            problems.append(f"cfg is {self.cfg}; it must be a number, 1 for no guidance")
        top_ks = self.image_top_k, self.text_top_k
        if not all(isinstance(top_k, Integral) and top_k >= 1 for top_k in top_ks):
            problems.append(f"top-k is {top_ks[0]} (image), {top_ks[1]} (text); both must be whole numbers from 1 on")
        if not isinstance(self.seed, Integral) or not 0 <= self.seed <= MAX_SEED:
            problems.append(f"seed is {self.seed}; it must be a whole number from 0 to {MAX_SEED}")
        if problems:
            raise ValueError("; ".join(problems) + ".")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and abs(value) < float("inf")


def draw_noise(seeds: Sequence[int], num_steps: int) -> torch.Tensor:
    """
    Numbers in [0, 1), fp32 [B, num_steps] on the host: each row from a generator of its own, whatever the batch.

    For the same numbers again `num_steps` must be the same: how a generator fills a tensor depends on its size.
    """
    return torch.stack([torch.rand(num_steps, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def guide(logits: torch.Tensor, unconditional: torch.Tensor, state: GrammarState, cfg: float) -> torch.Tensor:
    """Guided logits [B, V]: `u + cfg * (c - u)` in the rows of an image, as they are elsewhere."""
    in_rows = (state.since_begin >= 3)[:, None]
    return torch.where(in_rows, unconditional + cfg * (logits - unconditional), logits)


def sample_tokens(
    logits: torch.Tensor, kind: torch.Tensor, allowed: torch.Tensor, options: SamplingOptions, noise: torch.Tensor
) -> torch.Tensor:
    """
    Draw one token per row.

    Args:
        logits: [B, V].
        kind: int64 [B], what each token must be.
        allowed: bool [kinds, V].
        options: temperature and top-k.
        noise: fp32 [B] in [0, 1); not used if greedy.

    Returns:
        int64 [B]; NO_TOKEN where the logits are not finite.
    """
    logits = logits.float().masked_fill(~allowed[kind], -torch.inf)
    if options.temperature == 0:
        return _greatest(logits)
    is_text = (kind == Kind.TEXT)[:, None]
    least = torch.where(is_text, _least_kept(logits, options.text_top_k), _least_kept(logits, options.image_top_k))
    return _draw(logits.masked_fill(logits < least, -torch.inf), options.temperature, noise)


def sample_codes(logits: torch.Tensor, options: SamplingOptions, noise: torch.Tensor) -> torch.Tensor:
    """The same inside images: of logits [B, num_codes] of the image codes alone, which one, int64 [B]."""
    logits = logits.float()
    if options.temperature == 0:
        return _greatest(logits)
    if options.image_top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < _least_kept(logits, options.image_top_k), -torch.inf)
    return _draw(logits, options.temperature, noise)


def _greatest(logits: torch.Tensor) -> torch.Tensor:
    tokens = logits.argmax(-1)  # nan counts as the greatest
    greatest = logits.gather(1, tokens[:, None])[:, 0]
    return tokens.masked_fill(~greatest.isfinite(), NO_TOKEN)


def _least_kept(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """The k-th largest of each row, [B, 1]; minus infinity if there are no more than k."""
    num = logits.shape[1]
    if top_k >= num:
        return logits.new_full((len(logits), 1), -torch.inf)
    if top_k <= _FEW:
        return logits.topk(top_k, dim=-1).values[:, -1:]
    return logits.kthvalue(num - top_k + 1, dim=-1, keepdim=True).values


def _draw(logits: torch.Tensor, temperature: float, noise: torch.Tensor) -> torch.Tensor:
    """
    The first token at which the sum of the probabilities so far exceeds the noise: i with probability p_i.

    The noise is kept off 1, where rounding could find no token; one whose probability is 0 is never the first.
    """
    cumulated = torch.softmax(logits / temperature, -1).cumsum(-1)
    total = cumulated[:, -1:]  # nan if any logit is nan or infinite
    threshold = noise[:, None].clamp(max=1 - 2**-20) * total
    tokens = torch.searchsorted(cumulated, threshold, right=True)
    return tokens.masked_fill(~total.isfinite(), NO_TOKEN)[:, 0]
