"""Pictures from a model, tokens per second: `generate_batch` against `transformers.generate` with the same weights.

    python exps/bench/generate.py --model_size tiny --batch_sizes 1 8 --cfg 1 4
    python exps/bench/generate.py --model_size 7B --device cuda --batch_sizes 1 8 --cfg 1 4

Every answer is a picture that begins at once and is not over before `--num_tokens`, so all ways draw as many tokens,
each with a key/value cache. The baselines are stock `ChameleonForConditionalGeneration` with `generate`, and logits
processors that follow the grammar of images in Python, row by row, and run the unconditional branch as a second
forward per token with a cache of its own. They are asked for the whole batch at once ("batched") and for one prompt
after the other, as the recipe samples ("one by one"). Weights are seeded, not trained. The first run of each case is
greedy: it warms up, and its tokens are compared. Each way runs in its own process. In brackets beside each ratio: the
same of the CPU time of the processes, which other work on the machine disturbs less (threads that wait for each other
count too: OMP_NUM_THREADS=1). The last line printed is one JSON object.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from transformers import (  # noqa: E402
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
)

from data.vocab import (  # noqa: E402
    BEGIN_IMAGE,
    BOS,
    CODES_PER_GRID,
    END_IMAGE,
    END_OF_TURN,
    EOS,
    FIRST_GRID_SIZE,
    NEW_LINE,
    PAD,
    ChameleonVocab,
)
from exps.bench.common import (  # noqa: E402
    choose_device,
    device_name,
    exit_on_sigterm,
    peak_device_gib,
    run_alone,
    versions,
)
from model.decoder.chameleon import MODEL_SIZES, build_config, build_model, reset_rotary_buffers  # noqa: E402
from model.generation import SamplingOptions, generate_batch  # noqa: E402
from model.image_grammar import ImageGrammar, Kind  # noqa: E402

OURS, BATCHED, ONE_BY_ONE = "ours", "batched", "one by one"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = ("tiny", "bench", "1B", "7B")
NUM_CODES, VOCAB_SIZE = {"tiny": 1024}, {"tiny": 1480}  # of the laptop default's tokenizer
DEFAULT_NUM_CODES, DEFAULT_VOCAB_SIZE = 8192, 65536  # Chameleon's
MAX_GRIDS = 32
WEIGHT_STD = 0.02


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_size", choices=SIZES, default="tiny", help="default tiny; `bench` is tiny with 65,536 token ids")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default auto: cuda if there is one")
    add("--precision", choices=tuple(DTYPES), help="default: fp32 on a CPU, bf16 on CUDA")
    add("--batch_sizes", type=int, nargs="+", default=[1, 8], help="prompts at a time (default 1 8)")
    add("--cfg", type=float, nargs="+", default=[1.0, 4.0], help="guidance, 1 is without (default 1 4)")
    add("--num_tokens", type=int, help="new tokens per prompt (default 256 on a CPU, 1024 on CUDA)")
    add("--prompt_len", type=int, default=32, help="longest prompt in tokens, the others a little shorter (default 32)")
    add("--repeats", type=int, default=3, help="sampled runs per case, after the greedy one (default 3)")
    add("--ways", nargs="+", choices=(OURS, BATCHED, ONE_BY_ONE), default=[OURS, BATCHED, ONE_BY_ONE])
    add("--bandwidth_tb_s", type=float, default=4.3, help="the GPU's memory bandwidth in TB/s (default 4.3, H200)")
    add("--cuda_graph", action=argparse.BooleanOptionalAction, default=True, help="ours: CUDA graphs (default on)")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="ours: torch.compile (default off)")
    add("--task", help=argparse.SUPPRESS)  # one measurement as JSON: how this script calls itself
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.task:
        print(json.dumps(measure(**json.loads(args.task))))
        return 0
    device = choose_device(args.device)
    args.num_tokens = args.num_tokens or (1024 if device == "cuda" else 256)
    args.precision = args.precision or ("bf16" if device == "cuda" else "fp32")
    problems = find_problems(args)
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 2
    names = ("model_size", "precision", "batch_sizes", "cfg", "num_tokens", "prompt_len", "repeats")
    task = {name: getattr(args, name) for name in names} | {"device": device}
    task |= {"cuda_graph": args.cuda_graph, "compile_step": args.compile}
    load_before = os.getloadavg()[0]
    results = {way: run_alone("exps.bench.generate", task | {"way": way}) for way in args.ways}
    rows = [compare(index, results, args) for index in range(len(results[args.ways[0]]["cases"]))]
    print(format_table(rows, device, args))
    best = max(rows, key=lambda row: (row["batch_size"], -row["cfg"]))  # the largest batch, with the least guidance
    summary = {"bench": "generate", "device": device_name(device), "versions": versions(), **best, "rows": rows}
    print(json.dumps(summary | {"load": {"before": load_before, "after": os.getloadavg()[0]}}))
    differs = args.precision == "fp32" and any(row["equal_tokens"] not in (None, 1.0) for row in rows)
    if differs:
        print("greedy tokens in fp32 differ: see equal_tokens", file=sys.stderr)
    return int(differs)


def find_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the arguments."""
    problems = []
    for name in ("num_tokens", "repeats", "bandwidth_tb_s", "batch_sizes"):
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value]) <= 0:
            problems.append(f"--{name} must be above 0, got {value}")
    if args.prompt_len < 2:
        problems.append(f"--prompt_len must be at least 2, got {args.prompt_len}")
    most = MODEL_SIZES[args.model_size]["max_position_embeddings"] - args.prompt_len - 3
    if args.num_tokens > most:
        problems.append(
            f"--num_tokens must be at most {most} with --prompt_len {args.prompt_len}: the model has no more"
        )
    return problems


