"""Look at what was tokenized: some items of a record with their images, and figures of all items, on one HTML page.

    python pre_tokenize/inspect_record.py out/record.json --num 20 --out page.html

Exit codes: 0 if the page is written, 2 with the reason if not.
"""

import argparse
import itertools
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data.formats.manifest import find_manifest  # noqa: E402
from data.formats.record import RecordEntry, read_record  # noqa: E402
from data.formats.token_file import TokenItem, load_token_file  # noqa: E402
from data.hub import DEFAULT_TOKENIZER, DEFAULT_VQGAN_DIR, VQGAN_HELP, find_vqgan, find_vqgan_problems  # noqa: E402
from data.items.item_processor import hash_tokenizer, load_text_tokenizer  # noqa: E402
from data.items.vocab import CODE_PIXELS, IGNORE_INDEX, ChameleonVocab  # noqa: E402
from data.messages import one_line  # noqa: E402
from model.pages.assets import write_page  # noqa: E402
from model.vqgan.vqgan import VQGAN, check_codebook, hash_vqgan, load_vqgan, pixels_to_image  # noqa: E402
from pre_tokenize.page import Part, RecordStats, ShownItem, build_page  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("record", type=Path, metavar="RECORD", help="record.json, or the sub-record of a worker")
    add("--num", type=int, default=20, help="number of items shown (default 20)")
    add("--out", type=Path, default=Path("page.html"), help="the page to write (default page.html)")
    add("--seed", type=int, default=0, help="seed of the choice of items (default 0)")
    add("--tokenizer", default=DEFAULT_TOKENIZER, help=f"folder or hub id (default {DEFAULT_TOKENIZER})")
    add("--vqgan_dir", type=Path, default=Path(DEFAULT_VQGAN_DIR), help=f"with decoder, {VQGAN_HELP}")
    add("--any_vqgan", action="store_true", help="decode also by a VQGAN that is not the record's (default: off)")
    where = "where images are decoded (default auto: CUDA if there is a GPU)"
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help=where)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        validate(args)
        args.vqgan_dir = find_vqgan(args.vqgan_dir)
        lengths, sample = survey_record(args.record, args.num, args.seed)
        tokenizer = load_text_tokenizer(args.tokenizer)
        vocab = ChameleonVocab.from_tokenizer(tokenizer)
        vqgan = load_decoder(args.vqgan_dir, vocab, args.device)
        manifest = find_manifest(args.record, sample[0].file) or {}
        if not args.any_vqgan:
            codebook = vqgan.quantize.embedding.weight
            check_codebook(codebook, args.vqgan_dir, manifest.get("codebook_sha256"), f"the record {args.record}")
        notes = compare_with_manifest(manifest, tokenizer, vqgan, args.vqgan_dir)
        stats = count_items(args.record, lengths, vocab)
        items = [show_item(entry, tokenizer, vocab, vqgan) for entry in with_progress(sample, len(sample), "decoding")]
        page = build_page(os.fspath(args.record), stats, items, notes)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_page(page, args.out)
    except (ValueError, OSError) as error:
        print(f"inspect_record.py: {error}", file=sys.stderr)
        return 2
    for note in notes:
        print(f"note: {note}")
    print(f"{args.out}: {len(items):,} of {len(lengths):,} items, {len(page) / 2**20:.1f} MiB")
    return 0


def validate(args: argparse.Namespace) -> None:
    """Raise one ValueError with every problem that can be seen without loading anything."""
    problems = []
    if not args.record.is_file():
        problems.append(f"the record {args.record} does not exist; concat_record.py writes it")
    if args.num < 1:
        problems.append(f"--num must be at least 1, got {args.num}")
    if args.out.is_dir():
        problems.append(f"--out {args.out} is a folder; name a file")
    if args.out.exists() and args.record.exists() and args.out.samefile(args.record):
        problems.append(f"--out {args.out} is the record itself; name another file")
    problems += find_vqgan_problems(args.vqgan_dir)
    if args.device == "cuda" and not torch.cuda.is_available():
        problems.append("--device cuda: no CUDA device is visible; use --device cpu")
    if problems:
        raise ValueError("\n  ".join(["cannot start:", *problems] if len(problems) > 1 else problems))


def survey_record(path: Path, num: int, seed: int) -> tuple[np.ndarray, list[RecordEntry]]:
    """Lengths in tokens, int64 [N], of all items, and `num` items (at most all), drawn evenly, in order."""
    lengths = np.fromiter((entry.len for entry in read_record(path)), np.int64)
    if not len(lengths):
        raise ValueError(f"the record {path} has no items")
    drawn = set(random.Random(seed).sample(range(len(lengths)), min(num, len(lengths))))
    return lengths, [entry for index, entry in enumerate(read_record(path)) if index in drawn]


def load_decoder(vqgan_dir: Path, vocab: ChameleonVocab, device: str) -> VQGAN:
    """The VQGAN of a folder. Raises ValueError if it has no decoder or not as many codes as the vocabulary."""
    vqgan = load_vqgan(vqgan_dir, device)
    if not vqgan.has_decoder:
        raise ValueError(f"--vqgan_dir {vqgan_dir} holds no decoder, as Hugging Face folders do not; use Meta's folder")
    if vqgan.num_codes != vocab.num_codes:
        raise ValueError(f"the VQGAN in {vqgan_dir} has {vqgan.num_codes} codes, the tokenizer {vocab.num_codes}")
    return vqgan


