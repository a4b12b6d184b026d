"""Images per second from image file to token file: the recipe's way against ours, each in its own process.

    python exps/bench/pre_tokenize.py --num_images 16 --target_size 512 768
    python exps/bench/pre_tokenize.py --encoder none --target_size 768 --num_workers 2

`start_s` ends with the first written items. Rates are those of the steady state after it, which lasts `--seconds` at
least if there are images enough. The recipe's way reads, encodes and writes one image at a time, in NCHW layout and
with torch's own TF32 settings. It asks the tokenizer for its whole vocabulary at each of the 5 lookups of an image;
`images_per_s_without_lookups` leaves the time of these out. Ours is `pre_tokenize.py` itself; `encoder.py` measures the
encoder alone. Both ways crop from the centre, so that `equal_codes` can compare their codes. `--encoder none` measures
the host of a GPU alone: CPU time of the main process per image, with codes of zeros. The last line printed is one JSON
object with the figures of the last size and precision.
"""

import argparse
import json
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageFilter  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig  # noqa: E402

from data.formats.json_stream import iter_json_values  # noqa: E402
from data.formats.token_file import load_token_file, save_token_file  # noqa: E402
from data.items.item_processor import ItemProcessor, build_text_encode, load_text_tokenizer  # noqa: E402
from data.items.vocab import ChameleonVocab  # noqa: E402
from exps.bench import common  # noqa: E402
from exps.bench.synthetic import VOCAB_SIZE, special_names  # noqa: E402
from model.vqgan.vqgan import VQGAN, image_to_pixels, load_vqgan, save_vqgan  # noqa: E402

WAYS = OURS, RECIPE = "ours", "recipe"
TINY_VQGAN = ROOT / "exps" / "tiny" / "vqgan"
# Square, so that all crops have one size.
IMAGE_SIDE = 1024
# More items show the same images again: drawing an image takes longer than encoding it.
MAX_DIFFERENT_IMAGES = 24
# Begin, height, width, new line, end.
LOOKUPS_PER_IMAGE = 5
COLUMNS = (
    *("images_per_s", "images_per_s_without_lookups", "steady_s"),
    *("start_s", "host.main_cpu_ms_per_image", "loaders_at_work_s", "equal_codes", "host_gib", "device_gib"),
)


