"""The rows of a batch that draw: tensors that stay in place from step to step and from call to call, and one step.

`loop.py` takes a batch and runs its steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from data.items.vocab import ChameleonVocab
from model.decoder.chameleon import ChameleonXLLMXConfig
from model.generation.decode_step import LeanForward, RootForward
from model.generation.image_grammar import GrammarState, ImageGrammar, Kind
from model.generation.kv_cache import KVCache
from model.generation.sampling import (
    MAX_SPECULATIVE,
    SamplingOptions,
    guide,
    gumbel_noise,
    pick_codes,
    sample_codes,
    sample_tokens,
)

# On CUDA a step attends to a multiple of so many slots: each number of slots is one graph.
CUDA_SLOTS = 512
# Tensors of a `Batch` with one row for each row, or for each branch.
_ROW_TENSORS = ("tokens", "new_tokens", "planned", "room", "noise", "seeds", "guesses", "num_certain")
_BRANCH_TENSORS = ("mask", "positions")


def num_branches(options: SamplingOptions) -> int:
    """Forwards per row: guidance needs a second one that sees no prompt."""
    return 1 + (options.cfg != 1)


def is_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def round_up(num_slots: int, device: torch.device) -> int:
    return -(-num_slots // CUDA_SLOTS) * CUDA_SLOTS if is_cuda(device) else num_slots


@dataclass
class Batch:
    """
    B rows that still draw. A step feeds their last tokens and draws the next.

    With guidance, the rows are N = 2B branches. The second half, the unconditional branches, sees the slots since the
    begin-image token, which is its position 0. Outside of images the logits of that half are dropped.

    All that a step reads or changes is in tensors that stay in place, as CUDA graphs need. The forward keeps a batch
    for the next call; the rows at work are views of its first ones.
    """

    grammar: ImageGrammar
    options: SamplingOptions
    cache: KVCache
    # [N, slots], 0 at the slots that a branch sees, minus infinity elsewhere.
    mask: Tensor
    # int64 [N], of the tokens that are fed next.
    positions: Tensor
    # int64 [1], length of the longest context; token i of the answers goes to slot `width` + i.
    width: Tensor
    # int64 [1], how many tokens were drawn.
    index: Tensor
    # int64 [B], drawn last; [B, model's positions], all that were drawn, then padding.
    tokens: Tensor
    new_tokens: Tensor
    # Like new_tokens: in image steps the token that must come, -1 where a code is drawn.
    planned: Tensor
    # Within image steps that after the last of them.
    state: GrammarState
    # int64 [B], most new tokens.
    room: Tensor
    # fp32 [B, model's positions].
    noise: Tensor
    # Of `draw_ahead.py`: int64 [B]; [B, steps], the token before the image steps, then certain ones and guesses, -1
    # where there is none yet; [B], how many are certain; [1].
    seeds: Tensor
    guesses: Tensor
    num_certain: Tensor
    num_steps: Tensor
    # CUDA graphs of a step with these options, by all else that is no tensor.
    graphs: dict = field(default_factory=dict)

    @property
    def is_guided(self) -> bool:
        return self.options.cfg != 1

    def first(self, num_rows: int) -> "Batch":
        """The first rows, as views."""
        branches = num_rows * num_branches(self.options)
        views = {name: getattr(self, name)[:num_rows] for name in _ROW_TENSORS}
        views |= {name: getattr(self, name)[:branches] for name in _BRANCH_TENSORS}
        state = GrammarState(*(tensor[:num_rows] for tensor in self.state))
        return replace(self, cache=self.cache.first(branches), state=state, **views)

    def select(self, rows: list[int]) -> "Batch":
        """Move these rows to the front, and return them."""
        kept = torch.tensor(rows, device=self.index.device)
        branches = torch.cat([kept, kept + len(self.tokens)]) if self.is_guided else kept
        # Layer by layer: two copies of the whole cache might not fit.
        for tensor in (*self.cache.keys, *self.cache.values, *(getattr(self, name) for name in _BRANCH_TENSORS)):
            tensor[: len(branches)] = tensor[branches.to(tensor.device)]
        for tensor in (*self.state, *(getattr(self, name) for name in _ROW_TENSORS)):
            tensor[: len(kept)] = tensor[kept]
        return self.first(len(rows))

    def step(self, forward: LeanForward | RootForward, num_visible: int, is_image: bool) -> None:
        """Draw the next token of every row; branches see the first `num_visible` slots at most."""
        tokens, slot = self.tokens, self.index + self.width - 1
        if self.is_guided:
            if not is_image:
                # The unconditional branch of an image that begins sees nothing before it.
                begins = (self.state.since_begin == 1)[:, None]
                self.mask[len(tokens) :].masked_fill_(begins, -torch.inf)
                self.place_unconditional()
            tokens = tokens.repeat(2)
        self.mask.index_fill_(1, slot, 0.0)
        logits = forward(tokens, self.positions, self.cache, slot, self.mask[:, :num_visible], is_image).float()
        if self.is_guided:
            branches = logits.chunk(2)
            logits = guide(*branches, self.options.cfg) if is_image else self.guide_images(*branches)
        # Rows that are done are fed on beside longer ones: their positions must stay valid.
        self.positions.add_(1).clamp_(max=self.noise.shape[1] - 1)
        self.draw(forward, logits, is_image)

    def draw(self, forward: LeanForward | RootForward, logits: Tensor, is_image: bool) -> None:
        """Draw the next token of every row from logits [B, V] (in image steps [B, num_codes]), and store it."""
        grammar, noise = self.grammar, self.noise.index_select(1, self.index)[:, 0]
        if is_image:
            planned = self.planned.index_select(1, self.index)[:, 0]
            tokens = torch.where(planned < 0, self.draw_codes(logits, noise), planned)
        else:
            kind = torch.where(self.index < self.room, grammar.kind(self.state), Kind.PADDING)
            tokens = sample_tokens(logits, kind, grammar.allowed, self.options, noise)
            tokens.masked_fill_(tokens == logits.shape[1], grammar.vocab.pad_id)
            if self.options.speculative:
                # Whether others in the batch are within images must not matter.
                tokens = torch.where(kind == Kind.CODE, self.draw_codes(logits[:, grammar.codes[:-1]], noise), tokens)
        tokens = forward.agree(tokens)
        self.tokens.copy_(tokens)
        self.new_tokens.index_copy_(1, self.index, tokens[:, None])
        if not is_image:
            self.set_state(grammar.advance(self.state, tokens))
        self.index += 1

    def draw_codes(self, logits: Tensor, noise: Tensor) -> Tensor:
        """Ids of codes [B] from their logits [B, num_codes]; padding for NaN."""
        if self.options.speculative:
            places = self.index.expand(len(logits))[:, None]
            noise = gumbel_noise(self.seeds, places, logits.shape[1])
            return self.grammar.codes[pick_codes(logits[:, None], self.options, noise)[:, 0]]
        return self.grammar.codes[sample_codes(logits, self.options, noise)]

    def guide_images(self, logits: Tensor, unconditional: Tensor) -> Tensor:
        """Guided logits [B, V] of the rows that are within the grid of an image; those of the others unchanged."""
        in_grid = (self.state.since_begin >= 3)[:, None]
        return torch.where(in_grid, guide(logits, unconditional, self.options.cfg), logits)

    def place_unconditional(self) -> None:
        """Set the positions of the unconditional branches: they count from the begin-image token."""
        if self.is_guided:
            last = self.noise.shape[1] - 1
            self.positions[len(self.tokens) :] = (self.state.since_begin - 1).clamp(0, last)

    def plan_of(self, places: Tensor) -> Tensor:
        """`planned` at places [B, T] that count from the next step; -1 before it."""
        columns = (places + self.index).clamp(0, self.planned.shape[1] - 1)
        return self.planned.gather(1, columns).masked_fill(places < 0, -1)

    def set_state(self, state: GrammarState) -> None:
        for old, new in zip(self.state, state, strict=True):
            old.copy_(new)

    def look(self, index: int, num_steps: int) -> tuple[list[int], int]:
        """Rows that draw token `index`, and for how many steps from there all of these are within an image."""
        is_alive = ~self.state.done & (index < self.room)
        num_left = torch.where(is_alive, self.grammar.num_left(self.state), num_steps - index)
        # The host waits for the device here.
        return is_alive.nonzero()[:, 0].tolist(), min(num_steps - index, *num_left.tolist())

    def plan_image_steps(self, steps: range) -> None:
        """Plan steps for which all rows are within an image or done: they make logits for codes alone."""
        kinds = self.grammar.kinds_ahead(self.state, len(steps))
        in_room = torch.arange(steps.start, steps.stop, device=kinds.device) < self.room[:, None]
        only_token = self.grammar.only_token[torch.where(in_room, kinds, Kind.PADDING)]
        self.planned[:, steps.start : steps.stop] = only_token
        self.place_unconditional()
        # Which codes are drawn does not matter to the grammar: the state after these steps is known.
        self.set_state(self.grammar.skip(self.state, len(steps)))


def take_batch(
    config: ChameleonXLLMXConfig,
    forward: LeanForward | RootForward,
    vocab: ChameleonVocab,
    options: SamplingOptions,
    num_rows: int,
    num_slots: int,
) -> Batch:
    """A batch of that shape: rows of the one that the forward keeps where they suffice, else in its place a new one."""
    device, branches = forward.device, num_rows * num_branches(options)
    kept = forward.kept_batch
    if kept is None or len(kept.mask) < branches or kept.mask.shape[1] < num_slots:
        # Given back first: there may be no room for both.
        del kept
        forward.kept_batch = None
        num_slots, max_len = round_up(num_slots, device), config.max_position_embeddings
        ints = partial(torch.zeros, dtype=torch.int64, device=device)
        since_begin, height, width, done = ints(4, branches)
        forward.kept_batch = kept = Batch(
            grammar=ImageGrammar(vocab, config.vocab_size, device),
            options=options,
            cache=KVCache.allocate(config, branches, num_slots, forward.dtype, forward.layer_devices),
            mask=torch.zeros(branches, num_slots, dtype=forward.dtype, device=device),
            positions=ints(branches),
            width=ints(1),
            index=ints(1),
            tokens=ints(branches),
            new_tokens=ints(branches, max_len),
            planned=ints(branches, max_len),
            state=GrammarState(since_begin, height, width, done.bool()),
            room=ints(branches),
            noise=torch.zeros(branches, max_len, device=device),
            seeds=ints(branches),
            guesses=ints(branches, max_len + MAX_SPECULATIVE + 2),
            num_certain=ints(branches),
            num_steps=ints(1),
        )
    if replace(kept.options, seed=0) != replace(options, seed=0):
        kept.graphs.clear()
    kept.options = options
    return kept.first(num_rows)


def capture_graph(
    step: Callable[[], None], changing: list[Tensor], other: torch.cuda.CUDAGraph | None
) -> torch.cuda.CUDAGraph:
    """
    A CUDA graph of one step, which works on tensors that stay in place.

    The values of the tensors that the step changes are put back: the step runs before the capture, since libraries set
    themselves up and code is compiled in the first run. The graph shares the memory of an `other` one, if any: nothing
    that a step leaves behind is in that memory.
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
    with torch.cuda.graph(graph, pool=other and other.pool()):
        step()
    return graph