def compare_with_manifest(manifest: dict, tokenizer, vqgan: VQGAN, vqgan_dir: Path) -> list[str]:
    """Remarks if tokenizer or VQGAN differ from the record's manifest; what the manifest lacks is not compared."""
    remarks = []
    if manifest.get("tokenizer_sha256") not in (None, hash_tokenizer(tokenizer)):
        remarks.append("The record was made with another tokenizer than the one given here: texts may be wrong.")
    codebook, files = manifest.get("codebook_sha256"), manifest.get("vqgan_sha256")
    # The same codebook may lie in files of another format: files count only without a codebook.
    if codebook != vqgan.codebook_sha256 if codebook else files not in (None, hash_vqgan(vqgan_dir)):
        remarks.append("The record was made with other VQGAN files than those given here: images may be wrong.")
    return remarks


def count_items(path: Path, lengths: np.ndarray, vocab: ChameleonVocab) -> RecordStats:
    """Figures over the token files of all items, one in memory at a time. Raises ValueError that names a bad file."""
    code_counts = np.zeros(vocab.num_codes, dtype=np.int64)
    num_targets = num_image_tokens = 0
    size_counts: Counter[tuple[int, int]] = Counter()
    for entry in with_progress(read_record(path), len(lengths), "reading all items"):
        item, images = load_item(entry, vocab)
        num_targets += int((item.label != IGNORE_INDEX).sum())
        for (start, stop), codes in images.items():
            code_counts += np.bincount(codes.ravel(), minlength=vocab.num_codes)
            size_counts[codes.shape[1] * CODE_PIXELS, codes.shape[0] * CODE_PIXELS] += 1
            num_image_tokens += stop - start
    return RecordStats(lengths, code_counts, num_targets, num_image_tokens, size_counts)


def load_item(entry: RecordEntry, vocab: ChameleonVocab) -> tuple[TokenItem, dict[tuple[int, int], np.ndarray]]:
    """The item of an entry, and (start, stop) -> codes [h, w] of its images in order."""
    item = load_token_file(entry.file, entry.offset, entry.nbytes)
    name = f"{entry.file} (id {one_line(entry.id)})"
    if len(item.token) != entry.len:
        raise ValueError(f"{name} holds {len(item.token)} tokens, the record says {entry.len}")
    if item.token.min() < 0 or item.token.max() >= vocab.vocab_size:
        raise ValueError(
            f"{name} holds token {item.token.max()}, but the tokenizer ends at "
            f"{vocab.vocab_size - 1}; give the --tokenizer that the record was made with"
        )
    try:
        spans = vocab.find_images(item.token)
        return item, {span: vocab.tokens_to_codes(item.token[slice(*span)]) for span in spans}
    except ValueError as error:
        raise ValueError(f"{name}: {error}; is --tokenizer the tokenizer of the record?") from None


def show_item(entry: RecordEntry, tokenizer, vocab: ChameleonVocab, vqgan: VQGAN) -> ShownItem:
    """Texts and images of an item, decoded from its tokens."""
    item, images = load_item(entry, vocab)
    is_target = item.label != IGNORE_INDEX
    parts, turn = [], 0
    for kind, start, stop in split_parts(item.token, is_target, list(images), vocab):
        if kind != "control" and start and item.token[start - 1] == vocab.end_of_turn_id:
            turn += 1
        text, image = "", None
        if kind == "image":
            image = pixels_to_image(vqgan.decode(torch.from_numpy(images[start, stop])[None])[0])
        else:
            ids = item.token[start:stop].tolist()
            text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        parts.append(Part(kind, start, stop, turn, int(is_target[start:stop].sum()), text, image))
    num_wrong = int((item.label[is_target] != item.token[is_target]).sum())
    return ShownItem(entry.id, entry.file, parts, is_target, num_wrong)


def split_parts(
    token: np.ndarray, is_target: np.ndarray, spans: Sequence[tuple[int, int]], vocab: ChameleonVocab
) -> Iterator[tuple[str, int, int]]:
    """(kind, start, stop) of the stretches of a sequence, in order and without gaps.

    Kinds: `image`, a span; `control`, one token; `text`, as many tokens as follow each other with one label mask.
    """
    controls = (vocab.bos_id, vocab.pad_id, vocab.eos_id, vocab.end_of_turn_id)
    is_control = np.isin(token, [token_id for token_id in controls if token_id is not None])
    is_cut = is_control[1:] | is_control[:-1] | (is_target[1:] != is_target[:-1])
    is_cut = np.concatenate([[True], is_cut, [True]])
    for start, stop in spans:
        is_cut[start + 1 : stop] = False
        is_cut[[start, stop]] = True
    for start, stop in itertools.pairwise(np.flatnonzero(is_cut).tolist()):
        yield "image" if (start, stop) in spans else "control" if is_control[start] else "text", start, stop


def with_progress(values, total: int, name: str) -> Iterator:
    """The values, with a bar from the second second on, on a terminal; every 10 s in a log."""
    return tqdm(values, name, total, unit="item", delay=1, mininterval=0.1 if sys.stderr.isatty() else 10)


if __name__ == "__main__":
    sys.exit(main())
