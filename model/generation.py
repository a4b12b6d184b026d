"""
Generation: which token is drawn, and the loop over a key/value cache.

Where it stands: `inference_solver.py` turns conversations into token ids and calls `generate_batch`;
`model/image_grammar.py` says what may come next. Sampling is a pure function of logits, state and generators; rows of a
batch do not influence one another.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch

from data.vocab import ChameleonVocab
from model.chameleon import ChameleonXLLMXConfig, ChameleonXLLMXForConditionalGeneration
from model.image_grammar import GrammarState, ImageGrammar, Kind, open_image_start

_DONE_CHECK_INTERVAL = 16  # on CUDA, asking whether all rows are done waits for the device: ask seldom


@dataclass(frozen=True)
class SamplingOptions:
    """
    How tokens are drawn.

    Attributes:
        temperature: 0 is greedy.
        image_top_k, text_top_k: only the k most probable tokens are drawn from, inside and outside of images.
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
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if not abs(self.cfg) < float("inf"):
            problems.append(f"cfg is {self.cfg}; it must be a number, 1 for no guidance")
        if min(self.image_top_k, self.text_top_k) < 1:
            problems.append(f"top-k is {self.image_top_k} (image), {self.text_top_k} (text); both must be at least 1")
        if problems:
            raise ValueError("; ".join(problems) + ".")


@dataclass(frozen=True)
class Generation:
    """
    One answer.

    Attributes:
        tokens: the new token ids, with the forced start and without the end of the turn.
        finished: False if the turn was cut off before its end.
    """

    tokens: list[int]
    finished: bool


