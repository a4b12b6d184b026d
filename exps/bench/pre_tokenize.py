"""Images per second from image file to token file: the recipe's way against ours, each in its own process.

    python exps/bench/pre_tokenize.py --num_images 4 --target_size 512 768

The recipe's way takes one image at a time, decodes it in line, encodes it in NCHW layout with torch's own TF32 settings
(cuDNN may use it), and asks the tokenizer for its whole vocabulary at each of the 5 lookups of an image; the time of
these is also taken away for a second figure. Ours is `pre_tokenize.py` itself. Neither counts loading the weights, and
both crop from the centre, so that their codes can be compared. The last line printed is one JSON object.
"""

import argparse
import json
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import PIL  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageFilter  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig  # noqa: E402

from data.item_processor import ItemProcessor, build_text_encode, load_text_tokenizer  # noqa: E402
from data.json_stream import iter_json_values  # noqa: E402
from data.token_file import load_token_file, save_token_file  # noqa: E402
from data.vocab import ChameleonVocab  # noqa: E402
from exps.bench.common import (  # noqa: E402
    build_bench_parser,
    choose_device,
    device_name,
    exit_on_sigterm,
    find_too_small,
    peak_device_gib,
    peak_host_gib,
    run_alone,
    versions,
)
from model.vqgan import VQGAN, image_to_pixels, load_vqgan, save_vqgan  # noqa: E402
from pre_tokenize import pre_tokenize  # noqa: E402

VOCAB_SIZE = 65536  # Chameleon's
PICTURE_SIDE = 1024  # pixels; square, so that all crops have one size
LOOKUPS_PER_IMAGE = 5  # begin, height, width, new line, end
RECIPE, OURS = "recipe", "ours"


@dataclass(frozen=True)
class Task:
    """One measurement: a way at a target size and precision. `precision` does not matter to the recipe's way."""

    way: str
    work_dir: str
    vqgan_dir: str
    out_dir: str
    target_size: int
    precision: str
    device: str
    batch_size: int | None
    num_workers: int
    compile: bool


@dataclass(frozen=True)
class Result:
    """What one measurement gave."""

    images_per_s: float
    images_per_s_without_rebuild: float  # the same without the time of the vocabulary lookups
    host_gib: float  # peak resident memory
    device_gib: float  # peak allocated memory, 0 on a CPU
    encoder_share: float  # of the time, in which the VQGAN's encoder computed


def build_parser() -> argparse.ArgumentParser:
    parser = build_bench_parser(__doc__)
    add = parser.add_argument
    add("--num_images", type=int, default=16, help="per measurement (default 16)")
    add("--target_size", type=int, nargs="+", default=[512, 768], help="sides in pixels (default 512 768)")
    add("--precision", nargs="+", help="of ours (default: tf32 fp32 bf16 on CUDA, fp32 bf16 on a CPU)")
    add("--vqgan_dir", type=Path, help="of images (default: Chameleon's size with seeded weights)")
    add("--batch_size", type=int, help="of ours (default: what pre_tokenize.py takes)")
    add("--num_workers", type=int, default=2, help="of ours, loaders beside the encoder (default 2)")
    add("--compile", action="store_true", help="also measure ours with --compile")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.task:
        task = Task(**json.loads(args.task))
        print(json.dumps(asdict(measure_recipe(task) if task.way == RECIPE else measure_ours(task))))
        return 0
    problem = find_too_small(args, "num_images")
    if problem:
        print(problem, file=sys.stderr)
        return 2
    device = choose_device(args.device)
    precisions = args.precision or (["tf32", "fp32", "bf16"] if device == "cuda" else ["fp32", "bf16"])
    with tempfile.TemporaryDirectory() as work_dir:
        write_inputs(Path(work_dir), args.num_images, with_vqgan=args.vqgan_dir is None)
        rows = compare_ways(args, Path(work_dir), device, precisions)
    print(format_table(rows, args.num_images, device))
    print(json.dumps(summarize(rows, device)))
    return 0


def compare_ways(args: argparse.Namespace, work_dir: Path, device: str, precisions: list[str]) -> list[dict]:
    """A row per target size and precision: both results, their ratios, and the share of equal codes."""
    rows = []
    for size in args.target_size:

        def task(way: str, precision: str, compile: bool = False, size: int = size) -> Task:
            vqgan_dir = args.vqgan_dir or work_dir / "vqgan"
            out_dir = work_dir / f"{way}-{size}-{precision}-{compile}"
            names = map(str, (work_dir, vqgan_dir, out_dir))
            return Task(way, *names, size, precision, device, args.batch_size, args.num_workers, compile)

        recipe = task(RECIPE, "tf32")
        baseline = run_task(recipe)
        for precision, compile in product(precisions, (False, True) if args.compile else (False,)):
            ours = task(OURS, precision, compile)
            result = run_task(ours)
            rows.append(
                {
                    "target_size": size,
                    "precision": precision + " compiled" * compile,
                    "ours": asdict(result),
                    "baseline": asdict(baseline),
                    "ratio": result.images_per_s / baseline.images_per_s,
                    "ratio_without_rebuild": result.images_per_s / baseline.images_per_s_without_rebuild,
                    "equal_codes": share_of_equal_codes(Path(recipe.out_dir), Path(ours.out_dir), work_dir),
                }
            )
    return rows


