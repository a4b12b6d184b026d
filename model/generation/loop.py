"""Generation: the loop over a key/value cache.

`inference_solver.py` and `model/run/samples.py` call `generate_batch` with token ids. `image_grammar.py` decides what
may come next, `sampling.py` draws it, `decode_step.py` is the forward of one token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.items.vocab import ChameleonVocab
from model.decoder.chameleon import ChameleonXLLMXConfig, ChameleonXLLMXForConditionalGeneration
from model.generation import draw_ahead
from model.generation.batch import CUDA_SLOTS, Batch, capture_graph, is_cuda, num_branches, round_up, take_batch
from model.generation.decode_step import LeanForward, RootForward
from model.generation.image_grammar import open_image_start
from model.generation.kv_cache import row_bytes
from model.generation.sampling import MAX_SEED, SamplingOptions, draw_noise

CUT_BY_LENGTH, CUT_BY_POSITIONS, CUT_BY_NAN = "max_gen_len", "positions", "nan"

# Steps from one look at which rows are done to the next: on CUDA a look waits for the device.
_CUDA_LOOK_INTERVAL = 16


@dataclass(frozen=True)
class Generation:
    """One answer: the new token ids, with the forced start and without the end of the turn."""

    tokens: list[int]
    # What cut the turn off before its end: `max_gen_len`, no more positions, or logits that are NaN or infinite.
    cut_by: str | None = None


def fit_batch_size(
    config: ChameleonXLLMXConfig,
    context_lens: Sequence[int],
    max_gen_len: int,
    options: SamplingOptions,
    dtype: torch.dtype,
    num_bytes: int,
    most: int,
) -> int:
    """
    Prompts at a time, from 1 to `most`, whose cache fits into `num_bytes`.

    `context_lens` are the tokens of each prompt with its forced start, `dtype` is that of the activations.
    """
    if not context_lens:
        return most
    most_new = min(max_gen_len, config.max_position_embeddings - min(context_lens))
    # CUDA rounds the number of slots up.
    num_slots = max(context_lens) + most_new + CUDA_SLOTS
    return max(1, min(most, num_bytes // (num_branches(options) * row_bytes(config, num_slots, dtype))))


def generate_batch(
    model: ChameleonXLLMXForConditionalGeneration,
    prompts: Sequence[Sequence[int]],
    vocab: ChameleonVocab,
    options: SamplingOptions,
    max_gen_len: int,
    forced_starts: Sequence[Sequence[int]] | None = None,
    batch_size: int = 64,
    progress: Callable[[int, int], None] = lambda num_tokens, num_finished: None,
    *,
    forward: LeanForward | RootForward | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Generation]:
    """
    Answers to many prompts, in batches.

    The last digits of logits depend on how many rows a product has: in tf32, bf16 and fp16 an answer may differ between
    batch sizes, in fp32 no test has seen a difference. The same call gives the same answers.

    Args:
        model: in evaluation mode, on any device.
        prompts: token ids, each ending where the answer begins.
        vocab: of the tokenizer that the model was trained with.
        options: how tokens are drawn.
        max_gen_len: most new tokens per answer, the forced start included.
        forced_starts: tokens that each answer must begin with (e.g. an image of a given size); part of the answer.
        batch_size: prompts at a time; `fit_batch_size` says how many have room.
        progress: called with (new tokens, finished answers) of every forward.
        forward: of one token per row, built of the model; it keeps the buffers and CUDA graphs for the next call.
            None builds a `LeanForward`. A sharded model needs a `RootForward`, and the same arguments on all ranks.
        seeds: of each prompt; by default `options.seed` + its index, after MAX_SEED from 0 on.

    Raises:
        ValueError: an empty prompt, or one that leaves no room for an answer.
    """
    starts = [list(start) for start in forced_starts or [()] * len(prompts)]
    contexts = [[*prompt, *start] for prompt, start in zip(prompts, starts, strict=True)]
    max_len = model.config.max_position_embeddings
    for index, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
        try:
            check_length(len(prompt), len(start), max_gen_len, max_len)
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from None
    forward = forward or LeanForward(model, vocab)
    seeds = seeds or [(options.seed + index) & MAX_SEED for index in range(len(prompts))]
    # Neighbours of like length: little padding. The longest first: the buffers of the first batch do for the others.
    order = sorted(range(len(contexts)), key=lambda index: len(contexts[index]), reverse=True)
    answers: dict[int, Generation] = {}
    # What a sharded model gathers under inference_mode could not be trained with afterwards.
    with torch.no_grad() if isinstance(forward, RootForward) else torch.inference_mode():
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            room = [min(max_gen_len - len(starts[row]), max_len - len(contexts[row])) for row in rows]
            width = max(len(contexts[row]) for row in rows)
            num_slots = width + max(room) + options.speculative
            batch = take_batch(model.config, forward, vocab, options, len(rows), num_slots)
            batch.seeds.copy_(torch.tensor([seeds[row] for row in rows]))
            if options.temperature:
                batch.noise.copy_(draw_noise([seeds[row] for row in rows], max_len))
            _prefill(batch, model, forward, [contexts[row] for row in rows], room)
            new_tokens = _decode(batch, forward, width, max(room), progress)
            for row, new in zip(rows, new_tokens, strict=True):
                answers[row] = _finish(new, starts[row], len(contexts[row]), vocab, max_gen_len, max_len)
            # Larger buffers take the place of these: both might not fit.
            del batch
    return [answers[index] for index in range(len(prompts))]


def check_length(prompt_len: int, start_len: int, max_gen_len: int, num_positions: int) -> None:
    """Raises ValueError for a prompt that is empty or leaves no room for an answer that begins with `start_len`."""
    if not prompt_len:
        raise ValueError("the prompt is empty; it needs at least one token.")
    if start_len >= max_gen_len:
        raise ValueError(
            f"the answer must begin with {start_len} tokens, so max_gen_len must be at least {start_len + 1}, got "
            f"{max_gen_len}."
        )
    if prompt_len + start_len >= num_positions:
        raise ValueError(
            f"{prompt_len + start_len} tokens leave no room in the model's {num_positions} positions; make the prompt "
            "shorter, or raise them (--max_positions)."
        )


def _prefill(
    batch: Batch,
    model: ChameleonXLLMXForConditionalGeneration,
    forward: LeanForward | RootForward,
    contexts: list[list[int]],
    room: list[int],
) -> None:
    """Run the model over the contexts and draw the first token of every row; all of the batch is set."""
    vocab, device = batch.grammar.vocab, forward.device
    tails = []
    if batch.is_guided:
        # Of a context without an open image, any token will do.
        tails = [context[open_image_start(context, vocab) :] or [vocab.begin_image_id] for context in contexts]
    # Slots that nothing sees are multiplied by 0: a NaN of an earlier batch would stay NaN.
    for layer in batch.cache.layers:
        layer.zero_()
    batch.positions.copy_(torch.tensor([len(row) for row in contexts + tails]))
    is_hidden = torch.arange(batch.mask.shape[1], device=device) >= batch.positions[:, None]
    batch.mask.zero_().masked_fill_(is_hidden, -torch.inf)
    batch.index.zero_()
    batch.width.fill_(max(map(len, contexts)))
    batch.new_tokens.fill_(vocab.pad_id)
    batch.set_state(batch.grammar.start(contexts))
    batch.room.copy_(torch.tensor(room))

    def prefill(rows: list[list[int]], first_row: int) -> Tensor:
        """Logits [B, V] after each row; fills the cache from `first_row` on."""
        longest = max(map(len, rows))
        input_ids = torch.tensor([row + [vocab.pad_id] * (longest - len(row)) for row in rows], device=device)
        last = torch.tensor([len(row) - 1 for row in rows], device=device)
        batch.cache.begin_prefill(slice(first_row, first_row + len(rows)))
        return model(input_ids, past_key_values=batch.cache, logits_to_keep=last).logits[:, 0].float()

    logits = prefill(contexts, 0)
    if tails:
        logits = batch.guide_images(logits, prefill(tails, len(contexts)))
    batch.draw(forward, logits, is_image=False)


def _decode(
    batch: Batch, forward: LeanForward | RootForward, width: int, num_steps: int, progress: Callable[[int, int], None]
) -> list[list[int]]:
    """New tokens of every row of a batch that has drawn its first, with padding at the end.

    `width` is at least the longest context; at most `num_steps` tokens are drawn.
    """
    device = forward.device
    alive = list(range(len(batch.tokens)))
    answers: list[list[int]] = [[] for _ in alive]
    interval = _CUDA_LOOK_INTERVAL if is_cuda(device) else 1
    next_look, image_steps = 0, range(0)

    def hand_out() -> None:
        for row, tokens in zip(alive, batch.new_tokens[:, :num_steps].tolist(), strict=True):
            answers[row] = tokens

    progress(len(alive), 0)
    # Each turn of the loop draws token `index`, or those of all image steps.
    index = 1
    while index < num_steps:
        if index >= next_look:
            rows, num_image_steps = batch.look(index, num_steps)
            if not rows:
                break
            image_steps = range(index, index + num_image_steps)
            if image_steps:
                batch.plan_image_steps(image_steps)
            # Rows that are done make way once half of them are.
            if 2 * len(rows) <= len(alive):
                hand_out()
                progress(0, len(alive) - len(rows))
                batch = batch.select(rows)
                alive = [alive[row] for row in rows]
            next_look = index + max(interval, num_image_steps)
            if image_steps and batch.options.speculative and isinstance(forward, LeanForward):
                _draw_ahead(batch, forward, width, image_steps, progress)
                index = image_steps.stop
                continue
        is_image, num_visible = index in image_steps, min(round_up(width + index, device), batch.mask.shape[1])
        _run(batch, forward, "image" if is_image else "any", num_visible)
        progress(len(alive), 0)
        index += 1
    hand_out()
    progress(0, len(alive))
    return answers


def _draw_ahead(
    batch: Batch, forward: LeanForward, width: int, steps: range, progress: Callable[[int, int], None]
) -> None:
    """Draw the tokens of planned image steps, several per forward."""
    interval, num_fed = _CUDA_LOOK_INTERVAL if is_cuda(forward.device) else 1, batch.options.speculative + 1
    counts = [0] * len(batch.tokens)
    draw_ahead.begin(batch, len(steps))
    while min(counts) < len(steps):
        num_visible = width + steps.start + max(counts) + interval * num_fed - 1
        for _ in range(interval):
            _run(batch, forward, "ahead", min(round_up(num_visible, forward.device), batch.mask.shape[1]))
        num_before, counts = sum(counts), batch.num_certain.tolist()
        progress(sum(counts) - num_before, 0)
    draw_ahead.end(batch, steps)


def _run(batch: Batch, forward: LeanForward | RootForward, kind: str, num_visible: int) -> None:
    """A step, on CUDA by its graph, which is captured the first time and kept with the buffers."""

    def step() -> None:
        if kind == "ahead":
            draw_ahead.step(batch, forward, num_visible)
        else:
            batch.step(forward, num_visible, is_image=kind == "image")

    if not is_cuda(forward.device) or isinstance(forward, RootForward):
        step()
        return
    key = len(batch.tokens), num_visible, kind
    if key not in batch.graphs:
        # The cache is not among what the step changes: a step that is run again writes the same there.
        changing = [batch.index, batch.new_tokens, batch.tokens, batch.positions, batch.mask, *batch.state]
        changing += [batch.guesses, batch.num_certain]
        batch.graphs[key] = capture_graph(step, changing, next(iter(batch.graphs.values()), None))
    batch.graphs[key].replay()


def _finish(
    new_tokens: list[int], start: list[int], context_len: int, vocab: ChameleonVocab, max_gen_len: int, max_len: int
) -> Generation:
    """The answer up to the end of the turn or the padding; an answer contains neither."""
    ends = (vocab.end_of_turn_id, vocab.pad_id)
    num_new = next((i for i, token in enumerate(new_tokens) if token in ends), len(new_tokens))
    tokens = start + new_tokens[:num_new]
    if vocab.end_of_turn_id in new_tokens[num_new : num_new + 1]:
        return Generation(tokens)
    if context_len + num_new == max_len:
        return Generation(tokens, CUT_BY_POSITIONS)
    return Generation(tokens, CUT_BY_LENGTH if len(tokens) == max_gen_len else CUT_BY_NAN)