class KVCache:
    """
    Keys and values of a batch whose rows have their own lengths, allocated once.

    A row's token at position p lies in slot p, whatever the other rows do; slots beyond a row's position hold padding
    or what is left from before, and are masked.
    """

    def __init__(self, model: ChameleonXLLMXForConditionalGeneration, num_rows: int, num_slots: int):
        config: ChameleonXLLMXConfig = model.config
        head_dim = config.hidden_size // config.num_attention_heads
        shape = (num_rows, config.num_key_value_heads, num_slots, head_dim)
        weight = model.lm_head.weight
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in layers]
        self._rows: slice | torch.Tensor = slice(None)
        self._positions: torch.Tensor | None = None
        self._num_visible = 0

    def begin_prefill(self, rows: slice) -> None:
        """The next forward fills slots 0, 1, ... of these rows."""
        self._rows, self._positions = rows, None

    def begin_step(self, positions: torch.Tensor, num_visible: int) -> torch.Tensor:
        """
        The next forward adds one token to every row, at `positions` [B] < `num_visible`.

        Returns its attention mask, bool [B, 1, 1, num_visible].
        """
        self._rows = torch.arange(len(positions), device=positions.device)
        self._positions, self._num_visible = positions, num_visible
        return (torch.arange(num_visible, device=positions.device) <= positions[:, None])[:, None, None]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions and masks are always given

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_unused: object):
        """Store new keys and values [B, H_kv, T, head_dim]; returns those to attend to."""
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        if self._positions is None:
            keys[self._rows, :, : key.shape[2]] = key
            values[self._rows, :, : key.shape[2]] = value
            return key, value
        keys[self._rows, :, self._positions] = key[:, :, 0]
        values[self._rows, :, self._positions] = value[:, :, 0]
        return keys[:, :, : self._num_visible], values[:, :, : self._num_visible]

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows only."""
        self.keys = [keys.index_select(0, rows) for keys in self.keys]
        self.values = [values.index_select(0, rows) for values in self.values]


def guide(logits: torch.Tensor, unconditional: torch.Tensor, state: GrammarState, cfg: float) -> torch.Tensor:
    """Guided logits [B, V]: `u + cfg * (c - u)` in the rows of an image, as they are elsewhere."""
    in_rows = (state.since_begin >= 3)[:, None]
    return torch.where(in_rows, unconditional + cfg * (logits - unconditional), logits)


def sample_tokens(
    logits: torch.Tensor,
    kind: torch.Tensor,
    allowed: torch.Tensor,
    options: SamplingOptions,
    generators: Sequence[torch.Generator] = (),
) -> torch.Tensor:
    """
    Draw one token per row.

    Args:
        logits: [B, V].
        kind: int64 [B], what each token must be.
        allowed: bool [kinds, V].
        options: temperature and top-k.
        generators: one per row; not used if greedy.

    Returns:
        int64 [B].
    """
    logits = logits.float().masked_fill(~allowed[kind], -torch.inf)
    if options.temperature == 0:
        return logits.argmax(-1)
    top_k = torch.where(kind == Kind.TEXT, options.text_top_k, options.image_top_k)[:, None]
    num_kept = min(max(options.text_top_k, options.image_top_k), logits.shape[1])
    values, ids = logits.topk(num_kept, dim=-1)
    values = values.masked_fill(torch.arange(num_kept, device=logits.device) >= top_k, -torch.inf)
    # The largest of p_i / e_i, e_i drawn from an exponential distribution, is i with probability p_i: one draw of
    # noise per row and step, from the row's own generator, so that the batch plays no part.
    noise = torch.stack([logits.new_empty(num_kept).exponential_(generator=generator) for generator in generators])
    noise = noise.clamp(min=torch.finfo(noise.dtype).tiny)
    choice = (torch.softmax(values / options.temperature, -1) / noise).argmax(-1, keepdim=True)
    return ids.gather(1, choice)[:, 0]


@torch.inference_mode()
def generate_batch(
    model: ChameleonXLLMXForConditionalGeneration,
    prompts: Sequence[Sequence[int]],
    vocab: ChameleonVocab,
    options: SamplingOptions,
    max_gen_len: int,
    forced_starts: Sequence[Sequence[int]] | None = None,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> list[Generation]:
    """
    Answers to many prompts, in batches.

    Args:
        model: a plain model in evaluation mode, on any device.
        prompts: token ids, each ending where the answer begins.
        vocab: of the tokenizer that the model was trained with.
        options: how tokens are drawn.
        max_gen_len: most new tokens per answer, the forced start included.
        forced_starts: tokens that each answer must begin with (e.g. an image of a given size); part of the answer.
        batch_size: prompts at a time; affects speed and memory only.
        progress: called with (new tokens, finished answers) of every forward.

    Raises:
        ValueError: an empty prompt, one that leaves no room, or a vocabulary that is larger than the model's.
    """
    forced_starts = forced_starts or [()] * len(prompts)
    rows = [
        _Row(index, list(prompt), list(forced))
        for index, (prompt, forced) in enumerate(zip(prompts, forced_starts, strict=True))
    ]
    _check_rows(rows, model.config, vocab, max_gen_len)
    grammar = ImageGrammar(vocab, model.config.vocab_size, model.lm_head.weight.device)
    answers: dict[int, Generation] = {}
    rows.sort(key=lambda row: len(row.prompt) + len(row.forced))  # neighbours of like length: little padding
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        answers |= _generate_rows(model, grammar, batch, options, max_gen_len, progress)
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
                f"the answer to prompt {row.index} must begin with {len(row.forced)} tokens, but may have only "
                f"{max_gen_len} (max_gen_len)."
            )
        if len(row.prompt) + len(row.forced) >= config.max_position_embeddings:
            raise ValueError(
                f"prompt {row.index} of {len(row.prompt) + len(row.forced)} tokens leaves no room in the model's "
                f"{config.max_position_embeddings} positions."
            )


class _Decoder:
    """
    The model, its cache and where each living row stands: the logits of the next token, one forward per token.

    With guidance the cache has a second half, the unconditional branches. Such a branch holds the tokens since the
    begin-image token, which is its position 0; outside of images it is fed all the same, and what it holds is never
    looked at.
    """

    def __init__(
        self,
        model: ChameleonXLLMXForConditionalGeneration,
        grammar: ImageGrammar,
        contexts: list[list[int]],
        num_slots: int,
        cfg: float,
    ):
        self.model, self.grammar, self.cfg = model, grammar, cfg
        self.is_guided = cfg != 1
        self.state = grammar.start(contexts)
        self.cache = KVCache(model, len(contexts) * (1 + self.is_guided), num_slots)
        self.num_visible = max(map(len, contexts))
        self.positions = torch.tensor([len(context) for context in contexts], device=grammar.allowed.device)
        self.logits = self._prefill(contexts, 0)
        if self.is_guided:
            vocab = grammar.vocab
            tails = [context[open_image_start(context, vocab) :] or [vocab.begin_image_id] for context in contexts]
            self.logits = guide(self.logits, self._prefill(tails, len(contexts)), self.state, cfg)

    def advance(self, tokens: torch.Tensor) -> None:
        """Note the tokens [B] that were drawn."""
        self.state = self.grammar.advance(self.state, tokens)

    def forward(self, tokens: torch.Tensor) -> None:
        """Feed the tokens [B] of the last `advance`; sets `logits` [B, V]."""
        positions = self.positions
        self.positions, self.num_visible = self.positions + 1, self.num_visible + 1
        if self.is_guided:
            tokens = tokens.repeat(2)
            positions = torch.cat([positions, (self.state.since_begin - 1).clamp(min=0)])
        mask = self.cache.begin_step(positions, self.num_visible)
        logits = self.model(
            tokens[:, None], position_ids=positions[:, None], attention_mask=mask, past_key_values=self.cache
        ).logits[:, -1]
        self.logits = guide(*logits.float().chunk(2), self.state, self.cfg) if self.is_guided else logits

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows [B'] only; `logits` are stale until the next `forward`."""
        self.state = GrammarState(*(getattr(self.state, field.name)[rows] for field in fields(GrammarState)))
        cache_rows = torch.cat([rows, rows + len(self.positions)]) if self.is_guided else rows
        self.cache.select(cache_rows)
        self.positions = self.positions[rows]

    def _prefill(self, contexts: list[list[int]], first_row: int) -> torch.Tensor:
        """Logits [B, V] after each context; fills the cache from row `first_row` on. Padding is on the right."""
        width = max(map(len, contexts))
        pad_id = self.grammar.vocab.pad_id
        device = self.grammar.allowed.device
        input_ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in contexts], device=device)
        last = torch.tensor([len(row) - 1 for row in contexts], device=device)
        self.cache.begin_prefill(slice(first_row, first_row + len(contexts)))
        return self.model(input_ids, past_key_values=self.cache, logits_to_keep=last).logits[:, 0].float()