def run_task(task: Task) -> Result:
    return Result(**run_alone("exps.bench.pre_tokenize", asdict(task)))


def measure_recipe(task: Task) -> Result:
    """One image at a time, in line."""
    tokenizer = load_text_tokenizer(Path(task.work_dir) / "tokenizer")
    vqgan = load_vqgan(task.vqgan_dir, device=task.device)

    clock = Clock(task.device)
    encode = clock.timed(vqgan.encode)

    def encode_one_by_one(images: list[Image.Image]) -> list[np.ndarray]:
        pixels = (image_to_pixels(image)[None].to(task.device) for image in images)
        return [encode(one)[0].cpu().numpy() for one in pixels]

    processor = ItemProcessor(
        build_text_encode(tokenizer), ChameleonVocab.from_tokenizer(tokenizer), encode_one_by_one,
        task.target_size, image_dirs=[task.work_dir],
    )  # fmt: skip
    encode_one_by_one([blank(task.target_size)])
    files_dir = Path(task.out_dir) / "files"
    files_dir.mkdir(parents=True)
    clock.reset()
    count, lookup_s, start = 0, 0.0, time.perf_counter()
    for item_id, raw in enumerate(iter_json_values(Path(task.work_dir) / "in.json")):
        item = processor.tokenize_item(raw, item_id)
        lookup_start = time.perf_counter()
        for _ in range(LOOKUPS_PER_IMAGE):
            tokenizer.get_vocab()
        lookup_s += time.perf_counter() - lookup_start
        save_token_file(files_dir / f"{item_id}.pkl", item["token"], item["label"], item_id)
        count += 1
    elapsed_s = time.perf_counter() - start
    return result_of(count, elapsed_s, lookup_s, clock)


def measure_ours(task: Task) -> Result:
    """`pre_tokenize.py` as a user runs it; the clock runs while its `run` does, after one image to warm up."""
    argv = [
        f"--in_filename={task.work_dir}/in.json", f"--out_dir={task.out_dir}", f"--target_size={task.target_size}",
        f"--tokenizer={task.work_dir}/tokenizer", f"--vqgan_dir={task.vqgan_dir}", f"--device={task.device}",
        f"--precision={task.precision}", f"--num_workers={task.num_workers}",
    ]  # fmt: skip
    argv += [f"--batch_size={task.batch_size}"] if task.batch_size else []
    argv += ["--compile"] if task.compile else []
    clock, elapsed_s = Clock(task.device), 0.0
    run = pre_tokenize.run

    def timed_run(worker: pre_tokenize.Worker, *args: object) -> object:
        nonlocal elapsed_s
        worker.encoder._encode = clock.timed(worker.encoder._encode)
        worker.encoder([blank(task.target_size)] * worker.options.batch_size)
        clock.reset()
        start = time.perf_counter()
        returned = run(worker, *args)
        elapsed_s = time.perf_counter() - start
        return returned

    pre_tokenize.run = timed_run
    exit_code = pre_tokenize.main(argv)
    if exit_code:
        raise RuntimeError(f"pre_tokenize.py ended with exit code {exit_code}")
    count = len(list((Path(task.out_dir) / "files").glob("*.pkl")))
    return result_of(count, elapsed_s, 0.0, clock)


class Clock:
    """Time that a function takes on the device, without waiting for it."""

    def __init__(self, device: str):
        self.device = device
        self.reset()

    def reset(self) -> None:
        self._spans: list[tuple] = []

    def timed(self, function: Callable) -> Callable:
        def call(*args: object) -> object:
            start = self._now()
            returned = function(*args)
            self._spans.append((start, self._now()))
            return returned

        return call

    def total_s(self) -> float:
        if self.device != "cuda":
            return sum(stop - start for start, stop in self._spans)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(stop) for start, stop in self._spans) / 1000

    def _now(self) -> object:
        if self.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def result_of(num_images: int, elapsed_s: float, lookup_s: float, clock: Clock) -> Result:
    return Result(
        images_per_s=num_images / elapsed_s,
        images_per_s_without_rebuild=num_images / (elapsed_s - lookup_s),
        host_gib=peak_host_gib(),
        device_gib=peak_device_gib(clock.device),
        encoder_share=clock.total_s() / elapsed_s,
    )


def share_of_equal_codes(recipe_dir: Path, our_dir: Path, work_dir: Path) -> float:
    """The share of image codes that both ways agree upon. Raises ValueError if anything but codes differs."""
    image_ids = ChameleonVocab.from_tokenizer(load_text_tokenizer(work_dir / "tokenizer")).image_token_ids
    num_codes = num_equal = 0
    for path in sorted((recipe_dir / "files").glob("*.pkl")):
        theirs, ours = load_token_file(path).token, load_token_file(our_dir / "files" / path.name).token
        is_code = np.isin(theirs, image_ids)
        if len(theirs) != len(ours) or (theirs != ours)[~is_code].any():
            raise ValueError(f"{path.name}: the two ways give different sequences")
        num_codes += int(is_code.sum())
        num_equal += int((theirs == ours)[is_code].sum())
    return num_equal / num_codes


