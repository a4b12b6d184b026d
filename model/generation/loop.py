"""
Generation: the loop over a key/value cache.

`inference_solver.py` and `model/run/samples.py` call `generate_batch` with token ids.
`model/generation/image_grammar.py` decides what may come next, `model/generation/sampling.py` draws it,
`model/generation/decode_step.py` (or `model/generation/root_forward.py` for a sharded model) is the forward of one
token. Rows of a batch do not attend to one another.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from data.items.vocab import ChameleonVocab
from model.decoder.chameleon import ChameleonXLLMXConfig, ChameleonXLLMXForConditionalGeneration
from model.generation.decode_step import LeanForward
from model.generation.image_grammar import GrammarState, ImageGrammar, Kind, open_image_start
from model.generation.kv_cache import KVCache, row_bytes
from model.generation.root_forward import RootForward
from model.generation.sampling import SamplingOptions, draw_noise, guide, sample_codes, sample_tokens

CUT_BY_LENGTH, CUT_BY_POSITIONS, CUT_BY_NAN = "max_gen_len", "positions", "nan"

# Steps from one look at which rows are done to the next: on CUDA a look waits for the device.
_CUDA_LOOK_INTERVAL = 16
# On CUDA a step attends to a multiple of so many slots: each number of slots is one graph.
_CUDA_SLOTS = 512


@dataclass(frozen=True)
class Generation:
    """
    One answer.

    Attributes:
        tokens: the new token ids, with the forced start and without the end of the turn.
        cut_by: what cut the turn off before its end: CUT_BY_LENGTH (`max_gen_len`), CUT_BY_POSITIONS (the model has
            no more positions, whatever `max_gen_len`) or CUT_BY_NAN (logits were NaN or infinite); None if it ended.
    """

    tokens: list[int]
    cut_by: str | None = None

    @property
    def finished(self) -> bool:
        return self.cut_by is None


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

    Args:
        config: of the model.
        context_lens: tokens of each prompt with its forced start.
        max_gen_len, options: as for `generate_batch`. All slots are allocated at the start, so all count.
        dtype: of the activations.
    """
    if not context_lens:
        return most
    most_new = min(max_gen_len, config.max_position_embeddings - min(context_lens))
    # CUDA rounds the number of slots up.
    num_slots = max(context_lens) + most_new + _CUDA_SLOTS
    num_branches = 1 + (options.cfg != 1)
    return max(1, min(most, num_bytes // (num_branches * row_bytes(config, num_slots, dtype))))


def generate_batch(
    model: ChameleonXLLMXForConditionalGeneration,
    prompts: Sequence[Sequence[int]],
    vocab: ChameleonVocab,
    options: SamplingOptions,
    max_gen_len: int,
    forced_starts: Sequence[Sequence[int]] | None = None,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
    *,
    forward: LeanForward | RootForward | None = None,
) -> list[Generation]:
    """
    Answers to many prompts, in batches.

    Args:
        model: in evaluation mode, on any device.
        prompts: token ids, each ending where the answer begins.
        vocab: of the tokenizer that the model was trained with.
        options: how tokens are drawn.
        max_gen_len: most new tokens per answer, the forced start included.
        forced_starts: tokens that each answer must begin with (e.g. an image of a given size); part of the answer.
        batch_size: prompts at a time, for speed; `fit_batch_size` says how many have room. The last digits of logits
            depend on how many rows a product has: in tf32, bf16 and fp16 an answer may differ between batch sizes, in
            fp32 no test has seen a difference. The same call gives the same answers.
        progress: called with (new tokens, finished answers) of every forward.
        forward: of one token per row, built of the model; None builds a `LeanForward`. A sharded model needs a
            `RootForward`, and the same arguments on all ranks.

    Raises:
        ValueError: an empty prompt, or one that leaves no room for an answer.
    """
    starts = [list(start) for start in forced_starts or [()] * len(prompts)]
    contexts = [[*prompt, *start] for prompt, start in zip(prompts, starts, strict=True)]
    max_len = model.config.max_position_embeddings
    _check_lengths(contexts, starts, max_len, max_gen_len)
    if not prompts:
        return []
    forward = forward or LeanForward(model, vocab)
    is_sharded = isinstance(forward, RootForward)
    grammar = ImageGrammar(vocab, model.config.vocab_size, forward.device)
    # Neighbours of like length: little padding.
    order = sorted(range(len(contexts)), key=lambda index: len(contexts[index]))
    answers: dict[int, Generation] = {}
    # What a sharded model gathers under inference_mode could not be trained with afterwards.
    with torch.no_grad() if is_sharded else torch.inference_mode():
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            room = [min(max_gen_len - len(starts[row]), max_len - len(contexts[row])) for row in rows]
            noise = torch.zeros(len(rows), max_len)
            if options.temperature:
                noise = draw_noise([options.seed + row for row in rows], max_len)
            batch = _begin_batch(model, forward, grammar, options, [contexts[row] for row in rows], room, noise)
            new_tokens = _decode(batch, progress, use_graphs=_is_cuda(forward.device) and not is_sharded)
            for row, new in zip(rows, new_tokens, strict=True):
                answers[row] = _finish(new, starts[row], len(contexts[row]), vocab, max_gen_len, max_len)
    return [answers[index] for index in range(len(prompts))]


def _check_lengths(contexts: list[list[int]], starts: list[list[int]], max_len: int, max_gen_len: int) -> None:
    for index, (context, start) in enumerate(zip(contexts, starts, strict=True)):
        if len(context) == len(start):
            raise ValueError(f"prompt {index} is empty; it needs at least one token.")
        if len(start) >= max_gen_len:
            raise ValueError(
                f"the answer to prompt {index} must begin with {len(start)} tokens, so max_gen_len must be at least "
                f"{len(start) + 1}, got {max_gen_len}."
            )
        if len(context) >= max_len:
            raise ValueError(
                f"prompt {index} of {len(context)} tokens leaves no room in the model's {max_len} positions; make it "
                "shorter, or raise them (--max_positions)."
            )


def _is_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def _round_up(num_slots: int, device: torch.device) -> int:
    return -(-num_slots // _CUDA_SLOTS) * _CUDA_SLOTS if _is_cuda(device) else num_slots


@dataclass
class _Batch:
    """
    The rows of a batch that still draw. A step feeds their last tokens and draws the next.

    With guidance, the B rows are N = 2B branches. The second half, the unconditional branches, sees the slots since
    the begin-image token, which is its position 0. Outside of images the logits of that half are dropped.

    All that a step reads or changes is in tensors that stay in place: on CUDA a step is replayed as a graph.

    Attributes:
        width: of the longest context; token i of the answers goes to slot `width` + i.
        last_position: of the model.
        cache, mask: of the N branches; mask [N, slots], 0 at the slots that a branch sees, minus infinity elsewhere.
        positions: int64 [N], of the tokens that are fed next.
        index: int64 [1], how many tokens were drawn.
        tokens: int64 [B], drawn last.
        new_tokens: int64 [B, steps], all that were drawn, then padding.
        planned: int64 [B, steps]; in image steps the token that must come, -1 where a code is drawn.
        codes: int64 [num_codes + 1], ids of the image codes, then padding: where logits are NaN the turn ends.
        state: of the grammar [B]; within image steps that after the last of them.
        room: int64 [B], most new tokens of each row.
        noise: fp32 [B, steps].
    """

    forward: LeanForward | RootForward
    grammar: ImageGrammar
    options: SamplingOptions
    width: int
    last_position: int
    cache: KVCache
    mask: torch.Tensor
    positions: torch.Tensor
    index: torch.Tensor
    tokens: torch.Tensor
    new_tokens: torch.Tensor
    planned: torch.Tensor
    codes: torch.Tensor
    state: GrammarState
    room: torch.Tensor
    noise: torch.Tensor

    @property
    def num_steps(self) -> int:
        return self.new_tokens.shape[1]

    @property
    def is_guided(self) -> bool:
        return self.options.cfg != 1

    def step(self, num_visible: int, is_image: bool) -> None:
        """Draw the next token of every row; branches see the first `num_visible` slots at most."""
        tokens, slot = self.tokens, self.index + (self.width - 1)
        if self.is_guided:
            if not is_image:
                # The unconditional branch of an image that begins sees nothing before it.
                begins = (self.state.since_begin == 1)[:, None]
                self.mask[len(tokens) :].masked_fill_(begins, -torch.inf)
                self.place_unconditional()
            tokens = tokens.repeat(2)
        self.mask.index_fill_(1, slot, 0.0)
        visible = self.mask[:, :num_visible]
        logits = self.forward(tokens, self.positions, self.cache, slot, visible, is_image).float()
        if self.is_guided:
            branches = logits.chunk(2)
            logits = guide(*branches, self.options.cfg) if is_image else self.guide_images(*branches)
        # Rows that are done are fed on beside longer ones: their positions must stay valid.
        self.positions.add_(1).clamp_(max=self.last_position)
        self.draw(logits, is_image)

    def draw(self, logits: torch.Tensor, is_image: bool) -> None:
        """Draw the next token of every row from logits [B, V] (in image steps [B, num_codes]), and store it."""
        grammar, noise = self.grammar, self.noise.index_select(1, self.index)[:, 0]
        if is_image:
            planned = self.planned.index_select(1, self.index)[:, 0]
            tokens = torch.where(planned < 0, self.codes[sample_codes(logits, self.options, noise)], planned)
        else:
            kind = torch.where(self.index < self.room, grammar.kind(self.state), Kind.PADDING)
            tokens = sample_tokens(logits, kind, grammar.allowed, self.options, noise)
            tokens.masked_fill_(tokens == logits.shape[1], grammar.vocab.pad_id)
        tokens = self.forward.agree(tokens)
        self.tokens.copy_(tokens)
        self.new_tokens.index_copy_(1, self.index, tokens[:, None])
        if not is_image:
            self.set_state(grammar.advance(self.state, tokens))
        self.index += 1

    def guide_images(self, logits: torch.Tensor, unconditional: torch.Tensor) -> torch.Tensor:
        """Guided logits [B, V] of the rows that are within the grid of an image; those of the others unchanged."""
        in_grid = (self.state.since_begin >= 3)[:, None]
        return torch.where(in_grid, guide(logits, unconditional, self.options.cfg), logits)

    def place_unconditional(self) -> None:
        """Set the positions of the unconditional branches: they count from the begin-image token."""
        if self.is_guided:
            self.positions[len(self.tokens) :] = (self.state.since_begin - 1).clamp(0, self.last_position)

    def set_state(self, state: GrammarState) -> None:
        for old, new in zip(self.state, state, strict=True):
            old.copy_(new)

    def look(self, index: int) -> tuple[list[int], int]:
        """Rows that draw token `index`, and for how many steps from there all of these are within an image."""
        is_alive = ~self.state.done & (index < self.room)
        most = self.num_steps - index
        num_left = torch.where(is_alive, self.grammar.num_left(self.state), most).clamp(max=most)
        # The host waits for the device here.
        return is_alive.nonzero()[:, 0].tolist(), min(num_left.tolist())

    def plan_image_steps(self, steps: range) -> None:
        """Plan steps for which all rows are within an image or done: they make logits for codes alone."""
        kinds = self.grammar.kinds_ahead(self.state, len(steps))
        in_room = torch.arange(steps.start, steps.stop, device=kinds.device) < self.room[:, None]
        only_token = self.grammar.only_token[torch.where(in_room, kinds, Kind.PADDING)]
        self.planned[:, steps.start : steps.stop] = only_token
        self.place_unconditional()
        # Which codes are drawn does not matter to the grammar: the state after these steps is known.
        self.set_state(self.grammar.skip(self.state, len(steps)))

    def select(self, rows: list[int]) -> None:
        """Keep these rows only, in new tensors."""
        kept = torch.tensor(rows, device=self.index.device)
        branches = torch.cat([kept, kept + len(self.tokens)]) if self.is_guided else kept
        self.cache.select(branches)
        self.mask, self.positions = self.mask[branches], self.positions[branches]
        self.state = GrammarState(*(tensor[kept] for tensor in self.state))
        for name in ("tokens", "new_tokens", "planned", "room", "noise"):
            setattr(self, name, getattr(self, name)[kept])

    def changing(self) -> list[torch.Tensor]:
        """What a step changes, but for the cache: a step that is run again writes the same there."""
        return [self.index, self.new_tokens, self.tokens, self.positions, self.mask, *self.state]


def _begin_batch(
    model: ChameleonXLLMXForConditionalGeneration,
    forward: LeanForward | RootForward,
    grammar: ImageGrammar,
    options: SamplingOptions,
    contexts: list[list[int]],
    room: list[int],
    noise: torch.Tensor,
) -> _Batch:
    """Run the model over the contexts and draw the first token of every row. `noise`: [B, at least max(room)]."""
    vocab, device, num_steps = grammar.vocab, forward.device, max(room)
    tails = []
    if options.cfg != 1:
        # Of a context without an open image, any token will do.
        tails = [context[open_image_start(context, vocab) :] or [vocab.begin_image_id] for context in contexts]
    width = max(map(len, contexts))
    num_slots = _round_up(width + num_steps, device)
    positions = torch.tensor([len(row) for row in contexts + tails], device=device)
    is_hidden = torch.arange(num_slots, device=device) >= positions[:, None]
    shape = len(contexts), num_steps
    batch = _Batch(
        forward=forward,
        grammar=grammar,
        options=options,
        width=width,
        last_position=model.config.max_position_embeddings - 1,
        cache=KVCache(model.config, len(positions), num_slots, forward.dtype, device),
        mask=torch.zeros(is_hidden.shape, dtype=forward.dtype, device=device).masked_fill_(is_hidden, -torch.inf),
        positions=positions,
        index=torch.zeros(1, dtype=torch.int64, device=device),
        tokens=torch.zeros(len(contexts), dtype=torch.int64, device=device),
        new_tokens=torch.full(shape, vocab.pad_id, device=device),
        planned=torch.zeros(shape, dtype=torch.int64, device=device),
        codes=torch.cat([forward.code_ids, forward.code_ids.new_tensor([vocab.pad_id])]),
        state=grammar.start(contexts),
        room=torch.tensor(room, device=device),
        noise=noise[:, :num_steps].to(device),
    )

    def prefill(rows: list[list[int]], first_row: int) -> torch.Tensor:
        """Logits [B, V] after each row; fills the cache from `first_row` on."""
        longest = max(map(len, rows))
        input_ids = torch.tensor([row + [vocab.pad_id] * (longest - len(row)) for row in rows], device=device)
        last = torch.tensor([len(row) - 1 for row in rows], device=device)
        batch.cache.begin_prefill(slice(first_row, first_row + len(rows)))
        return model(input_ids, past_key_values=batch.cache, logits_to_keep=last).logits[:, 0].float()

    logits = prefill(contexts, 0)
    if tails:
        logits = batch.guide_images(logits, prefill(tails, len(contexts)))
    batch.draw(logits, is_image=False)
    return batch


def _decode(batch: _Batch, progress: Callable[[int, int], None] | None, use_graphs: bool) -> list[list[int]]:
    """New tokens of every row of a batch that has drawn its first, with padding at the end."""
    device = batch.index.device
    alive = list(range(len(batch.tokens)))
    answers: list[list[int]] = [[] for _ in alive]
    report = progress or (lambda num_tokens, num_finished: None)
    interval = _CUDA_LOOK_INTERVAL if _is_cuda(device) else 1
    next_look, image_steps = 0, range(0)
    graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}

    def hand_out() -> None:
        for row, tokens in zip(alive, batch.new_tokens.tolist(), strict=True):
            answers[row] = tokens

    report(len(alive), 0)
    # Each turn of the loop draws token `index`.
    for index in range(1, batch.num_steps):
        if index >= next_look:
            rows, num_image_steps = batch.look(index)
            if not rows:
                break
            image_steps = range(index, index + num_image_steps)
            if image_steps:
                batch.plan_image_steps(image_steps)
            # Rows that are done make way once half of them are.
            if 2 * len(rows) <= len(alive):
                hand_out()
                report(0, len(alive) - len(rows))
                batch.select(rows)
                alive = [alive[row] for row in rows]
                # They hold the tensors that were replaced.
                graphs.clear()
            next_look = index + max(interval, num_image_steps)
        key = (_round_up(batch.width + index, device), index in image_steps)
        if not use_graphs:
            batch.step(*key)
        else:
            if key not in graphs:
                graphs[key] = capture_graph(lambda: batch.step(*key), batch.changing())  # noqa: B023
            graphs[key].replay()
        report(len(alive), 0)
    hand_out()
    report(0, len(alive))
    return answers


def capture_graph(step: Callable[[], None], changing: list[torch.Tensor]) -> torch.cuda.CUDAGraph:
    """
    A CUDA graph of one step; nothing is changed.

    Args:
        step: works on tensors that stay in place, without waiting for the device.
        changing: tensors that it changes. They are put back: the step runs before the capture, since libraries set
            themselves up and code is compiled in the first run.
    """
    before = [tensor.clone() for tensor in changing]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
            for tensor, old in zip(changing, before, strict=True):
                tensor.copy_(old)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def _finish(
    new_tokens: list[int], start: list[int], context_len: int, vocab: ChameleonVocab, max_gen_len: int, max_len: int
) -> Generation:
    """The answer up to the end of the turn or the padding, neither of which can be within an answer."""
    ends = (vocab.end_of_turn_id, vocab.pad_id)
    num_new = next((i for i, token in enumerate(new_tokens) if token in ends), len(new_tokens))
    tokens = start + new_tokens[:num_new]
    if vocab.end_of_turn_id in new_tokens[num_new : num_new + 1]:
        return Generation(tokens)
    if context_len + num_new == max_len:
        return Generation(tokens, CUT_BY_POSITIONS)
    return Generation(tokens, CUT_BY_LENGTH if len(tokens) == max_gen_len else CUT_BY_NAN)