def measure(way: str, model_size: str, precision: str, device: str, **task) -> dict:
    """One way in all cases: seconds, greedy tokens and peak memory of each."""
    vocab_mapping = make_vocabulary(model_size)
    vocab, dtype = ChameleonVocab.from_mapping(vocab_mapping), DTYPES[precision]
    config = build_config(model_size, vocab_mapping)
    if way == OURS:
        model = fill_weights(build_model(config, device, dtype).eval())
    else:
        model = fill_weights(build_stock(config, device, dtype))
    cases = []
    for batch_size in task["batch_sizes"]:
        if way == ONE_BY_ONE and batch_size == 1:
            cases += [None for _ in task["cfg"]]  # the same as batched
            continue
        prompts = make_prompts(batch_size, task["prompt_len"], vocab)
        start = image_start(task["num_tokens"], vocab)
        for cfg in task["cfg"]:
            if way == OURS:
                draw = ours(model, vocab, prompts, start, cfg, task)
            else:
                size = 1 if way == ONE_BY_ONE else batch_size
                draw = stock(model, vocab, prompts, start, cfg, task["num_tokens"], size)
            tokens, *_ = timed(draw, 0.0, device)
            times = [timed(draw, 1.0, device)[1:] for _ in range(task["repeats"])]
            seconds, cpu_seconds = (list(column) for column in zip(*times, strict=True))
            cases.append(
                {
                    "tokens": tokens,
                    "seconds": statistics.median(seconds),
                    "all_seconds": seconds,
                    "cpu_seconds": statistics.median(cpu_seconds),
                }
            )
    return {"cases": cases, "peak_gib": peak_device_gib(device), "needed": needed_bytes(model, vocab, way, task)}


def needed_bytes(model: torch.nn.Module, vocab: ChameleonVocab, way: str, task: dict) -> dict[str, float]:
    """
    What a decoding step reads at the least, in bytes: `weights` once per step, `cache` per branch of each prompt.

    Weights are all parameters but the embedding, of which one row per token is read; of the head, ours reads the image
    codes only. The cache is `2 * layers * kv heads * head_dim` numbers for every token that is visible, on average
    prompt + 3 + num_tokens / 2 of them. (The unconditional branch needs fewer; it is counted as if it needed as many as
    half of the answer.) The share of the bandwidth limit is

        (weights + batch * (conditional + unconditional cache)) * num_tokens / seconds / bandwidth

    with the seconds of the whole answer, prefill included.
    """
    config, head = model.config, model.lm_head.weight
    size = head.element_size()
    weights = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if "embed_tokens" not in name)
    if way == OURS:
        weights -= (head.shape[0] - vocab.num_codes) * head.shape[1] * size
    head_dim = config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * size
    seen = task["num_tokens"] / 2 + 3
    return {
        "weights": weights,
        "conditional": per_token * (seen + task["prompt_len"]),
        "unconditional": per_token * seen,
    }


