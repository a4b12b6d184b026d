"""Several codes per forward, the same codes as one per forward: `--speculative`.

The noise of a code is fixed by seed and place (Gumbel-max sampling), so that a code is a function of the codes before
it. Jacobi iteration: a step feeds the last code that is certain and guesses of the next ones; what it draws behind
guesses that were right is certain, the rest is guessed in the next step (Song et al., "Accelerating Feedforward
Computation via Parallel Nonlinear Equation Solving", 2021).
"""

import torch

from model.generation.batch import Batch
from model.generation.decode_step import LeanForward
from model.generation.sampling import guide, gumbel_noise, pick_codes


def begin(batch: Batch, num_steps: int) -> None:
    """Prepare a batch for `num_steps` planned image steps."""
    batch.guesses.fill_(-1)
    batch.guesses[:, 0] = batch.tokens
    batch.num_certain.zero_()
    batch.num_steps.fill_(num_steps)


def step(batch: Batch, forward: LeanForward, num_visible: int) -> None:
    """
    Feed the last certain token of each row and `options.speculative` guesses, and draw what follows each of them.

    Rows come forward at different speeds. Token i of the image steps is fed at the slot that it has without guessing.
    """
    ahead = torch.arange(batch.options.speculative + 1, device=batch.index.device)
    # [B, T], how many tokens of the image steps are before each token that is drawn.
    places = batch.num_certain[:, None] + ahead
    last = batch.planned.shape[1] - 1
    fed = batch.guesses.gather(1, places)
    fed = torch.where(fed < 0, batch.plan_of(places - 1), fed)
    fed = torch.where(fed < 0, fed[:, :1], fed)
    first_slot = batch.index + batch.width - 1
    branches = [places, places] if batch.is_guided else [places]
    offsets = torch.cat(branches)
    slots = (first_slot + offsets).clamp(max=batch.mask.shape[1] - 1)
    slot_ids = torch.arange(num_visible, device=slots.device)
    is_seen = (slot_ids >= first_slot) & (slot_ids <= slots[..., None])
    mask = batch.mask[:, None, :num_visible].masked_fill(is_seen, 0.0)
    positions = (batch.positions[:, None] + offsets).clamp(max=last)
    logits = forward(torch.cat([fed] * len(branches)), positions, batch.cache, slots, mask, is_image=True).float()
    if batch.is_guided:
        logits = guide(*logits.chunk(2), batch.options.cfg)
    noise = gumbel_noise(batch.seeds, batch.index + places, logits.shape[-1])
    drawn = batch.grammar.codes[pick_codes(logits, batch.options, noise)]
    planned = batch.plan_of(places)
    drawn = torch.where(planned < 0, drawn, planned)
    is_right = (drawn[:, :-1] == fed[:, 1:]).long().cumprod(1)
    batch.guesses.scatter_(1, places + 1, drawn)
    batch.num_certain.add_(1 + is_right.sum(1)).clamp_(max=batch.num_steps)


def end(batch: Batch, steps: range) -> None:
    """Put a batch into the state that it has after these steps one by one."""
    first_slot = int(batch.width) + steps.start - 1
    batch.new_tokens[:, steps.start : steps.stop] = batch.guesses[:, 1 : 1 + len(steps)]
    batch.tokens.copy_(batch.guesses[:, len(steps)])
    batch.positions.add_(len(steps)).clamp_(max=batch.planned.shape[1] - 1)
    batch.mask[:, first_slot : first_slot + len(steps)] = 0.0
    batch.index += len(steps)