def format_table(rows: list[dict], num_images: int, device: str) -> str:
    lines = [
        f"{num_images} images of {PICTURE_SIDE} x {PICTURE_SIDE} pixels on {device_name(device)}",
        "",
        "| target size | precision | recipe, images/s (no vocabulary rebuilt) | ours, images/s | ratio (no vocabulary "
        "rebuilt) | equal codes | time in the encoder | peak GiB of recipe, ours (device) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours, base = row["ours"], row["baseline"]
        lines.append(
            f"| {row['target_size']} | {row['precision']} | {base['images_per_s']:.3g} "
            f"({base['images_per_s_without_rebuild']:.3g}) | {ours['images_per_s']:.3g} | {row['ratio']:.2f} "
            f"({row['ratio_without_rebuild']:.2f}) | {row['equal_codes']:.2%} | {base['encoder_share']:.0%}, "
            f"{ours['encoder_share']:.0%} | {base['host_gib']:.1f}, "
            f"{ours['host_gib']:.1f} ({base['device_gib']:.1f}, {ours['device_gib']:.1f}) |"
        )
    return "\n".join(lines)


def summarize(rows: list[dict], device: str) -> dict:
    """The JSON object of the last line; its figures are of the largest size, in tf32 or else the fastest precision."""
    largest = [row for row in rows if row["target_size"] == max(row["target_size"] for row in rows)]
    in_tf32 = [row for row in largest if row["precision"] == "tf32"]
    row = in_tf32[0] if in_tf32 else max(largest, key=lambda row: row["ratio"])
    head = {
        "bench": "pre_tokenize",
        "device": device_name(device),
        "versions": {**versions(), "pillow": PIL.__version__},
    }
    return {**head, **row, "rows": rows}


def blank(side: int) -> Image.Image:
    return Image.new("RGB", (side, side), (99, 150, 201))


def write_inputs(folder: Path, num_images: int, with_vqgan: bool) -> None:
    """Pictures as JPEG, the items, a tokenizer of Chameleon's size and, if asked, a VQGAN of it."""
    rng = np.random.default_rng(0)
    items = []
    for number in range(num_images):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        smooth = coarse.resize((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BICUBIC)
        grain = Image.fromarray(rng.integers(0, 256, (PICTURE_SIDE, PICTURE_SIDE, 3), dtype=np.uint8))
        picture = Image.blend(smooth, grain.filter(ImageFilter.GaussianBlur(2)), 0.3)
        picture.save(folder / f"{number}.jpg", quality=90)
        turns = [{"from": "human", "value": "Generate an image."}, {"from": "gpt", "value": "<|image|>"}]
        items.append({"conversations": turns, "image": f"{number}.jpg"})
    (folder / "in.json").write_text(json.dumps(items))
    write_tokenizer(folder / "tokenizer")
    if with_vqgan:
        save_vqgan(seeded_vqgan(), folder / "vqgan", dtype=torch.float32)


def write_tokenizer(folder: Path, num_codes: int = 8192, max_grids: int = 100) -> None:
    """Chameleon's layout and size; its text part is bytes, and names without a use."""
    digits = str.maketrans("0123456789", "ABCDEFGHIJ")
    names = ["<s>", "<pad>", "</s>", "<unk>", *(f"IMGIMG{str(code).translate(digits)}Z" for code in range(num_codes))]
    names += ["<eoss>", "<racm3:break>", "<reserved08706>", "<reserved08799>"]
    names += [f"<reserved{8800 + n:05d}>" for n in range(1, max_grids + 1)]
    special = list(names)
    names += sorted(pre_tokenizers.ByteLevel.alphabet())
    names += [f"unused{number}" for number in range(VOCAB_SIZE - len(names))]
    tokenizer = Tokenizer(models.BPE({name: token_id for token_id, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def seeded_vqgan() -> VQGAN:
    """Chameleon's VQGAN without its decoder, every weight drawn from a seed of its own name."""
    config = ChameleonVQVAEConfig(
        embed_dim=256, num_embeddings=8192, double_latent=False, latent_channels=256, resolution=512, in_channels=3,
        base_channels=128, channel_multiplier=[1, 1, 2, 2, 4], num_res_blocks=2, attn_resolutions=[], dropout=0.0,
        attn_type="vanilla",
    )  # fmt: skip
    vqgan = VQGAN(config, with_decoder=False).eval()
    for name, parameter in vqgan.named_parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        is_norm = "norm" in name.rpartition(".")[0]
        if is_norm:
            noise = noise * 0.05 + (1 if name.endswith("weight") else 0)
        elif name == "quantize.embedding.weight":
            noise = noise * 0.5
        else:
            noise = noise * 0.02 if name.endswith("bias") else noise / parameter[0].numel() ** 0.5
        parameter.data.copy_(noise)
    return vqgan


if __name__ == "__main__":
    exit_on_sigterm()
    sys.exit(main())
