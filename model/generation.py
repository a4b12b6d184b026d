"""
Generation: the loop over a key/value cache.

Where it stands: `inference_solver.py` turns conversations into token ids and calls `generate_batch`;
`model/image_grammar.py` says what may come next, `model/sampling.py` draws it, `model/decode_step.py` is the forward of
one token, of a sharded model `model/root_forward.py`. Rows of a batch do not see one another.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch

from data.vocab import ChameleonVocab
from model.decode_step import LeanForward
from model.decoder.chameleon import ChameleonXLLMXConfig, ChameleonXLLMXForConditionalGeneration
from model.image_grammar import GrammarState, ImageGrammar, Kind, open_image_start
from model.kv_cache import KVCache, row_bytes
from model.root_forward import RootForward
from model.sampling import SamplingOptions, draw_noise, guide, sample_codes, sample_tokens

__all__ = [
    "CUT_BY_LENGTH",
    "CUT_BY_NAN",
    "CUT_BY_POSITIONS",
    "Generation",
    "SamplingOptions",
    "fit_batch_size",
    "generate_batch",
]

CUT_BY_LENGTH, CUT_BY_POSITIONS, CUT_BY_NAN = "max_gen_len", "positions", "nan"

_CUDA_CHECK_INTERVAL = 16  # steps: asking whether rows are done waits for the device
_CUDA_SLOTS = 512  # on CUDA a step attends to a multiple of so many slots: each number is one graph


@dataclass(frozen=True)
class Generation:
    """
    One answer.

    Attributes:
        tokens: the new token ids, with the forced start and without the end of the turn.
        cut_by: what cut the turn off before its end, CUT_BY_LENGTH (`max_gen_len`), CUT_BY_POSITIONS (the model has
            no more of them, whatever `max_gen_len`) or CUT_BY_NAN (its logits were NaN or infinite); None if it ended.
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
        max_gen_len, options: as for `generate_batch`. All its slots are there from the beginning, so they count.
        dtype: of the activations.
    """
    if not context_lens:
        return most
    most_new = min(max_gen_len, config.max_position_embeddings - min(context_lens))
    num_slots = max(context_lens) + most_new + _CUDA_SLOTS  # rounded up on CUDA
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
    cuda_graph: bool | None = None,
    compile_step: bool = False,
    root_forward: RootForward | None = None,
) -> list[Generation]:
    """
    Answers to many prompts, in batches.

    Args:
        model: in evaluation mode, on any device; a plain one, whose projections and head are moved in memory
            (`DecodeStep`), or with `root_forward` a sharded one.
        prompts: token ids, each ending where the answer begins.
        vocab: of the tokenizer that the model was trained with.
        options: how tokens are drawn.
        max_gen_len: most new tokens per answer, the forced start included.
        forced_starts: tokens that each answer must begin with (e.g. an image of a given size); part of the answer.
        batch_size: prompts at a time, for speed; `fit_batch_size` says how many have room. The last digits of logits
            depend on how many rows a product has: in fp32 too little to have changed an answer in the tests, in tf32,
            bf16 and fp16 an answer may differ between batch sizes. The same call gives the same answers.
        progress: called with (new tokens, finished answers) of every forward.
        cuda_graph: replay each step as a CUDA graph; None: where there is CUDA.
        compile_step: fuse a step's small operations with `torch.compile`, which takes a minute at first.
        root_forward: every step through this forward of the whole model. All ranks call with the same arguments.

    Raises:
        ValueError: an empty prompt, one that leaves no room, a vocabulary that is larger than the model's, or CUDA
            graphs on another device.
    """
    device = root_forward.device if root_forward else model.lm_head.weight.device
    if cuda_graph and device.type != "cuda":
        raise ValueError(f"cuda_graph is on, but the model is on {device}; it needs CUDA. Leave it at None.")
    forced_starts = forced_starts or [()] * len(prompts)
    rows = [
        _Row(index, list(prompt), list(forced))
        for index, (prompt, forced) in enumerate(zip(prompts, forced_starts, strict=True))
    ]
    _check_rows(rows, model.config, vocab, max_gen_len)
    if not rows:
        return []
    grammar = ImageGrammar(vocab, model.config.vocab_size, device)
    answers: dict[int, Generation] = {}
    rows.sort(key=lambda row: len(row.prompt) + len(row.forced))  # neighbours of like length: little padding
    # What a sharded model gathers under inference_mode could not be trained with afterwards.
    with torch.no_grad() if root_forward else torch.inference_mode():
        forward = root_forward or LeanForward(model, vocab, compile_step)
        use_graphs = device.type == "cuda" and cuda_graph is not False and not root_forward
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            contexts = [row.prompt + row.forced for row in batch]
            max_len = model.config.max_position_embeddings
            room = [min(max_gen_len - len(r.forced), max_len - len(c)) for r, c in zip(batch, contexts, strict=True)]
            noise = draw_noise([options.seed + row.index for row in batch], max_len) if options.temperature else None
            decoder = _Decoder(model, forward, grammar, contexts, room, options, noise, use_graphs)
            for row, new in zip(batch, _decode_all(decoder, progress), strict=True):
                answers[row.index] = _finish(row, new, vocab, max_gen_len, max_len)
    return [answers[index] for index in range(len(prompts))]


@dataclass(frozen=True)
class _Row:
    index: int
    prompt: list[int]
    forced: list[int]


def _check_rows(rows: list[_Row], config: ChameleonXLLMXConfig, vocab: ChameleonVocab, max_gen_len: int) -> None:
    if vocab.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {vocab.vocab_size} ids, the model only {config.vocab_size}: they do not fit together."
        )
    if config.mask_image_logits:
        raise ValueError("mask_image_logits is on in the model's configuration: it could draw no image. Turn it off.")
    for row in rows:
        if not row.prompt:
            raise ValueError(f"prompt {row.index} is empty; it needs at least one token.")
        if len(row.forced) >= max_gen_len:
            raise ValueError(
                f"the answer to prompt {row.index} must begin with {len(row.forced)} tokens, so max_gen_len must be "
                f"at least {len(row.forced) + 1}, got {max_gen_len}."
            )
        if len(row.prompt) + len(row.forced) >= config.max_position_embeddings:
            raise ValueError(
                f"prompt {row.index} of {len(row.prompt) + len(row.forced)} tokens leaves no room in the model's "
                f"{config.max_position_embeddings} positions; make it shorter, or raise them (--max_positions)."
            )


class _Decoder:
    """
    The model, its cache and where each living row stands. One step feeds the last tokens and draws the next.

    With guidance the cache has a second half, the unconditional branches. Such a branch sees the slots since the
    begin-image token, which is its position 0; outside of images it is fed all the same, and what it gives is dropped.

    Everything that a step reads or changes lies in tensors that stay where they are, so that a step can be replayed as
    a CUDA graph: `index` counts the tokens drawn, and a step's tokens go to the slot behind the longest context.

    Once every row is within the grid of an image or done, the host knows for how many steps. In these, logits are of
    the image codes only, what is no code was planned at once (`planned`), and `state` follows at their end.
    """

    def __init__(
        self,
        model: ChameleonXLLMXForConditionalGeneration,
        forward: LeanForward | RootForward,
        grammar: ImageGrammar,
        contexts: list[list[int]],
        room: list[int],
        options: SamplingOptions,
        noise: torch.Tensor | None,
        use_graphs: bool,
    ):
        """`room`: most new tokens of each row; `noise`: fp32 [B, at least the largest room], None if greedy."""
        self.model, self.forward, self.grammar, self.options = model, forward, grammar, options
        self.use_graphs, self.is_guided = use_graphs, options.cfg != 1
        device, num_rows = grammar.allowed.device, len(contexts)
        self.is_cuda = device.type == "cuda"
        self.num_steps, self.width = max(room), max(map(len, contexts))
        self.room = torch.tensor(room, device=device)
        self.last_position = model.config.max_position_embeddings - 1
        self.noise = torch.zeros(num_rows, self.num_steps) if noise is None else noise[:, : self.num_steps]
        self.noise = self.noise.to(device)
        self.graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        num_slots = self._round_up(self.width + self.num_steps)
        self.cache = KVCache(model.config, num_rows * (1 + self.is_guided), num_slots, forward.dtype, device)
        self.state = GrammarState(*(tensor.clone() for tensor in _tensors(grammar.start(contexts))))
        self.index = torch.zeros(1, dtype=torch.int64, device=device)
        self.new_tokens = torch.zeros(num_rows, self.num_steps, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.planned = torch.zeros_like(self.new_tokens)
        self.image_steps = range(0)
        # What is drawn where logits are no numbers comes after the last code: padding, which ends the turn.
        self.codes = torch.cat([forward.code_ids, forward.code_ids.new_tensor([grammar.vocab.pad_id])])
        logits, lens = self._prefill(contexts, 0), list(map(len, contexts))
        if self.is_guided:
            vocab = grammar.vocab
            tails = [context[open_image_start(context, vocab) :] or [vocab.begin_image_id] for context in contexts]
            logits = self._guide(logits, self._prefill(tails, num_rows))
            lens += map(len, tails)
        self.positions = torch.tensor(lens, device=device)  # of the branches, see `_place_branches`
        is_context = (
            torch.arange(self.cache.keys[0].shape[2], device=device) < torch.tensor(lens, device=device)[:, None]
        )
        self.mask = torch.zeros(is_context.shape, dtype=forward.dtype, device=device)
        self.mask.masked_fill_(~is_context, -torch.inf)
        self._draw(logits, is_image=False)

    def step(self, index: int) -> None:
        """Draw token `index`: how many were drawn, the first (of the prompts' forward) included."""
        is_image = index in self.image_steps
        if not is_image:
            self._catch_up()
        key = (self._round_up(self.width + index), is_image)
        if not self.use_graphs:
            self._step(*key)
            return
        if key not in self.graphs:
            self.graphs[key] = capture_graph(lambda: self._step(*key), self._changing())
        self.graphs[key].replay()

    def look(self, index: int) -> list[int]:
        """Rows that still draw after token `index`; plans the steps for which all of these are within an image."""
        self._catch_up()
        is_alive = ~self.state.done & (index + 1 < self.room)
        left = torch.where(is_alive, self.grammar.num_left(self.state), self.num_steps)
        num_left = left.tolist()  # the host waits for the device here
        first = index + 1
        self.image_steps = range(first, min(first + min(num_left), self.num_steps))
        if self.image_steps:
            self._plan(first, len(self.image_steps))
        return [row for row, alive in enumerate(is_alive.tolist()) if alive]

    def select(self, rows: list[int]) -> None:
        """Keep these rows only."""
        self.graphs.clear()  # they hold the tensors that are replaced
        kept = torch.tensor(rows, device=self.index.device)
        cache_rows = torch.cat([kept, kept + len(self.tokens)]) if self.is_guided else kept
        self.cache.select(cache_rows)
        self.mask = self.mask[cache_rows]
        self.state = GrammarState(*(tensor[kept] for tensor in _tensors(self.state)))
        for name in ("room", "noise", "new_tokens", "tokens", "planned"):
            setattr(self, name, getattr(self, name)[kept])
        self.positions = self.positions[cache_rows]

    def _plan(self, first: int, num: int) -> None:
        """What tokens `first`, `first` + 1, ... must be that are no codes; -1 where a code is to be drawn."""
        kinds = self.grammar.kinds_ahead(self.state, num)
        in_room = torch.arange(first, first + num, device=kinds.device) < self.room[:, None]
        self.planned[:, first : first + num] = self.grammar.only_token[torch.where(in_room, kinds, Kind.PADDING)]
        self._place_branches()

    def _catch_up(self) -> None:
        """The state after the steps within images that were planned, which are over."""
        if self.image_steps:
            drawn = self.new_tokens[:, self.image_steps.start : self.image_steps.stop]
            self._set_state(self.grammar.skip(self.state, len(self.image_steps)))
            self.state.done.logical_or_((drawn == self.grammar.vocab.pad_id).any(1))
            self.image_steps = range(0)

    def _set_state(self, state: GrammarState) -> None:
        for old, new in zip(_tensors(self.state), _tensors(state), strict=True):
            old.copy_(new)

    def _place_branches(self) -> None:
        """Set the positions of the unconditional branches' next tokens: they count from the begin-image token."""
        if self.is_guided:
            self.positions[len(self.tokens) :] = (self.state.since_begin - 1).clamp(0, self.last_position)

    def _step(self, num_visible: int, is_image: bool) -> None:
        tokens, slot = self.tokens, self.index + (self.width - 1)
        if self.is_guided:
            if not is_image:  # an image that begins is all that its unconditional branch sees
                begins = (self.state.since_begin == 1)[:, None]
                self.mask[len(tokens) :].masked_fill_(begins, -torch.inf)
                self._place_branches()
            tokens = tokens.repeat(2)
        self.mask.index_fill_(1, slot, 0.0)
        visible = self.mask[:, :num_visible]
        logits = self.forward(tokens, self.positions, self.cache, slot, visible, is_image).float()
        if self.is_guided:
            branches = logits.chunk(2)
            logits = guide(*branches, self.options.cfg) if is_image else self._guide(*branches)
        self.positions.add_(1).clamp_(max=self.last_position)  # rows that are done are fed on, beside longer ones
        self._draw(logits, is_image)

    def _guide(self, logits: torch.Tensor, unconditional: torch.Tensor) -> torch.Tensor:
        """Guided logits [B, V] of the rows that are within the grid of an image, the others' as they are."""
        in_rows = (self.state.since_begin >= 3)[:, None]
        return torch.where(in_rows, guide(logits, unconditional, self.options.cfg), logits)

    def _draw(self, logits: torch.Tensor, is_image: bool) -> None:
        """Draw the next token of every row from logits [B, V] (of the image codes: [B, num_codes]), and note it."""
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
            self._set_state(grammar.advance(self.state, tokens))
        self.index += 1

    def _changing(self) -> list[torch.Tensor]:
        """What a step changes, but for the cache: a step that is run again writes the same there."""
        return [self.index, self.new_tokens, self.tokens, self.positions, self.mask, *_tensors(self.state)]

    def _round_up(self, num_slots: int) -> int:
        return -(-num_slots // _CUDA_SLOTS) * _CUDA_SLOTS if self.is_cuda else num_slots

    def _prefill(self, contexts: list[list[int]], first_row: int) -> torch.Tensor:
        """Logits [B, V] after each context; fills the cache from row `first_row` on. Padding is on the right."""
        width = max(map(len, contexts))
        pad_id = self.grammar.vocab.pad_id
        device = self.grammar.allowed.device
        input_ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in contexts], device=device)
        last = torch.tensor([len(row) - 1 for row in contexts], device=device)
        self.cache.begin_prefill(slice(first_row, first_row + len(contexts)))
        return self.model(input_ids, past_key_values=self.cache, logits_to_keep=last).logits[:, 0].float()