def _generate_rows(
    model: ChameleonXLLMXForConditionalGeneration,
    grammar: ImageGrammar,
    batch: list[_Row],
    options: SamplingOptions,
    max_gen_len: int,
    progress: Callable[[int, int], None] | None,
) -> dict[int, Generation]:
    """One batch, all rows in step; rows that are done make way once half of them are."""
    device = grammar.allowed.device
    contexts = [row.prompt + row.forced for row in batch]
    max_len = model.config.max_position_embeddings
    room = [min(max_gen_len - len(r.forced), max_len - len(c)) for r, c in zip(batch, contexts, strict=True)]
    num_steps = max(room)
    decoder = _Decoder(model, grammar, contexts, max(map(len, contexts)) + num_steps, options.cfg)
    generators = [torch.Generator(device).manual_seed(options.seed + row.index) for row in batch]
    last_step = torch.tensor(room, device=device) - 1
    alive, columns = list(range(len(batch))), []  # the rows of the cache, and their new tokens step by step
    new_tokens: list[list[int]] = [[] for _ in batch]
    interval = _DONE_CHECK_INTERVAL if device.type == "cuda" else 1

    for step in range(num_steps):
        kind = torch.where(step <= last_step, grammar.kind(decoder.state), Kind.PADDING)
        tokens = sample_tokens(decoder.logits, kind, grammar.allowed, options, [generators[row] for row in alive])
        columns.append(tokens)
        decoder.advance(tokens)
        if progress is not None:
            progress(len(alive), 0)
        if (step + 1) % interval == 0 or step + 1 == num_steps:
            keep = (~decoder.state.done & (step < last_step)).nonzero()[:, 0]
            if not len(keep):
                break
            if 2 * len(keep) <= len(alive):
                _hand_out(columns, alive, new_tokens)
                if progress is not None:
                    progress(0, len(alive) - len(keep))
                decoder.select(keep)
                tokens, last_step, columns = tokens[keep], last_step[keep], []
                alive = [alive[row] for row in keep.tolist()]
        decoder.forward(tokens)
    _hand_out(columns, alive, new_tokens)
    if progress is not None:
        progress(0, len(alive))
    return {row.index: _finish(row, new, grammar.vocab) for row, new in zip(batch, new_tokens, strict=True)}


def _hand_out(columns: list[torch.Tensor], alive: list[int], new_tokens: list[list[int]]) -> None:
    """Append the steps' tokens, [B] each, to those of their rows."""
    if columns:
        for row, tokens in zip(alive, torch.stack(columns, 1).tolist(), strict=True):
            new_tokens[row] += tokens


def _finish(row: _Row, new_tokens: list[int], vocab: ChameleonVocab) -> Generation:
    """Cut off the end of the turn and the padding after it (neither can be within an answer)."""
    stops = [new_tokens.index(token) for token in (vocab.end_of_turn_id, vocab.pad_id) if token in new_tokens]
    return Generation(row.forced + new_tokens[: min(stops, default=None)], vocab.end_of_turn_id in new_tokens)
