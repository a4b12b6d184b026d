"""The VQGAN's encoder alone, by precision: images per second, TFLOP/s, memory, and the share of codes equal to fp32's.

    python exps/bench/encoder.py --batch_sizes 1 12

Images are in memory, and their codes end there; the VQGAN has Chameleon's size and seeded weights. Each precision is
measured in its own process. The last line printed is one JSON object.
"""

import argparse
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from data.items.image_transform import crop_to_rgb, open_image  # noqa: E402
from exps.bench import common  # noqa: E402
from exps.bench.pre_tokenize import seeded_vqgan, write_inputs  # noqa: E402
from model.vqgan.image_encoder import PRECISIONS, ImageEncoder  # noqa: E402
from model.vqgan.vqgan import VQGAN, load_vqgan  # noqa: E402

# Whose codes are compared with those of fp32.
NUM_COMPARED = 4
COLUMNS = ("images_per_s", "tflop_per_s", "equal_codes", "device_gib", "num_encoded_again")


def build_parser() -> argparse.ArgumentParser:
    parser = common.build_bench_parser(__doc__)
    add = parser.add_argument
    add("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="what to measure (default: all)")
    add("--target_size", type=int, default=768, help="side of the images in pixels (default 768)")
    add("--batch_sizes", type=common.positive, nargs="+", default=[12], help="images encoded at once (default 12)")
    add("--seconds", type=float, default=3, help="least duration of each measurement (default 3)")
    add("--vqgan_dir", help="folder of the VQGAN (default: Chameleon's size with seeded weights)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    device = common.choose_device(args.device)
    task = {"device": device, "vqgan_dir": args.vqgan_dir, "target_size": args.target_size, "seconds": args.seconds}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), max(*args.batch_sizes, NUM_COMPARED), with_vqgan=False)
        for precision in args.precision:
            for batch_size in args.batch_sizes:
                case = {"precision": precision, "batch_size": batch_size}
                figures = common.run_alone("encoder:measure", folder=folder, **case, **task)
                rows.append(common.compare(case, figures, None))
    return common.report("encoder", f"Images of {args.target_size} pixels", device, rows, COLUMNS)


def measure(
    folder: str, device: str, vqgan_dir: str | None, target_size: int, precision: str, batch_size: int, seconds: float
) -> dict[str, float]:
    """Figures of one precision and batch, after one batch to warm up."""
    paths = sorted(Path(folder).glob("*.jpg"))
    images = [
        crop_to_rgb(open_image(path), target_size) for path in islice(cycle(paths), max(batch_size, NUM_COMPARED))
    ]
    vqgan = load_vqgan(vqgan_dir, device) if vqgan_dir else seeded_vqgan().requires_grad_(False).to(device)
    exact = ImageEncoder(vqgan, "fp32")(images[:NUM_COMPARED])
    encoder = ImageEncoder(vqgan, precision, batch_size)
    equal = [np.mean(ours == theirs) for ours, theirs in zip(encoder(images[:NUM_COMPARED]), exact, strict=True)]
    batch = images[:batch_size]
    encoder(batch)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    num_images, began = 0, time.perf_counter()
    while (elapsed_s := time.perf_counter() - began) < seconds or not num_images:
        encoder(batch)
        num_images += batch_size
    return {
        "images_per_s": num_images / elapsed_s,
        "tflop_per_s": num_images / elapsed_s * flop_per_image(vqgan, target_size) / 1e12,
        "equal_codes": float(np.mean(equal)),
        "device_gib": common.peak_device_gib(device),
        "num_encoded_again": encoder.num_encoded_again,
    }


def flop_per_image(vqgan: VQGAN, side: int) -> int:
    """Of convolutions and products, counted on tensors without values; a multiplication and an addition are two."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        VQGAN(vqgan.config, with_decoder=False).features(torch.empty(1, 3, side, side))
    return counter.get_total_flops()


if __name__ == "__main__":
    common.start(main)