def make_vocabulary(model_size: str) -> dict[str, int]:
    """Names and ids in Chameleon's layout; what is no control token is a word."""
    num_codes = NUM_CODES.get(model_size, DEFAULT_NUM_CODES)
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    names = [BOS, PAD, EOS, "<unk>", *(f"IMGIMG{str(code).translate(letters)}Z" for code in range(num_codes))]
    names += [END_IMAGE, BEGIN_IMAGE, END_OF_TURN, NEW_LINE]
    names += [f"<reserved{FIRST_GRID_SIZE + grids:05d}>" for grids in range(1, MAX_GRIDS + 1)]
    names += [f"word{n}" for n in range(VOCAB_SIZE.get(model_size, DEFAULT_VOCAB_SIZE) - len(names))]
    return {name: token_id for token_id, name in enumerate(names)}


def make_prompts(batch_size: int, prompt_len: int, vocab: ChameleonVocab) -> list[list[int]]:
    """Words after `<s>`; lengths differ by up to seven."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(vocab.vocab_size - 100, vocab.vocab_size, (batch_size, prompt_len), generator=generator)
    lens = [max(prompt_len - index % 8, 2) for index in range(batch_size)]
    return [[vocab.bos_id, *row[: length - 1]] for row, length in zip(words.tolist(), lens, strict=True)]


def image_start(num_tokens: int, vocab: ChameleonVocab) -> list[int]:
    """The beginning of the smallest square image that is not over after so many tokens."""
    for grids, token_id in vocab.grid_size_ids.items():
        side = CODES_PER_GRID * grids
        if side * (side + 1) >= num_tokens:
            return [vocab.begin_image_id, token_id, token_id]
    raise ValueError(f"no image has {num_tokens} tokens; give a smaller --num_tokens")


def build_stock(config: ChameleonConfig, device: str, dtype: torch.dtype) -> ChameleonForConditionalGeneration:
    """transformers' own model of the same shape, without the VQGAN, which generation does not use."""
    values = config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "max_position_embeddings", "vocabulary_map", "swin_norm", "model_parallel_size")
    stock_config = ChameleonConfig(**{name: values[name] for name in names})
    with torch.device("meta"):
        model = ChameleonForConditionalGeneration(stock_config).to(dtype)
    del model.model.vqmodel
    model.to_empty(device=device)
    reset_rotary_buffers(model)
    # Its forward masks the image tokens in this list, so that it can draw no image: an empty one lets it.
    model.model.vocabulary_mapping.__dict__["image_tokens"] = []
    return model.eval()


@torch.no_grad()
def fill_weights(model: torch.nn.Module) -> torch.nn.Module:
    """The same values in both models: those of the norms 1 and 0, all else drawn in the order of the parameters."""
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(0)
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        if "norm" in module.rpartition(".")[2]:
            parameter.fill_(1.0 if kind == "weight" else 0.0)
        else:
            parameter.normal_(0.0, WEIGHT_STD, generator=generator)
    return model


def ours(model, vocab, prompts, start, cfg: float, task: dict) -> Callable[[float], list[list[int]]]:
    """A call that draws all answers at a temperature; returns their tokens without the start."""
    extra = {"cuda_graph": None if task["cuda_graph"] else False, "compile_step": task["compile_step"]}

    def draw(temperature: float) -> list[list[int]]:
        options = SamplingOptions(temperature=temperature, cfg=cfg)
        most = task["num_tokens"] + len(start)
        answers = generate_batch(model, prompts, vocab, options, most, [start] * len(prompts), len(prompts), **extra)
        return [answer.tokens[len(start) :] for answer in answers]

    return draw


