"""Tokens per second of generated images: `generate_batch` against `transformers.generate` with the same weights.

    python exps/bench/generate.py --model_size tiny --batch_sizes 1 8 --cfg 1 4
    python exps/bench/generate.py --model_size 7B --device cuda --batch_sizes 1 8 --cfg 1 4

Every answer is an image that begins at once and does not end before `--num_tokens`: all ways draw as many tokens, each
with a key/value cache. The baselines are stock `ChameleonForConditionalGeneration` with `generate`; logits processors
keep the layout of an image and run the unconditional branch as a second forward per token with its own cache. "batched"
is the whole batch at once, "one by one" the prompts one after the other, as the recipe samples. Weights are random. The
first call of each case is greedy: it sets up libraries, buffers and CUDA graphs, and its tokens are compared
(`equal_tokens`). The later calls sample. `first_image_s` and `image_s` are the seconds per image of 768 x 768 of the
first and of the later calls, prefill included: seconds per token of an image times its 2,352. `read_tb_per_s` is the
least that decoding must read, per second of the later calls; its limit is the memory's bandwidth (4.3 TB/s on an H200).
The last line printed is one JSON object.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import transformers  # noqa: E402

from data.items.vocab import CODES_PER_GRID, ChameleonVocab  # noqa: E402
from exps.bench import common  # noqa: E402
from exps.bench.synthetic import fill_weights, special_names  # noqa: E402
from model.decoder.chameleon import build_config, build_model, reset_rotary_buffers  # noqa: E402
from model.generation.decode_step import LeanForward  # noqa: E402
from model.generation.image_grammar import ImageGrammar, Kind  # noqa: E402
from model.generation.loop import SamplingOptions, generate_batch  # noqa: E402

WAYS = OURS, BATCHED, ONE_BY_ONE = "ours", "batched", "one by one"
# Token ids.
Answers = list[list[int]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Chameleon's, and the tokenizer's of the laptop default.
NUM_CODES, VOCAB_SIZE = 8192, 65536
TINY_NUM_CODES, TINY_VOCAB_SIZE = 1024, 1480
# Tokens of the longest prompt; the others are a little shorter.
PROMPT_LEN = 32
# Sides of the image that is drawn: it has more tokens than the model has positions.
MAX_GRIDS = 32
# Rows of an image of 768 x 768.
IMAGE_TOKENS = 48 * 49
COLUMNS = ("tokens_per_s", "ms_per_step", "first_image_s", "image_s", "equal_tokens", "read_tb_per_s", "peak_gib")


def build_parser() -> argparse.ArgumentParser:
    parser = common.build_bench_parser(__doc__, repeats="later sampled runs per case")
    add = parser.add_argument
    sizes = ("tiny", "bench", "1B", "7B")
    add("--model_size", choices=sizes, default="tiny", help="size of the decoder (default tiny; see `MODEL_SIZES`)")
    add("--precision", choices=tuple(DTYPES), help="precision of the weights (default: fp32 on a CPU, bf16 on CUDA)")
    add("--batch_sizes", type=common.positive, nargs="+", default=[1, 8], help="prompts at a time (default 1 8)")
    add("--cfg", type=float, nargs="+", default=[1.0, 4.0], help="guidance scales; 1 is none (default 1 4)")
    add("--num_tokens", type=common.positive, help="new tokens per prompt (default 256 on a CPU, 1024 on CUDA)")
    add("--ways", nargs="+", choices=WAYS, default=WAYS, help="what to measure; ours always is (default: all)")
    add("--compile", action="store_true", help="our way with torch.compile (default: off)")
    add("--speculative", type=int, default=0, help="codes that our way guesses ahead (default: 0)")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    device = common.choose_device(args.device)
    num_tokens = args.num_tokens or (1024 if device == "cuda" else 256)
    precision = args.precision or ("bf16" if device == "cuda" else "fp32")
    most = build_config(args.model_size).max_position_embeddings - PROMPT_LEN - 3
    if num_tokens > most:
        parser.error(f"--num_tokens must be at most {most}, got {num_tokens}: the model has no more")
    cases = list(product(args.batch_sizes, args.cfg))
    task = {"model_size": args.model_size, "precision": precision, "device": device, "cases": cases}
    task |= {"num_tokens": num_tokens, "repeats": args.repeats, "compile_step": args.compile}
    task["speculative"] = args.speculative
    results = {way: common.run_alone("generate:measure", way=way, **task) for way in dict.fromkeys([OURS, *args.ways])}
    rows = []
    for index, (batch_size, cfg) in enumerate(cases):
        found = {way: result["cases"][index] if "cases" in result else result for way, result in results.items()}
        tokens = {way: case.pop("tokens", None) for way, case in found.items() if case}
        ours = found.pop(OURS)
        for way, baseline in [(way, case) for way, case in found.items() if case] or [("baseline", None)]:
            if baseline and tokens[OURS] and tokens[way]:
                baseline["equal_tokens"] = share_of_equal(tokens[OURS], tokens[way])
            rows.append(common.compare({"batch_size": batch_size, "cfg": cfg}, ours, baseline, way=way))
    title = f"{args.model_size}, {precision}, {num_tokens} new tokens per prompt, case: batch, cfg"
    largest = max(rows, key=lambda row: (row["batch_size"], -row["cfg"]))
    code = common.report("generate", title, device, rows, COLUMNS, main_row=largest)
    if precision == "fp32" and any((row["baseline"] or {}).get("equal_tokens", 1) < 1 for row in rows):
        print("greedy tokens in fp32 differ: see equal_tokens", file=sys.stderr)
        return 1
    return code


def share_of_equal(ours: Answers, theirs: Answers) -> float:
    """The share of tokens that are the same in the same place; 0 for answers of different lengths."""
    pairs = zip(ours, theirs, strict=True)
    return statistics.mean(len(a) == len(b) and sum(map(int.__eq__, a, b)) / len(a) for a, b in pairs)


def measure(
    way: str,
    model_size: str,
    precision: str,
    device: str,
    cases: list,
    num_tokens: int,
    repeats: int,
    compile_step: bool,
    speculative: int,
) -> dict:
    """Figures and greedy tokens of one way in each case (batch size, cfg); None where the way does not apply."""
    vocab_mapping = make_vocabulary(model_size)
    vocab, dtype = ChameleonVocab.from_mapping(vocab_mapping), DTYPES[precision]
    config = build_config(model_size, vocab_mapping)
    model = build_model(config, device, dtype).eval() if way == OURS else build_stock(config, device, dtype)
    model = fill_weights(model)
    begin = [vocab.begin_image_id, *[vocab.grid_size_ids[MAX_GRIDS]] * 2]
    found = []
    for batch_size, cfg in cases:
        prompts, at_a_time = make_prompts(batch_size, PROMPT_LEN, vocab), 1 if way == ONE_BY_ONE else batch_size
        if way == ONE_BY_ONE and batch_size == 1:
            # The same as batched.
            found.append(None)
            continue
        if way == OURS:
            options = SamplingOptions(cfg=cfg, speculative=speculative)
            draw = ours(LeanForward(model, vocab, compile_step), model, vocab, prompts, begin, options, num_tokens)
        else:
            draw = stock(model, vocab, prompts, begin, cfg, num_tokens, at_a_time)
        tokens, first = timed(draw, 0.0, device)
        # Sampling has CUDA graphs of its own.
        timed(draw, 1.0, device)
        seconds = statistics.median(timed(draw, 1.0, device)[1] for _ in range(repeats))
        steps, num_drawn = num_tokens * batch_size // at_a_time, num_tokens * batch_size
        needed = needed_bytes(model, vocab, way, num_tokens, at_a_time, cfg)
        image_s = IMAGE_TOKENS * seconds / num_drawn
        # The first run captures graphs, once for an image of any length.
        figures = {"tokens_per_s": num_drawn / seconds, "first_image_s": image_s + max(first - seconds, 0.0)}
        figures |= {"image_s": image_s, "peak_gib": common.peak_device_gib(device)}
        if way != OURS or not speculative:
            # A forward that guesses ahead draws several tokens.
            figures |= {"ms_per_step": 1e3 * seconds / steps, "read_tb_per_s": needed * steps / seconds / 1e12}
        found.append({**figures, "tokens": tokens})
    return {"cases": found}


def needed_bytes(
    model: torch.nn.Module, vocab: ChameleonVocab, way: str, num_tokens: int, batch_size: int, cfg: float
) -> float:
    """The least that a decoding step reads, in bytes: weights once, and the cache of each branch of each prompt.

    The embedding is read one row per token; our head reads only the rows of image codes. On average
    prompt + 3 + num_tokens / 2 tokens are visible; the unconditional branch has no prompt.
    """
    config, head = model.config, model.lm_head.weight
    size = head.element_size()
    weights = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if "embed_tokens" not in name)
    if way == OURS:
        weights -= (head.shape[0] - vocab.num_codes) * head.shape[1] * size
    head_dim = config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * size
    seen = num_tokens / 2 + 3
    return weights + batch_size * per_token * (PROMPT_LEN + seen + (seen if cfg != 1 else 0))


def make_vocabulary(model_size: str) -> dict[str, int]:
    """Token ids by name in Chameleon's layout; all but control tokens are words."""
    tiny = model_size == "tiny"
    names = special_names(TINY_NUM_CODES if tiny else NUM_CODES, max_grids=MAX_GRIDS)
    names += [f"word{n}" for n in range((TINY_VOCAB_SIZE if tiny else VOCAB_SIZE) - len(names))]
    return {name: token_id for token_id, name in enumerate(names)}


