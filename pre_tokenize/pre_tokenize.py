r"""One pre-tokenizing worker: its share of the input to token files, a sub-record and a list of rejected items.

    for i in {0..7}; do
      CUDA_VISIBLE_DEVICES=$i python -u pre_tokenize/pre_tokenize.py --splits=8 --rank=$i \
        --in_filename in.json --out_dir out --target_size 768 &
    done
    wait

Then `concat_record.py` merges the sub-records. A worker that is started again resumes. Exit codes: 0 all is done,
1 broke down, 2 could not start, 3 done but more than --max_failures items were rejected, 143 ended early by SIGTERM
(130 by Ctrl-C).
"""

import argparse
import hashlib
import inspect
import os
import re
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402

from data.formats.containers import Source, open_source  # noqa: E402
from data.formats.manifest import SHIPPED_PROCESSOR, Manifest  # noqa: E402
from data.hub import find_vqgan  # noqa: E402
from data.items import item_processor  # noqa: E402
from data.items.conversation import Conversation, FormatError, ItemError  # noqa: E402
from data.items.image_transform import crop_sizes  # noqa: E402
from data.items.item_processor import build_text_encode, hash_tokenizer, load_text_tokenizer  # noqa: E402
from data.items.rows import describe_row  # noqa: E402
from data.items.vocab import CODE_PIXELS, GRID_PIXELS, ChameleonVocab  # noqa: E402
from data.messages import MAX_REASON, one_line  # noqa: E402
from pre_tokenize import options as command_line  # noqa: E402
from pre_tokenize.loading import Loaders, Rejected, Window  # noqa: E402
from pre_tokenize.options import Options, default_window_items  # noqa: E402
from pre_tokenize.out_folder import settle_manifest  # noqa: E402
from pre_tokenize.progress import Progress  # noqa: E402
from pre_tokenize.worker_log import WorkerLog, read_failed  # noqa: E402

# They import torch, which the loaders need not: `load_encoder` imports them once those have started.
if TYPE_CHECKING:
    from model.vqgan.image_encoder import ImageEncoder
    from model.vqgan.vqgan import VQGAN

# Rows at the start of a share whose form is checked, where a share can be read alone.
CHECKED_ROWS = 1000
# SHA-256 of the class below as it is shipped. The manifest names the shipped one so, whatever the version.
SHIPPED_PROCESSOR_SHA256 = "0411cb4b0df2f4f2422695032c9741965c9ac3f6dc8fb31ba7daf8b49216825a"


class ItemProcessor(item_processor.ItemProcessor):
    def process_item(self, raw_item: dict, item_id: int) -> Conversation:
        """THE PLACE TO ADAPT ANOTHER FORMAT: turn `raw_item` into the standard one, with `conversations` and `image`.

        TRAIN.md has worked examples. Raise ItemError(reason) to reject an item.
        """
        item = raw_item
        return super().process_item(item, item_id)


@dataclass(frozen=True)
class Worker:
    """All that `run` needs, checked and loaded."""

    options: Options
    processor: ItemProcessor
    loaders: Loaders
    encoder: "ImageEncoder"
    source: Source
    log: WorkerLog

    @property
    def name(self) -> str:
        return f"rank {self.options.rank} of {self.options.splits}"

    def window_begin(self, item_id: int) -> int:
        """The first item of the window of an item."""
        return item_id - (item_id - self.log.first_id) % self.loaders.window_items


