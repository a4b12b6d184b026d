"""Which token is drawn: logits, the kind of token that must come and a number between 0 and 1 in, a token out."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch

from model.generation.image_grammar import Kind

# Beyond these, sampling that is not greedy would leave the range of fp32.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6
MAX_CFG = 1e6
# The largest seed of PyTorch's generators.
MAX_SEED = 2**63 - 1
MAX_SPECULATIVE = 64
# Up to this k, a partial sort finds the k-th largest faster than a selection.
_FEW = 64


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn."""

    # 0 is greedy.
    temperature: float = 1.0
    # Tokens are drawn from the k most probable and those as probable as the last of them.
    image_top_k: int = 2000
    text_top_k: int = 10
    # Classifier-free guidance inside images, `u + cfg * (c - u)` with the logits u of a branch that has seen nothing
    # before the image; 1 is without.
    cfg: float = 1.0
    # Prompt i draws with a generator seeded by seed + i.
    seed: int = 0
    # Codes that a forward guesses ahead; they are drawn with another noise than one by one.
    speculative: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not (self.temperature == 0 or _is_number(self.temperature, MIN_TEMPERATURE, MAX_TEMPERATURE)):
            bounds = f"from {MIN_TEMPERATURE} to {MAX_TEMPERATURE:.0f}"
            problems.append(f"temperature is {self.temperature}; it must be 0 (greedy) or {bounds}")
        if not _is_number(self.cfg, -MAX_CFG, MAX_CFG):
            bounds = f"from {-MAX_CFG:.0f} to {MAX_CFG:.0f}"
            problems.append(f"cfg is {self.cfg}; it must be a number {bounds}, 1 for no guidance")
        top_ks = self.image_top_k, self.text_top_k
        if not all(isinstance(top_k, Integral) and top_k >= 1 for top_k in top_ks):
            problems.append(f"top-k is {top_ks[0]} (image), {top_ks[1]} (text); both must be whole numbers from 1 on")
        if not isinstance(self.speculative, Integral) or not 0 <= self.speculative <= MAX_SPECULATIVE:
            problems.append(f"speculative is {self.speculative}; it must be a whole number from 0 to {MAX_SPECULATIVE}")
        if not isinstance(self.seed, Integral) or not 0 <= self.seed <= MAX_SEED:
            problems.append(f"seed is {self.seed}; it must be a whole number from 0 to {MAX_SEED}")
        if problems:
            raise ValueError("; ".join(problems) + ".")


def _is_number(value: object, least: float, most: float) -> bool:
    return isinstance(value, Real) and least <= value <= most


def draw_noise(seeds: Sequence[int], num_steps: int) -> torch.Tensor:
    """
    Numbers in [0, 1), fp32 [B, num_steps] on the host: each row from a generator of its own, whatever the batch.

    The numbers depend on `num_steps` too: how a generator fills a tensor depends on its size.
    """
    return torch.stack([torch.rand(num_steps, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def gumbel_noise(seeds: torch.Tensor, places: torch.Tensor, num: int) -> torch.Tensor:
    """
    Noise of the standard Gumbel distribution, fp32 [B, T, num]: a function of the seed, the place and the number alone.

    `seeds` are int64 [B], `places` int64 [B, T].
    """
    numbers = torch.arange(num, device=places.device)
    bits = _mix(_mix(_mix(seeds)[:, None] + places)[..., None] + numbers)
    # 23 bits: with more, the largest number would round to 1 in fp32.
    uniform = ((bits & (2**23 - 1)).float() + 0.5) / 2**23
    return -(-uniform.log()).log()


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """The finalizer of SplitMix64 (Steele, Lea, Flood, 2014), on int64, which wraps around."""
    bits = bits + (0x9E3779B97F4A7C15 - 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> shift & (1 << 64 - shift) - 1)) * (factor - 2**64)
    return bits ^ (bits >> 31 & (1 << 33) - 1)


def pick_codes(logits: torch.Tensor, options: SamplingOptions, noise: torch.Tensor) -> torch.Tensor:
    """Draws by the maximum of logits and Gumbel noise, both [B, T, num_codes].

    Returns indices among the codes, int64 [B, T]; num_codes where a logit is NaN or infinite.
    """
    logits, shape = logits.float().flatten(0, 1), logits.shape[:2]
    if options.temperature:
        logits = logits.masked_fill(logits < _least_kept(logits, options.image_top_k), -torch.inf)
        logits = logits / options.temperature + noise.flatten(0, 1)
    return _largest(logits).view(shape)


def guide(logits: torch.Tensor, unconditional: torch.Tensor, cfg: float) -> torch.Tensor:
    """Guided logits [B, V]: `u + cfg * (c - u)`, for the rows of an image."""
    return unconditional + cfg * (logits - unconditional)


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
        int64 [B]; V where an allowed logit is NaN or infinite.
    """
    logits = logits.float().masked_fill(~allowed[kind], -torch.inf)
    if options.temperature == 0:
        return _largest(logits)
    is_text = (kind == Kind.TEXT)[:, None]
    least = torch.where(is_text, _least_kept(logits, options.text_top_k), _least_kept(logits, options.image_top_k))
    return _draw(logits.masked_fill(logits < least, -torch.inf), options.temperature, noise)


def sample_codes(logits: torch.Tensor, options: SamplingOptions, noise: torch.Tensor) -> torch.Tensor:
    """`sample_tokens` for logits [B, num_codes] of the image codes alone. Returns indices among them, int64 [B]."""
    logits = logits.float()
    if options.temperature == 0:
        return _largest(logits)
    if options.image_top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < _least_kept(logits, options.image_top_k), -torch.inf)
    return _draw(logits, options.temperature, noise)


def _largest(logits: torch.Tensor) -> torch.Tensor:
    """The first of the largest; V where that is NaN or infinite, as in `_draw`."""
    best = logits.max(-1)
    return best.indices.masked_fill(~(best.values < torch.inf), logits.shape[1])


def _least_kept(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """The k-th largest of each row, [B, 1]; minus infinity if there are no more than k."""
    num = logits.shape[1]
    if top_k >= num:
        return logits.new_full((len(logits), 1), -torch.inf)
    if top_k <= _FEW:
        return logits.topk(top_k, dim=-1).values[:, -1:]
    return logits.kthvalue(num - top_k + 1, dim=-1, keepdim=True).values


def _draw(logits: torch.Tensor, temperature: float, noise: torch.Tensor) -> torch.Tensor:
    """The first token at which the sum of the probabilities so far exceeds the noise: i with probability p_i."""
    cumulated = torch.softmax(logits / temperature, -1).cumsum(-1)
    # Off 1, where rounding could leave no token. A token of probability 0 is never the first above the threshold.
    threshold = noise[:, None].clamp(max=1 - 2**-20) * cumulated[:, -1:]
    # With a NaN or infinite logit the sums are NaN, and the search ends behind the last token, at V.
    return torch.searchsorted(cumulated, threshold, right=True)[:, 0]