def make_prompts(batch_size: int, prompt_len: int, vocab: ChameleonVocab) -> Answers:
    """Words after `<s>`; lengths differ by up to seven."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(vocab.vocab_size - 100, vocab.vocab_size, (batch_size, prompt_len), generator=generator)
    lens = [max(prompt_len - index % 8, 2) for index in range(batch_size)]
    return [[vocab.bos_id, *row[: length - 1]] for row, length in zip(words.tolist(), lens, strict=True)]


def build_stock(config: transformers.PretrainedConfig, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """transformers' own model of the same shape, without the VQGAN, which generation does not use."""
    values = config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "max_position_embeddings", "vocabulary_map", "swin_norm", "model_parallel_size")
    stock_config = transformers.ChameleonConfig(**{name: values[name] for name in names})
    with torch.device("meta"):
        model = transformers.ChameleonForConditionalGeneration(stock_config).to(dtype)
    del model.model.vqmodel
    model.to_empty(device=device)
    reset_rotary_buffers(model)
    # Stock Chameleon masks the image tokens of this list; with an empty list it can draw images.
    model.model.vocabulary_mapping.__dict__["image_tokens"] = []
    return model.eval()


def ours(
    forward: LeanForward, model, vocab: ChameleonVocab, prompts: Answers, begin: list[int], options, num_tokens: int
) -> Callable[[float], Answers]:
    """A function of the temperature that draws all answers and returns their tokens without `begin`."""

    def draw(temperature: float) -> Answers:
        arguments = (replace(options, temperature=temperature), num_tokens + len(begin), [begin] * len(prompts))
        answers = generate_batch(model, prompts, vocab, *arguments, len(prompts), forward=forward)
        return [answer.tokens[len(begin) :] for answer in answers]

    return draw