def build_parser() -> argparse.ArgumentParser:
    return command_line.build_parser(__doc__)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        worker = build_worker(command_line.parse_options(args))
    except (ValueError, OSError) as error:
        print(f"pre_tokenize.py: {error}", file=sys.stderr)
        return 2
    options, log = worker.options, worker.log
    try:
        with worker.loaders, log, noted_sigterm() as sigterm:
            if options.retry_failed:
                cut_to_first_rejected(worker)
            run(worker, sigterm)
    except KeyboardInterrupt:
        return _end_early(130, "interrupted", options)
    except BrokenExecutor:
        reason = "a process that loads images was killed; if memory was short, give fewer --num_workers"
        return _end_early(1, reason, options)
    # A full disk, a quota, a lost network drive.
    except OSError as error:
        return _end_early(1, f"{error.filename or options.out_dir}: {error.strerror or error}", options)
    if again := worker.encoder.num_encoded_again:
        print(f"{worker.name}: {again:,} batches of images overflowed in fp16 and were encoded again in tf32")
    if log.num_rejected:
        print(f"{worker.name}: {describe_rejected(log)}")
    if log.next_id < log.stop_id:
        num_done, total = log.next_id - log.first_id, log.stop_id - log.first_id
        reason = f"{worker.name} ended by SIGTERM with {num_done:,} of {total:,} items done"
        return _end_early(128 + signal.SIGTERM, reason, options)
    return 3 if log.num_rejected > options.max_failures else 0