def stock(
    model, vocab: ChameleonVocab, prompts, start, cfg: float, num_tokens: int, batch_size: int
) -> Callable[[float], list[list[int]]]:
    """The same by `transformers.generate`, `batch_size` prompts at a time, padded on the left."""
    grammar = PythonGrammar(vocab, model)

    def draw_batch(batch: list[list[int]], temperature: float) -> list[list[int]]:
        width = max(map(len, batch))
        rows = [[vocab.pad_id] * (width - len(row)) + row for row in batch]
        input_ids = torch.tensor(rows, device=model.lm_head.weight.device)
        guidance = [UnconditionalBranch(model, vocab, cfg)] if cfg != 1 else []
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        found = model.generate(
            input_ids,
            attention_mask=(input_ids != vocab.pad_id).long(),
            max_new_tokens=num_tokens,
            use_cache=True,
            eos_token_id=vocab.end_of_turn_id,
            pad_token_id=vocab.pad_id,
            logits_processor=LogitsProcessorList([*guidance, grammar]),
            **sampling,
        )
        return found[:, width:].tolist()

    def draw(temperature: float) -> list[list[int]]:
        torch.manual_seed(0)
        contexts = [prompt + start for prompt in prompts]
        batches = [contexts[first : first + batch_size] for first in range(0, len(contexts), batch_size)]
        return [tokens for batch in batches for tokens in draw_batch(batch, temperature)]

    return draw


class PythonGrammar(LogitsProcessor):
    """What may come next and its top-k, found in Python from the tokens of each row; the rest is minus infinity."""

    def __init__(self, vocab: ChameleonVocab, model: torch.nn.Module):
        device = model.lm_head.weight.device
        self.vocab, self.options = vocab, SamplingOptions()
        self.sides = {token_id: CODES_PER_GRID * grids for grids, token_id in vocab.grid_size_ids.items()}
        self.forbidden = ~ImageGrammar(vocab, model.config.vocab_size, device).allowed

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        kinds = [self.kind(tokens) for tokens in input_ids.tolist()]
        scores = scores.masked_fill(self.forbidden[torch.tensor(kinds, device=scores.device)], -torch.inf)
        is_text = kinds.count(Kind.TEXT) == len(kinds)
        top_k = self.options.text_top_k if is_text else self.options.image_top_k
        least = scores.topk(min(top_k, scores.shape[-1])).values[:, -1:]
        return scores.masked_fill(scores < least, -torch.inf)

    def kind(self, tokens: list[int]) -> Kind:
        begin = last_begin(tokens, self.vocab)
        rest = tokens[begin + 1 :]
        if begin < 0 or self.vocab.end_image_id in rest:
            return Kind.TEXT
        if len(rest) < 2:
            return Kind.GRID_SIZE
        height, width = self.sides[rest[0]], self.sides[rest[1]]
        place = len(rest) - 2
        if place == height * (width + 1):
            return Kind.END_IMAGE
        return Kind.NEW_LINE if place % (width + 1) == width else Kind.CODE