def capture_graph(step: Callable[[], None], changing: list[torch.Tensor]) -> torch.cuda.CUDAGraph:
    """
    A CUDA graph of one step, and nothing done.

    Args:
        step: works on tensors that stay where they are, without waiting for the device.
        changing: tensors that it changes and that are put back, since it is run before it is captured (as libraries
            set themselves up, and compiled code is made, at the first run).
    """
    before = [tensor.clone() for tensor in changing]

    def put_back() -> None:
        for tensor, old in zip(changing, before, strict=True):
            tensor.copy_(old)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
            put_back()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def _tensors(state: GrammarState) -> list[torch.Tensor]:
    return [getattr(state, field.name) for field in fields(GrammarState)]


def _decode_all(decoder: _Decoder, progress: Callable[[int, int], None] | None) -> list[list[int]]:
    """New tokens of every row, in step; rows that are done make way once half of them are."""
    alive = list(range(len(decoder.tokens)))  # the row that each row of the decoder was at first
    new_tokens: list[list[int]] = [[] for _ in alive]
    report = progress or (lambda _num_tokens, _num_finished: None)
    interval = _CUDA_CHECK_INTERVAL if decoder.is_cuda else 1
    next_look = 0

    for index in range(decoder.num_steps):  # token `index` is drawn
        report(len(alive), 0)
        if index >= next_look and index + 1 < decoder.num_steps:
            keep = decoder.look(index)
            if not keep:
                break
            if 2 * len(keep) <= len(alive):
                _hand_out(decoder, index + 1, alive, new_tokens)
                report(0, len(alive) - len(keep))
                decoder.select(keep)
                alive = [alive[row] for row in keep]
            next_look = index + max(interval, len(decoder.image_steps))
        if index + 1 < decoder.num_steps:
            decoder.step(index + 1)
    _hand_out(decoder, index + 1, alive, new_tokens)
    report(0, len(alive))
    return new_tokens


def _hand_out(decoder: _Decoder, num_tokens: int, alive: list[int], new_tokens: list[list[int]]) -> None:
    for row, tokens in zip(alive, decoder.new_tokens[:, :num_tokens].tolist(), strict=True):
        new_tokens[row] = tokens


def _finish(row: _Row, new_tokens: list[int], vocab: ChameleonVocab, max_gen_len: int, max_len: int) -> Generation:
    """Cut off the end of the turn and the padding after it (neither can be within an answer).

    `max_len`: of prompt and answer, the model's positions.
    """
    stops = [new_tokens.index(token) for token in (vocab.end_of_turn_id, vocab.pad_id) if token in new_tokens]
    tokens = row.forced + new_tokens[: min(stops, default=None)]
    if vocab.end_of_turn_id in new_tokens:
        return Generation(tokens)
    if len(row.prompt) + len(tokens) == max_len:
        return Generation(tokens, CUT_BY_POSITIONS)
    return Generation(tokens, CUT_BY_LENGTH if len(tokens) == max_gen_len else CUT_BY_NAN)