def build_worker(options: Options) -> Worker:
    """Load the tokenizers, check the input, then settle the manifest and open the log: written only if all is well."""
    tokenizer = load_text_tokenizer(options.tokenizer)
    vocab = ChameleonVocab.from_tokenizer(tokenizer)
    image_dirs = (options.image_root, options.files.folder, Path())
    processor = ItemProcessor(
        text_encode=build_text_encode(tokenizer),
        vocab=vocab,
        target_size=options.target_size,
        crop=options.crop,
        seed=options.seed,
        image_dirs=[folder for folder in image_dirs if folder is not None],
        confine_images=options.confine_images,
        allow_urls=options.allow_urls,
        pairs=options.pairs,
    )
    window_items = default_window_items(options.target_size, options.device, options.batch_size)
    windows_ahead = 2 if options.device == "cuda" else 1
    loaders = Loaders(processor, options.num_workers, window_items, windows_ahead, options.max_seq_len)
    with ExitStack() as on_error:
        on_error.enter_context(loaders)
        encoder, vqgan_fields = load_encoder(options, vocab, loaders)
        source = open_source(options.files, options.out_dir)
        num_items, form = check_input(source, processor, options)
        manifest = Manifest(
            tokenizer_sha256=hash_tokenizer(tokenizer),
            vocab_size=vocab.vocab_size,
            target_size=options.target_size,
            crop=options.crop,
            seed=options.seed if options.crop == "random" else None,
            splits=options.splits,
            num_items=num_items,
            input_sha256=options.files.sha256(),
            max_seq_len=options.max_seq_len,
            item_processor=_describe_processor(),
            pairs=options.pairs and str(options.pairs),
            **vqgan_fields,
        )
        options.out_dir.mkdir(parents=True, exist_ok=True)
        first_id, stop_id = (num_items * part // options.splits for part in (options.rank, options.rank + 1))
        with settle_manifest(options.out_dir, manifest, options.overwrite):
            log = WorkerLog(options.out_dir, options.rank, options.splits, first_id, stop_id)
        log.recover()
        on_error.pop_all()
    worker = Worker(options, processor, loaders, encoder, source, log)
    if form:
        print(f"{worker.name}: rows of {options.in_filename} are read as {form}")
    return worker


def load_encoder(
    options: Options, vocab: ChameleonVocab, loaders: Loaders
) -> tuple["ImageEncoder", dict[str, str | None]]:
    """The encoder, and the fields of the manifest that name its VQGAN and precision.

    Raises ValueError if the tokenizer lacks tokens for it, or if it cannot run here.
    """
    from model.vqgan.image_encoder import ImageEncoder
    from model.vqgan.vqgan import hash_vqgan, load_vqgan

    vqgan_dir = find_vqgan(options.vqgan_dir)
    vqgan = load_vqgan(vqgan_dir, device=options.device)
    _check_fit(vqgan, vocab, options)
    if options.device == "cpu":
        _prepare_cpu(options)
    elif options.num_workers:
        loaders.pin_memory()
    precision = command_line.choose_precision(options)
    encoder = ImageEncoder(vqgan, precision, compile=options.compile)
    default = command_line.default_batch_size(options.target_size, options.device, encoder.fused is not None)
    encoder.batch_size = options.batch_size or default
    hashes = {"vqgan_sha256": hash_vqgan(vqgan_dir), "codebook_sha256": vqgan.codebook_sha256}
    return encoder, hashes | {"precision": precision}


def check_input(source: Source, processor: ItemProcessor, options: Options) -> tuple[int, str]:
    """The number of rows, and their form for people ("": the recipe's).

    All rows of JSON are checked, of other sources the first of this worker's share.
    Raises ValueError for wrong JSON, an empty input, and rows that are not of the format at all: of a tar, where a
    member may be lacking, if no row is. Rows that are rejected for other reasons are left to `run`.
    """
    first, stop = 0, None
    if source.num_rows is not None:
        first, stop = (source.num_rows * part // options.splits for part in (options.rank, options.rank + 1))
        stop = min(stop, first + CHECKED_ROWS)
    count = num_good = num_wrong = 0
    first_wrong, form = "", None
    for item_id, raw in enumerate(source.read(first, stop), first):
        count += 1
        if isinstance(raw, ItemError):
            continue
        form = describe_row(raw, processor.pairs) if form is None else form
        try:
            processor.process_item(raw, item_id)
        except FormatError as error:
            first_wrong = first_wrong or f"item {item_id}: {one_line(error, MAX_REASON)}"
            num_wrong += 1
            continue
        # `run` rejects this item and writes down the reason.
        except Exception:
            pass
        num_good += 1
    if num_wrong and not (num_good and options.files.format == "tar"):
        raise ValueError(
            f"input {options.in_filename}: {num_wrong} of {count} items are not of the input format, first "
            f"{first_wrong}; TRAIN.md describes the formats and how to adapt another (process_item in this script)"
        )
    num_rows = count if source.num_rows is None else source.num_rows
    if not num_rows:
        raise ValueError(f"input {options.in_filename} holds no items")
    return num_rows, form or ""


@contextmanager
def noted_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets. A batch system sends it before it kills, and the window in hand can be finished."""
    event = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


def cut_to_first_rejected(worker: Worker) -> None:
    """Take back what was done from the window of the first rejected item on, so that `run` does it again.

    An item that can be used now changes which images are encoded together. So the files become those of a run in
    which the item could be used from the start.
    """
    first_id, _ = next(read_failed(worker.log.failed_path), (None, ""))
    if first_id is None:
        print(f"{worker.name}: no rejected item to try again")
    else:
        worker.log.recover(stop_id=worker.window_begin(first_id))


def run(worker: Worker, sigterm: threading.Event) -> None:
    """Tokenize the items of this worker that are not done yet, window by window, until SIGTERM."""
    options, log = worker.options, worker.log
    total = log.stop_id - log.first_id
    if log.next_id == log.stop_id:
        print(f"{worker.name}: nothing to do, all {total:,} items are done already ({_totals(log)})")
        return
    # A window that was interrupted is encoded as a whole, so that the same images are encoded together.
    begin = worker.window_begin(log.next_id)
    items = enumerate(worker.source.read(begin, log.stop_id), begin)
    windows, encoding, num_images = worker.loaders.windows(items), Stopwatch(), 0
    with (
        Progress(worker.name, total, log.next_id - log.first_id, position=options.rank) as progress,
        closing(windows),
    ):
        for window, codes in encode_windows(worker.encoder, windows, encoding):
            write_window(worker, window, codes)
            num_images += len(codes)
            num_done = log.next_id - log.first_id
            progress.show(num_done, log.num_rejected, num_images, worker.loaders.busy_s, encoding.total_s)
            if sigterm.is_set():
                break
    if log.next_id == log.stop_id:
        print(f"{worker.name}: {total:,} items done ({_totals(log)})")


class Stopwatch:
    """The seconds spent in its `with` blocks."""

    total_s = 0.0

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.total_s += time.perf_counter() - self.began


def encode_windows(
    encoder: "ImageEncoder", windows: Iterable[Window], encoding: Stopwatch
) -> Iterator[tuple[Window, list[np.ndarray]]]:
    """Each window with the codes of its images. On CUDA the next is encoded while the caller writes the current."""
    num_ahead = 1 if encoder.device.type == "cuda" else 0
    pending: deque[tuple[Window, Callable[[], list[np.ndarray]]]] = deque()

    def fetch() -> tuple[Window, list[np.ndarray]]:
        window, collect = pending.popleft()
        with encoding:
            return window, collect()

    for window in windows:
        with encoding:
            pending.append((window, encoder.begin([image for item in window for image in item.images])))
        if len(pending) > num_ahead:
            yield fetch()
    while pending:
        yield fetch()


def write_window(worker: Worker, window: Window, codes: list[np.ndarray]) -> None:
    """Write those items of a window that are not done yet. `codes` are those of all its images, in order."""
    log, remaining = worker.log, iter(codes)
    for item in window:
        item_codes = list(islice(remaining, len(item.images)))
        if item.id < log.next_id:
            continue
        if isinstance(item, Rejected):
            log.add_rejected(item.id, item.reason)
        else:
            done = worker.processor.finish(item, item_codes)
            image_len = worker.processor.trailing_image_len(done["token"], done["label"])
            log.add_item(done["token"], done["label"], item.id, image_len)
    log.flush()


def describe_rejected(log: WorkerLog) -> str:
    """The commonest reason, how many items have it, and how to begin again.

    Reasons that differ only in paths, numbers and values are counted as one.
    """
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for _, reason in read_failed(log.failed_path):
        rule = re.sub(r"\S*[\d/.]\S*", "", reason.partition(", got ")[0])
        counts[rule] += 1
        examples.setdefault(rule, reason)
    rule, count = counts.most_common(1)[0]
    return (
        f"{count:,} of {log.num_rejected:,} rejected items have one reason: {examples[rule]}. To begin again: "
        "--retry_failed if only images were missing or damaged, --overwrite after a change of the input or process_item"
    )


def _end_early(exit_code: int, reason: str, options: Options) -> int:
    # With the flag, the items that are still rejected would be tried once more.
    command = "the same command without --retry_failed" if options.retry_failed else "the same command"
    print(f"pre_tokenize.py: {reason}; {command} resumes from here", file=sys.stderr)
    return exit_code


def _describe_processor() -> str:
    digest = hashlib.sha256(inspect.getsource(ItemProcessor).encode()).hexdigest()
    return SHIPPED_PROCESSOR if digest == SHIPPED_PROCESSOR_SHA256 else digest


def _prepare_cpu(options: Options) -> None:
    import torch

    from model.training.cpu_memory import keep_freed_memory

    keep_freed_memory()
    # Workers that each take all cores slow each other down many times over.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.splits))


def _check_fit(vqgan: "VQGAN", vocab: ChameleonVocab, options: Options) -> None:
    """Raises ValueError if the tokenizer lacks tokens for codes or sizes of images."""
    longest = max(max(size) for size in crop_sizes(options.target_size))
    if longest // GRID_PIXELS not in vocab.grid_size_ids:
        raise ValueError(
            f"--target_size {options.target_size}: its crops have sides of up to {longest} pixels, but --tokenizer "
            f"{options.tokenizer} has size tokens up to {max(vocab.grid_size_ids) * GRID_PIXELS}; give a smaller one"
        )
    if vqgan.downsample != CODE_PIXELS:
        raise ValueError(
            f"--vqgan_dir {options.vqgan_dir}: its codes cover {vqgan.downsample} pixels, not {CODE_PIXELS}"
        )
    if vqgan.num_codes > vocab.num_codes:
        raise ValueError(
            f"--vqgan_dir {options.vqgan_dir} has {vqgan.num_codes} codes, but --tokenizer {options.tokenizer} has "
            f"tokens for {vocab.num_codes}; they do not belong together"
        )


def _totals(log: WorkerLog) -> str:
    rejected = f"{log.num_rejected:,} rejected, see {log.failed_path}" if log.num_rejected else "none rejected"
    return f"{log.num_good:,} tokenized, {rejected}"


if __name__ == "__main__":
    sys.exit(main())
