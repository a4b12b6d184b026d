"""Train the small VQGAN of the laptop default (f=16, five levels, the class of the 7B's VQGAN); done once, committed.

    python exps/tiny/train_vqgan.py --decoder_steps 0
    python exps/tiny/train_vqgan.py --steps 0 --decoder_steps 1200 --lr 1.5e-3 --init_from exps/tiny/vqgan

Codes must be *local*: a language model can compose pairs that it never saw only if an object's codes do not depend on
its neighbour. Training by reconstruction alone spoils that, because the receptive field covers the image. So the
codebook comes first: 1,024 k-means centres of 16x16 patches, embedded by their principal components. The encoder learns
to name the centre of each cell, in scenes and in collages; each code is a target from the first step, so none
collapses. The second command trains the decoder alone, on scenes as frequent as in the data, and keeps all codes.
Held-out pairs are never shown.
"""

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
# Before transformers: keeps torchao quiet.
import data  # noqa: E402, F401 isort: skip
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig  # noqa: E402

from exps.tiny.scenes import LAYOUT_WEIGHTS, SCENE_PIXELS, Scene, all_scenes, draw, read  # noqa: E402
from model.vqgan.vqgan import VQGAN, image_to_pixels, load_vqgan, pixels_to_image, save_vqgan  # noqa: E402

NUM_CODES = 1024
PATCH = 16
GRID = SCENE_PIXELS // PATCH
CONFIG = ChameleonVQVAEConfig(
    embed_dim=32,
    num_embeddings=NUM_CODES,
    latent_channels=32,
    resolution=SCENE_PIXELS,
    base_channels=32,
    channel_multiplier=[1, 1, 2, 2, 3],
    num_res_blocks=1,
    attn_resolutions=[],
    attn_type="none",
)


class PatchWorld:
    """All distinct patches of the training scenes, the patches of each scene, and the right code of each patch.

    `patches` [P, 3, 16, 16] in [-1, 1]; `scene_cells` [S, 4, 4] indices of patches; `scene_weights` [S] frequency of a
    scene in the training data; `codes` [P]; `centres` [K, 768].
    """

    def __init__(self, scenes: list[Scene], generator: torch.Generator):
        pixels = torch.stack([image_to_pixels(draw(scene)) for scene in scenes])
        cells = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5)
        flat, inverse = torch.unique(cells.reshape(-1, 3 * PATCH * PATCH), dim=0, return_inverse=True)
        self.patches = flat.view(-1, 3, PATCH, PATCH)
        self.scene_cells = inverse.view(len(scenes), GRID, GRID)
        of_layout = Counter(scene.layout for scene in scenes)
        self.scene_weights = torch.tensor([LAYOUT_WEIGHTS[s.layout] / of_layout[s.layout] for s in scenes])
        self.centres = k_means(flat, NUM_CODES, generator)
        self.codes = torch.cdist(flat, self.centres).argmin(1)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pixels [size, 3, 64, 64] and codes [size, 4, 4]: half scenes, else collages of quadrants and of cells."""

        def draw_cells(count: int) -> Tensor:
            return self.scene_cells[torch.randint(len(self.scene_cells), (count,), generator=generator)]

        num_quadrants, num_single = size // 3, size // 6
        scenes = draw_cells(size - num_quadrants - num_single)
        quadrants = torch.empty(num_quadrants, GRID, GRID, dtype=torch.long)
        for top in (0, GRID // 2):
            for left in (0, GRID // 2):
                box = (slice(None), slice(top, top + GRID // 2), slice(left, left + GRID // 2))
                quadrants[box] = draw_cells(num_quadrants)[box]
        single = torch.randint(len(self.patches), (num_single, GRID, GRID), generator=generator)
        cells = torch.cat([scenes, quadrants, single])
        return self.assemble(cells), self.codes[cells]

    def assemble(self, cells: Tensor) -> Tensor:
        """Indices of patches [B, 4, 4] -> pixels [B, 3, 64, 64]."""
        # [B, 4, 4, 3, 16, 16] -> [B, 3, 4, 16, 4, 16]
        tiles = self.patches[cells].permute(0, 3, 1, 4, 2, 5)
        return tiles.reshape(len(cells), 3, SCENE_PIXELS, SCENE_PIXELS)


def k_means(points: Tensor, num_centres: int, generator: torch.Generator, iterations: int = 40) -> Tensor:
    """Points [N, D] -> centres [K, D]: Lloyd's algorithm, k-means++ start; an empty centre moves to the worst point."""
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    distances = torch.cdist(points, centres).square().squeeze(1)
    while len(centres) < num_centres:
        chosen = points[torch.multinomial(distances, 1, generator=generator)]
        centres = torch.cat([centres, chosen])
        distances = torch.minimum(distances, torch.cdist(points, chosen).square().squeeze(1))
    for _ in range(iterations):
        nearest_distance, nearest = torch.cdist(points, centres).min(1)
        counts = torch.bincount(nearest, minlength=num_centres)
        centres = torch.zeros_like(centres).index_add_(0, nearest, points) / counts.clamp_min(1)[:, None]
        empty = (counts == 0).nonzero().squeeze(1)
        centres[empty] = points[nearest_distance.topk(len(empty)).indices]
    return centres