def stock(
    model, vocab: ChameleonVocab, prompts: Answers, begin: list[int], cfg: float, num_tokens: int, batch_size: int
) -> Callable[[float], Answers]:
    """The same by `transformers.generate`, `batch_size` prompts at a time, padded on the left."""
    sampling_options = SamplingOptions()
    allowed = ImageGrammar(vocab, model.config.vocab_size, model.device).allowed
    row_len = CODES_PER_GRID * MAX_GRIDS + 1

    def draw_batch(batch: Answers, temperature: float) -> Answers:
        width = max(map(len, batch))
        rows = [[vocab.pad_id] * (width - len(row)) + row for row in batch]
        input_ids = torch.tensor(rows, device=model.device)
        cache = transformers.DynamicCache(config=model.config)

        def guide(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            # The unconditional branch has seen the tokens since the image began.
            seen = input_ids[:, width - len(begin) :] if input_ids.shape[1] == width else input_ids[:, -1:]
            logits = model(seen, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            unconditional = logits.to(scores.dtype)
            return unconditional + cfg * (scores - unconditional)

        def keep_layout(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            is_new_line = (input_ids.shape[1] - width) % row_len == row_len - 1
            scores = scores.masked_fill(~allowed[Kind.NEW_LINE if is_new_line else Kind.CODE], -torch.inf)
            least = scores.topk(min(sampling_options.image_top_k, scores.shape[-1])).values[:, -1:]
            return scores.masked_fill(scores < least, -torch.inf)

        processors = [guide, keep_layout] if cfg != 1 else [keep_layout]
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        found = model.generate(
            input_ids,
            attention_mask=(input_ids != vocab.pad_id).long(),
            max_new_tokens=num_tokens,
            use_cache=True,
            eos_token_id=vocab.end_of_turn_id,
            pad_token_id=vocab.pad_id,
            logits_processor=transformers.LogitsProcessorList(processors),
            **sampling,
        )
        return found[:, width:].tolist()

    def draw(temperature: float) -> Answers:
        torch.manual_seed(0)
        contexts = [prompt + begin for prompt in prompts]
        batches = [contexts[first : first + batch_size] for first in range(0, len(contexts), batch_size)]
        return [tokens for batch in batches for tokens in draw_batch(batch, temperature)]

    return draw


def timed(draw: Callable[[float], Answers], temperature: float, device: str) -> tuple[Answers, float]:
    """The tokens and the seconds to draw them."""
    began = time.perf_counter()
    tokens = draw(temperature)
    if device == "cuda":
        torch.cuda.synchronize()
    return tokens, time.perf_counter() - began


if __name__ == "__main__":
    common.start(main)