class UnconditionalBranch(LogitsProcessor):
    """Guidance by a second forward per token, whose cache holds what came since the image began."""

    def __init__(self, model: torch.nn.Module, vocab: ChameleonVocab, cfg: float):
        self.model, self.vocab, self.cfg, self.cache = model, vocab, cfg, None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.cache is None:
            self.cache = DynamicCache(config=self.model.config)
            input_ids = input_ids[:, last_begin(input_ids[0].tolist(), self.vocab) :]
        else:
            input_ids = input_ids[:, -1:]
        logits = self.model(input_ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        unconditional = logits.to(scores.dtype)
        return unconditional + self.cfg * (scores - unconditional)


def last_begin(tokens: list[int], vocab: ChameleonVocab) -> int:
    """Where the last image begins, -1 without one."""
    return len(tokens) - 1 - tokens[::-1].index(vocab.begin_image_id) if vocab.begin_image_id in tokens else -1


def timed(
    draw: Callable[[float], list[list[int]]], temperature: float, device: str
) -> tuple[list[list[int]], float, float]:
    """The tokens, the seconds that they took, and the seconds that this process was computing."""
    start, cpu_start = time.perf_counter(), time.process_time()
    tokens = draw(temperature)
    if device == "cuda":
        torch.cuda.synchronize()
    return tokens, time.perf_counter() - start, time.process_time() - cpu_start


def compare(index: int, results: dict[str, dict], args: argparse.Namespace) -> dict:
    """All ways in one case: tokens per second, ratios, and the share of greedy tokens that are the same."""
    batch_size, cfg = args.batch_sizes[index // len(args.cfg)], args.cfg[index % len(args.cfg)]
    cases = {way: result["cases"][index] for way, result in results.items()}
    if ONE_BY_ONE in cases and cases[ONE_BY_ONE] is None:
        cases[ONE_BY_ONE] = cases.get(BATCHED)
    num_tokens = batch_size * args.num_tokens
    figures = {}
    for way, case in cases.items():
        if case is None:
            continue
        needed = results[way]["needed"]
        step = needed["weights"] + batch_size * (needed["conditional"] + (cfg != 1) * needed["unconditional"])
        steps = num_tokens if way == ONE_BY_ONE and batch_size > 1 else args.num_tokens
        figures[way] = {
            "tokens_per_s": num_tokens / case["seconds"],
            "seconds": case["all_seconds"],
            "cpu_seconds": case["cpu_seconds"],
            "bandwidth_share": step * args.num_tokens / case["seconds"] / (args.bandwidth_tb_s * 1e12),
            "ms_per_step": 1e3 * case["seconds"] / steps,
            "peak_gib": results[way]["peak_gib"],
        }
    speed = {way: figure["tokens_per_s"] for way, figure in figures.items()}
    others = [way for way in (BATCHED, ONE_BY_ONE) if way in speed and OURS in speed]
    equal = [
        len(new) == args.num_tokens == len(old) and sum(map(int.__eq__, new, old)) / len(new)
        for way in others
        for new, old in zip(cases[OURS]["tokens"], cases[way]["tokens"], strict=True)
    ]
    return {
        "batch_size": batch_size,
        "cfg": cfg,
        "ours": figures.get(OURS),
        "baseline": {way: figures[way] for way in (BATCHED, ONE_BY_ONE) if way in figures},
        "ratio": {way: speed[OURS] / speed[way] for way in others},
        "cpu_time_ratio": {way: figures[way]["cpu_seconds"] / figures[OURS]["cpu_seconds"] for way in others},
        "equal_tokens": statistics.mean(equal) if equal else None,
    }


def format_table(rows: list[dict], device: str, args: argparse.Namespace) -> str:
    is_cuda = device == "cuda"
    lines = [
        f"{args.model_size}, {args.precision}, {args.num_tokens} new tokens per prompt, prompts of up to "
        f"{args.prompt_len}, {torch.get_num_threads()} threads, on {device_name(device)}",
        "",
        "| batch | cfg | ours, tokens/s | generate, batched | ratio | generate, one by one | ratio | equal greedily |"
        + " share of the bandwidth limit, ours |" * is_cuda,
        "|---|---|---|---|---|---|---|---|" + "---|" * is_cuda,
    ]
    for row in rows:
        cells = [
            str(row["batch_size"]),
            f"{row['cfg']:g}",
            f"{row['ours']['tokens_per_s']:,.0f}" if row["ours"] else "-",
        ]
        for way in (BATCHED, ONE_BY_ONE):
            has_way = way in row["baseline"]
            cells.append(f"{row['baseline'][way]['tokens_per_s']:,.0f}" if has_way else "-")
            has_ratio = way in row["ratio"]
            cells.append(f"{row['ratio'][way]:.2f} ({row['cpu_time_ratio'][way]:.2f})" if has_ratio else "-")
        cells.append("-" if row["equal_tokens"] is None else f"{row['equal_tokens']:.1%}")
        if is_cuda:
            cells.append(f"{row['ours']['bandwidth_share']:.0%}" if row["ours"] else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    exit_on_sigterm()
    sys.exit(main())