def train(world: PatchWorld, steps: int, batch_size: int, lr: float, generator: torch.Generator) -> VQGAN:
    """The trained VQGAN. The progress bar shows losses and the share of cells with the right code."""
    vqgan = VQGAN(CONFIG).train().requires_grad_(True)
    # The codebook is the principal components of the patch centres, scaled to unit variance.
    centred = world.centres - world.centres.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    embedding = centred @ directions[: CONFIG.embed_dim].T
    vqgan.quantize.embedding.weight.data.copy_(embedding / embedding.std())
    optimizer = torch.optim.AdamW(vqgan.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    modules = ((vqgan.encoder, vqgan.quant_conv), (vqgan.decoder, vqgan.post_quant_conv))
    # Encoder and decoder share only the codebook: each half has its own clipping.
    halves = [[p for module in half for p in module.parameters()] for half in modules]
    progress = tqdm(range(steps), desc="VQGAN", mininterval=10)
    for step in progress:
        warmup = min(1.0, (step + 1) / 100)
        optimizer.param_groups[0]["lr"] = lr * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))
        pixels, codes = world.batch(batch_size, generator)
        noise = torch.randn(pixels.shape, generator=generator) * 0.05
        noise *= torch.rand(len(pixels), 1, 1, 1, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            features = vqgan.features(pixels + noise)
            embedding = vqgan.quantize.embedding.weight
            target = F.embedding(codes, embedding).permute(0, 3, 1, 2)
            drawn = vqgan.decode_embedded(target).float()
        flat = features.float().permute(0, 2, 3, 1).reshape(-1, CONFIG.embed_dim)
        logits = -torch.cdist(flat, embedding).square()
        naming = F.cross_entropy(logits, codes.flatten())
        commitment = F.mse_loss(features.float(), target.detach())
        error = drawn - pixels
        loss = naming + 0.1 * commitment + 2 * error.abs().mean() + 4 * error.square().mean()
        optimizer.zero_grad()
        loss.backward()
        for half in halves:
            torch.nn.utils.clip_grad_norm_(half, 1.0)
        optimizer.step()
        if step % 25 == 0:
            right = (logits.argmax(1) == codes.flatten()).float().mean()
            progress.set_postfix(naming=f"{naming:.3f}", right=f"{right:.4f}", l1=f"{error.abs().mean():.4f}")
    return vqgan.eval()


def train_decoder(
    vqgan: VQGAN, world: PatchWorld, steps: int, batch_size: int, lr: float, generator: torch.Generator
) -> VQGAN:
    """The same VQGAN after further training of its decoder, on the codes of the frozen encoder."""
    vqgan.requires_grad_(False)
    decoder = [*vqgan.decoder.parameters(), *vqgan.post_quant_conv.parameters()]
    for parameter in decoder:
        parameter.requires_grad_(True)
    cells = world.scene_cells
    encoded = torch.cat([vqgan.encode(world.assemble(chunk)) for chunk in cells.split(128)])
    optimizer = torch.optim.AdamW(decoder, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    progress = tqdm(range(steps), desc="decoder", mininterval=10)
    for step in progress:
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        chosen = torch.multinomial(world.scene_weights, batch_size, replacement=True, generator=generator)
        embedded = vqgan.quantize.embedding(encoded[chosen]).permute(0, 3, 1, 2)
        with torch.autocast("cpu", torch.bfloat16):
            drawn = vqgan.decode_embedded(embedded).float()
        error = drawn - world.assemble(cells[chosen])
        loss = error.abs().mean() + 2 * error.square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder, 1.0)
        optimizer.step()
        if step % 25 == 0:
            progress.set_postfix(l1=f"{error.abs().mean():.4f}")
    return vqgan.eval()


@torch.no_grad()
def measure(vqgan: VQGAN, world: PatchWorld) -> dict[str, float]:
    """Share of scenes (seen, held out) that are read right after encode and decode, PSNR, and how local codes are."""
    figures: dict[str, float] = {}
    used = set()
    for name, scenes in (("seen", all_scenes()), ("held_out_pairs", all_scenes(held_out=True))):
        pixels = torch.stack([image_to_pixels(draw(scene)) for scene in scenes])
        codes = torch.cat([vqgan.encode(chunk) for chunk in pixels.split(128)])
        drawn = torch.cat([vqgan.decode(chunk) for chunk in codes.split(128)])
        exact = [read(pixels_to_image(one)) == scene for one, scene in zip(drawn, scenes, strict=True)]
        error = (drawn.clamp(-1, 1) - pixels).square().mean()
        figures[f"round_trip_{name}"] = float(np.mean(exact))
        figures[f"psnr_db_{name}"] = round(float(10 * torch.log10(4 / error)), 2)
        used |= set(codes.unique().tolist())
    figures["codes_used"] = len(used)
    pixels, codes = world.batch(1200, torch.Generator().manual_seed(99))
    figures["codes_kept_in_collages"] = float((vqgan.encode(pixels) == codes)[600:].float().mean())
    return figures


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--steps", type=int, default=2400, help="steps of the whole VQGAN (default: %(default)s)")
    add("--decoder_steps", type=int, default=1200, help="further steps of the decoder alone (default: %(default)s)")
    add("--batch_size", type=int, default=32, help="images per step (default: %(default)s)")
    add("--lr", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of data and weights (default: %(default)s)")
    add("--init_from", type=Path, help="with --steps 0: folder of the VQGAN whose decoder is trained")
    add("--out_dir", type=Path, default=Path("exps/tiny/vqgan"), help="folder to write to (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if min(args.steps, args.decoder_steps) < 0 or bool(args.steps) == bool(args.init_from):
        parser.error("give --steps above 0 for a new VQGAN, or --steps 0 with --init_from; no steps below 0")
    try:
        start = load_vqgan(args.init_from) if args.init_from else None
    except (ValueError, OSError) as error:
        parser.error(str(error))
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    world = PatchWorld(all_scenes(), generator)
    print(f"{len(world.patches)} distinct patches, {len(world.codes.unique())} of {NUM_CODES} codes in use", flush=True)
    vqgan = start or train(world, args.steps, args.batch_size, args.lr, generator)
    if args.decoder_steps:
        vqgan = train_decoder(vqgan, world, args.decoder_steps, args.batch_size, args.lr, generator)
    save_vqgan(vqgan, args.out_dir)
    figures = json.dumps(measure(load_vqgan(args.out_dir), world), indent=2)
    (args.out_dir / "figures.json").write_text(figures + "\n")
    print(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