def build_parser() -> argparse.ArgumentParser:
    parser = common.build_bench_parser(__doc__)
    add = parser.add_argument
    add("--num_images", type=common.positive, default=10000, help="most images per measurement (default 10000)")
    add("--seconds", type=float, default=10, help="seconds of the steady state to measure (default 10)")
    add("--target_size", type=int, nargs="+", default=[512, 768], help="sides in pixels (default 512 768)")
    add("--precision", nargs="+", help="precisions of our way (default: fp32 bf16, and on CUDA tf32 fp16)")
    add("--vqgan_dir", type=Path, help="folder of the VQGAN (default: Chameleon's size with seeded weights)")
    add("--num_workers", type=int, help="loaders of our way beside the encoder (default: that of pre_tokenize.py)")
    add("--encoder", choices=("vqgan", "none"), default="vqgan", help="none: the host alone (default vqgan)")
    add("--ways", nargs="+", choices=WAYS, default=WAYS, help="what to measure; ours always is (default: both)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    is_host = args.encoder == "none"
    device = common.choose_device(args.device)
    rows = []
    with tempfile.TemporaryDirectory() as work_dir:
        folder = Path(work_dir)
        vqgan_dir = TINY_VQGAN if is_host else args.vqgan_dir
        write_inputs(folder, args.num_images, with_vqgan=vqgan_dir is None)
        for size in args.target_size:
            task = {"work_dir": work_dir, "vqgan_dir": str(vqgan_dir or folder / "vqgan"), "device": device}
            task |= {"target_size": size, "seconds": args.seconds}
            recipe_dir = folder / f"recipe-{size}"
            baseline = None
            if RECIPE in args.ways and not is_host:
                baseline = common.run_alone("pre_tokenize:measure_recipe", out_dir=str(recipe_dir), **task)
            for precision in choose_precisions(args.precision, device, is_host):
                out_dir = folder / f"ours-{size}-{precision}"
                more = {"out_dir": str(out_dir), "precision": precision, "num_workers": args.num_workers}
                if is_host:
                    more["device"] = "cuda"
                ours = common.run_alone("pre_tokenize_ours:measure_ours", **task | more)
                if baseline and "failed" not in ours | baseline:
                    ours["equal_codes"] = share_of_equal_codes(recipe_dir, out_dir, folder)
                case = {"target_size": size, "precision": precision or "no encoder"}
                shown = {name: ours[name] for name in ("host", "start_s") if name in ours}
                rows.append(common.compare(case, ours, baseline, way=RECIPE, **shown))
    title = f"At most {args.num_images} images of {IMAGE_SIDE} x {IMAGE_SIDE} pixels"
    return common.report("pre_tokenize", title, device, rows, COLUMNS, main_row=rows[-1])


def choose_precisions(wanted: list[str] | None, device: str, is_host: bool) -> Sequence[str | None]:
    if is_host:
        return [None]
    # The last is the main row: on CUDA what users get.
    return wanted or ["fp32", "bf16", *(["tf32", "fp16"] if device == "cuda" else [])]


def measure_recipe(
    work_dir: str, vqgan_dir: str, device: str, out_dir: str, target_size: int, seconds: float
) -> dict[str, float]:
    """One image at a time, in line."""
    marks = [(time.perf_counter(), 0.0)]
    tokenizer = load_text_tokenizer(Path(work_dir) / "tokenizer")
    vqgan = load_vqgan(vqgan_dir, device=device)

    def encode_one_by_one(images: list[Image.Image]) -> list[np.ndarray]:
        pixels = (image_to_pixels(image)[None].to(device) for image in images)
        return [vqgan.encode(one)[0].cpu().numpy() for one in pixels]

    vocab, text_encode = ChameleonVocab.from_tokenizer(tokenizer), build_text_encode(tokenizer)
    processor = ItemProcessor(text_encode, vocab, encode_one_by_one, target_size, image_dirs=[work_dir])
    files_dir = Path(out_dir) / "files"
    files_dir.mkdir(parents=True)
    for item_id, raw in enumerate(iter_json_values(Path(work_dir) / "in.json")):
        item = processor.tokenize_item(raw, item_id)
        lookup_began = time.perf_counter()
        for _ in range(LOOKUPS_PER_IMAGE):
            tokenizer.get_vocab()
        lookup_s = time.perf_counter() - lookup_began
        save_token_file(files_dir / f"{item_id}.pkl", item["token"], item["label"], item_id)
        marks.append((time.perf_counter(), marks[-1][1] + lookup_s))
        if marks[-1][0] - marks[1][0] >= seconds:
            break
    # A single image has no steady state.
    begin = marks[1] if len(marks) > 2 else marks[0]
    num_images = len(marks) - 1 - marks.index(begin)
    steady_s, lookup_s = (last - first for last, first in zip(marks[-1], begin, strict=True))
    return {
        "images_per_s": num_images / steady_s,
        "images_per_s_without_lookups": num_images / (steady_s - lookup_s),
        "start_s": marks[1][0] - marks[0][0],
        "steady_s": steady_s,
        "host_gib": common.resident_gib(),
        "device_gib": common.peak_device_gib(device),
    }


def share_of_equal_codes(recipe_dir: Path, our_dir: Path, work_dir: Path) -> float:
    """The share of equal codes in the items that both ways have. Raises ValueError if anything but codes differs."""
    image_ids = ChameleonVocab.from_tokenizer(load_text_tokenizer(work_dir / "tokenizer")).image_token_ids
    num_codes = num_equal = 0
    names = {path.name for path in (our_dir / "files").glob("*.pkl")}
    for path in sorted((recipe_dir / "files").glob("*.pkl")):
        if path.name not in names:
            continue
        theirs, ours = load_token_file(path).token, load_token_file(our_dir / "files" / path.name).token
        is_code = np.isin(theirs, image_ids)
        if len(theirs) != len(ours) or (theirs != ours)[~is_code].any():
            raise ValueError(f"{path.name}: the two ways give different sequences")
        num_codes += int(is_code.sum())
        num_equal += int((theirs == ours)[is_code].sum())
    return num_equal / num_codes


def write_inputs(folder: Path, num_images: int, with_vqgan: bool) -> None:
    """Images as JPEG, the items, a tokenizer of Chameleon's size and, with `with_vqgan`, a VQGAN of that size."""
    rng = np.random.default_rng(0)
    num_different = min(num_images, MAX_DIFFERENT_IMAGES)
    for number in range(num_different):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        smooth = coarse.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC)
        grain = Image.fromarray(rng.integers(0, 256, (IMAGE_SIDE, IMAGE_SIDE, 3), dtype=np.uint8))
        image = Image.blend(smooth, grain.filter(ImageFilter.GaussianBlur(2)), 0.3)
        image.save(folder / f"{number}.jpg", quality=90)
    turns = [{"from": "human", "value": "Generate an image."}, {"from": "gpt", "value": "<|image|>"}]
    items = [{"conversations": turns, "image": f"{number % num_different}.jpg"} for number in range(num_images)]
    (folder / "in.json").write_text(json.dumps(items))
    write_tokenizer(folder / "tokenizer")
    if with_vqgan:
        save_vqgan(seeded_vqgan(), folder / "vqgan", dtype=torch.float32)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of Chameleon's layout and size; text is bytes, and the other names are unused."""
    special = special_names(num_codes=8192, max_grids=100)
    names = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    names += [f"unused{number}" for number in range(VOCAB_SIZE - len(names))]
    tokenizer = Tokenizer(models.BPE({name: token_id for token_id, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def seeded_vqgan() -> VQGAN:
    """Chameleon's VQGAN without its decoder, every weight drawn from a seed of its own name."""
    shape = {"embed_dim": 256, "num_embeddings": 8192, "latent_channels": 256, "resolution": 512, "base_channels": 128}
    layers = {
        "channel_multiplier": [1, 1, 2, 2, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [],
        "attn_type": "vanilla",
    }
    config = ChameleonVQVAEConfig(**shape, **layers, double_latent=False, in_channels=3, dropout=0.0)
    vqgan = VQGAN(config, with_decoder=False).eval()
    for name, parameter in vqgan.named_parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if "norm" in name.rpartition(".")[0]:
            noise = noise * 0.05 + (1 if name.endswith("weight") else 0)
        elif name == "quantize.embedding.weight":
            noise = noise * 0.5
        else:
            noise = noise * 0.02 if name.endswith("bias") else noise / parameter[0].numel() ** 0.5
        parameter.data.copy_(noise)
    return vqgan


if __name__ == "__main__":
    common.start(main)
