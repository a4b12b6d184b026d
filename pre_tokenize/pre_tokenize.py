r"""One pre-tokenizing worker: its share of the raw JSON to token files, a sub-record and a list of refused items.

    for i in {0..7}; do
      python -u pre_tokenize/pre_tokenize.py --splits=8 --rank=$i --in_filename in.json --out_dir out \
        --target_size 768 &
    done
    wait

Then `concat_record.py` merges the sub-records. Started again, a worker goes on where it was. Exit codes: 0 all is done,
1 broke down, 2 could not start, 3 done but more than --max_failures items were refused, 143 ended early by SIGTERM (130
by Ctrl-C).
"""

import argparse
import hashlib
import inspect
import os
import re
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from data import item_processor  # noqa: E402
from data.conversation import Conversation, FormatError  # noqa: E402
from data.hub import find_vqgan  # noqa: E402
from data.image_transform import crop_sizes  # noqa: E402
from data.item_processor import PreparedItem, build_text_encode, hash_tokenizer, load_text_tokenizer  # noqa: E402
from data.json_stream import iter_json_values  # noqa: E402
from data.manifest import SHIPPED_PROCESSOR, Manifest, settle_manifest  # noqa: E402
from data.messages import MAX_REASON, one_line  # noqa: E402
from data.vocab import CODE_PIXELS, GRID_PIXELS, ChameleonVocab  # noqa: E402
from data.worker_log import RetriedLog, WorkerLog, read_failed  # noqa: E402
from pre_tokenize import options as command_line  # noqa: E402
from pre_tokenize.loading import Refused, check_can_be_sent, prepare_windows  # noqa: E402
from pre_tokenize.options import Options  # noqa: E402
from pre_tokenize.progress import Progress  # noqa: E402
from pre_tokenize.termination import EXIT_CODE as EXIT_CODE_TERMINATED  # noqa: E402
from pre_tokenize.termination import Termination  # noqa: E402

if TYPE_CHECKING:  # torch is imported by `build_worker` only: processes that load images import this module, too
    from model.vqgan import VQGAN
    from pre_tokenize.image_encoder import ImageEncoder

BATCHES_PER_WINDOW = 8  # a window is what is prepared, encoded and written at once
# Of the class below as it is shipped: the manifest tells an edited one apart, but not the shipped ones of two versions.
SHIPPED_PROCESSOR_SHA256 = "c0a774d2451b8a0c0d00e6bd28e78f050bd302bc174dc5d02044674613127905"


class ItemProcessor(item_processor.ItemProcessor):
    def process_item(self, raw_item: dict, item_id: int) -> Conversation:
        """THE PLACE TO ADAPT ANOTHER FORMAT: turn `raw_item` into the standard one, with `conversations` and `image`.

        TRAIN.md has worked examples. Raise ItemError(reason) to refuse an item.
        """
        item = raw_item
        return super().process_item(item, item_id)


@dataclass(frozen=True)
class Worker:
    """All that `run` needs, checked and loaded."""

    options: Options
    processor: ItemProcessor
    encoder: "ImageEncoder"
    first_id: int  # this worker has the items first_id..stop_id-1 of the input
    stop_id: int
    log: WorkerLog

    @property
    def name(self) -> str:
        return f"rank {self.options.rank} of {self.options.splits}"

    @property
    def window_items(self) -> int:
        return BATCHES_PER_WINDOW * self.options.batch_size

    def items(self, begin: int, stop: int) -> Iterator[tuple[int, dict]]:
        """The raw items begin..stop-1 of the input with their ids."""
        return islice(enumerate(iter_json_values(self.options.in_filename, what="input")), begin, stop)

    def windows(self, items: Iterable[tuple[int, dict]]) -> Iterator[list]:
        options = self.options
        return prepare_windows(items, self.processor, self.window_items, options.num_workers, options.max_seq_len)


def build_parser() -> argparse.ArgumentParser:
    return command_line.build_parser(__doc__)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        worker = build_worker(command_line.parse_options(args))
    except (ValueError, OSError) as error:
        print(f"pre_tokenize.py: {error}", file=sys.stderr)
        return 2
    try:
        with worker.log, Termination() as termination:
            is_done = (not worker.options.retry_failed or retry(worker, termination)) and run(worker, termination)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenExecutor:
        print(
            "pre_tokenize.py: a process that loads images was killed, perhaps for want of memory; the same command "
            "goes on from here, with fewer --num_workers if it happens again",
            file=sys.stderr,
        )
        return 1
    except OSError as error:  # a full disk, a quota, a lost network drive
        where = error.filename or worker.options.out_dir
        print(
            f"pre_tokenize.py: {where}: {error.strerror or error}; the same command resumes from here", file=sys.stderr
        )
        return 1
    if worker.log.num_refused:
        print(f"{worker.name}: {describe_refused(worker.log)}")
    if not is_done:
        num_done, total = worker.log.next_id - worker.first_id, worker.stop_id - worker.first_id
        print(
            f"{worker.name}: ended by SIGTERM with {num_done:,} of {total:,} items done; "
            "the same command goes on from here",
            file=sys.stderr,
        )
        return EXIT_CODE_TERMINATED
    return 3 if worker.log.num_refused > worker.options.max_failures else 0


def build_worker(options: Options) -> Worker:
    """Check the input, load the tokenizers, then settle the manifest and open the log: written only if all is well."""
    from model.vqgan import hash_vqgan, load_vqgan
    from pre_tokenize.image_encoder import ImageEncoder

    tokenizer = load_text_tokenizer(options.tokenizer)
    vocab = ChameleonVocab.from_tokenizer(tokenizer)
    image_dirs = (options.image_root, options.in_filename.parent, Path())
    processor = ItemProcessor(
        text_encode=build_text_encode(tokenizer),
        vocab=vocab,
        target_size=options.target_size,
        crop=options.crop,
        seed=options.seed,
        image_dirs=[folder for folder in image_dirs if folder is not None],
    )
    _check_target_size(vocab, options)
    num_items = check_input(options.in_filename, processor)
    vqgan_dir = find_vqgan(options.vqgan_dir)
    vqgan = load_vqgan(vqgan_dir, device=options.device)
    _check_vqgan(vqgan, vocab, options)
    manifest = Manifest(
        tokenizer_sha256=hash_tokenizer(tokenizer),
        vqgan_sha256=hash_vqgan(vqgan_dir),
        vocab_size=vocab.vocab_size,
        target_size=options.target_size,
        crop=options.crop,
        seed=options.seed if options.crop == "random" else None,
        splits=options.splits,
        num_items=num_items,
        input_sha256=_hash_file(options.in_filename),
        max_seq_len=options.max_seq_len,
        codebook_sha256=vqgan.codebook_sha256,
        item_processor=_describe_processor(),
    )
    encoder = processor.image_encode = ImageEncoder(vqgan, options.precision, options.batch_size, options.compile)
    if options.num_workers:
        check_can_be_sent(processor)
    if options.device == "cpu":
        _prepare_cpu(options)
    options.out_dir.mkdir(parents=True, exist_ok=True)
    first_id, stop_id = (num_items * part // options.splits for part in (options.rank, options.rank + 1))
    with settle_manifest(options.out_dir, manifest, options.overwrite):
        log = WorkerLog(options.out_dir, options.rank, options.splits, first_id, stop_id)
    log.recover()
    return Worker(options, processor, encoder, first_id, stop_id, log)


def check_input(path: Path, processor: ItemProcessor) -> int:
    """Read the whole input once and return the number of its items.

    Raises ValueError for wrong JSON, an empty input, and items that are not of the format at all. Items that are
    refused for other reasons are left to `run`.
    """
    count = num_wrong = 0
    first_wrong = ""
    for item_id, raw in enumerate(iter_json_values(path, what="input")):
        count += 1
        try:
            processor.process_item(raw, item_id)
        except FormatError as error:
            first_wrong = first_wrong or f"item {item_id}: {one_line(error, MAX_REASON)}"
            num_wrong += 1
        except Exception:  # refused by `run`, where it is written down with its reason
            continue
    if num_wrong:
        raise ValueError(
            f"input {path}: {num_wrong} of {count} items are not of the input format, first {first_wrong}; "
            "TRAIN.md describes the format and how to adapt another (process_item in this script)"
        )
    if not count:
        raise ValueError(f"input {path} holds no items")
    return count


def run(worker: Worker, termination: Termination) -> bool:
    """Tokenize the items of this worker that are not done yet, window by window. False if it was asked to end early."""
    log = worker.log
    total = worker.stop_id - worker.first_id
    if log.next_id == worker.stop_id:
        print(f"{worker.name}: nothing to do, all {total:,} items are done already ({_totals(log)})")
        return True
    # A window that was interrupted is done again as a whole, so that the same images are encoded together.
    begin = worker.first_id + (log.next_id - worker.first_id) // worker.window_items * worker.window_items
    progress = Progress(worker.name, total, log.next_id - worker.first_id, position=worker.options.rank)
    with closing(worker.windows(worker.items(begin, worker.stop_id))) as windows:
        for window, codes in encode_windows(worker.encoder, windows):
            write_window(worker, log, window, codes, {item.id for item in window if item.id >= log.next_id})
            progress.update(log.next_id - worker.first_id, len(codes), log.num_refused)
            if termination.is_asked:
                break
    progress.close()
    if log.next_id < worker.stop_id:
        return False
    print(f"{worker.name}: {total:,} items done ({_totals(log)})")
    return True


def retry(worker: Worker, termination: Termination) -> bool:
    """Try the items once more that were refused. False if it was asked to end early.

    Where one of them can be used now, all items of its window are encoded anew and written again, because with it
    other images are encoded together: afterwards all files are those of a run in which it could be used from the start.
    """
    log = worker.log
    refused = {item_id for item_id, _ in read_failed(log.failed_path)}
    if not refused:
        print(f"{worker.name}: no refused item to try again")
        return True
    wanted = {(item_id - worker.first_id) // worker.window_items for item_id in refused}
    items = worker.items(worker.first_id, worker.stop_id)
    again = (item for item in items if (item[0] - worker.first_id) // worker.window_items in wanted)
    with closing(worker.windows(again)) as windows, log.open_retried() as retried:
        while not termination.is_asked and (window := next(windows, None)):
            is_good_now = any(item.id in refused and isinstance(item, PreparedItem) for item in window)
            if not is_good_now:
                window = [item for item in window if item.id in refused]
            # An item that has tokens keeps them, even if its image is gone now.
            usable = (item for item in window if item.id in refused or isinstance(item, PreparedItem))
            codes = worker.encoder(images_of(window))
            write_window(worker, retried, window, codes, {item.id for item in usable if item.id < log.next_id})
    log.merge_retried()
    print(f"{worker.name}: of {len(refused):,} refused items {len(refused) - log.num_refused:,} could be used now")
    return not termination.is_asked


def encode_windows(
    encoder: "ImageEncoder", windows: Iterable[list[PreparedItem | Refused]]
) -> Iterator[tuple[list[PreparedItem | Refused], list[np.ndarray]]]:
    """Each window with the codes of its images. On CUDA the next is encoded while the caller writes the current."""
    num_ahead = 1 if encoder.device.type == "cuda" else 0
    pending: deque[tuple[list, Callable[[], list[np.ndarray]]]] = deque()
    for window in windows:
        pending.append((window, encoder.begin(images_of(window))))
        if len(pending) > num_ahead:
            window, collect = pending.popleft()
            yield window, collect()
    for window, collect in pending:
        yield window, collect()


def images_of(window: list[PreparedItem | Refused]) -> list[Image.Image]:
    return [image for item in window if isinstance(item, PreparedItem) for image in item.images]


def write_window(
    worker: Worker,
    log: WorkerLog | RetriedLog,
    window: list[PreparedItem | Refused],
    codes: list[np.ndarray],
    ids: set[int],
) -> None:
    """Write those items of a window that have these ids. `codes` are those of all its images, in order."""
    remaining = iter(codes)
    for item in window:
        item_codes = list(islice(remaining, len(item.images))) if isinstance(item, PreparedItem) else []
        if item.id in ids:
            write_item(log, worker.processor, item, item_codes)
    log.flush()


def write_item(
    log: WorkerLog | RetriedLog, processor: ItemProcessor, item: PreparedItem | Refused, codes: list
) -> None:
    if isinstance(item, Refused):
        log.add_refusal(item.id, item.reason)
    else:
        done = processor.finish(item, codes)
        image_len = processor.trailing_image_len(done["token"], done["label"])
        log.add_item(done["token"], done["label"], item.id, image_len)


def describe_refused(log: WorkerLog) -> str:
    """The commonest reason, how many items have it, and how to begin again. Reasons are alike but for paths, numbers
    and values."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for _, reason in read_failed(log.failed_path):
        rule = re.sub(r"\S*[\d/.]\S*", "", reason.partition(", got ")[0])
        counts[rule] += 1
        examples.setdefault(rule, reason)
    rule, count = counts.most_common(1)[0]
    return (
        f"{count:,} of {log.num_refused:,} rejected items have one reason: {examples[rule]}. To begin again: "
        "--retry_failed if only images were missing or damaged, --overwrite after a change of the input or process_item"
    )


def _describe_processor() -> str:
    digest = hashlib.sha256(inspect.getsource(ItemProcessor).encode()).hexdigest()
    return SHIPPED_PROCESSOR if digest == SHIPPED_PROCESSOR_SHA256 else digest


def _prepare_cpu(options: Options) -> None:
    import torch

    from model.cpu_memory import keep_freed_memory

    keep_freed_memory()
    if "OMP_NUM_THREADS" not in os.environ:  # workers that each take all cores slow each other down many times over
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.splits))


def _check_target_size(vocab: ChameleonVocab, options: Options) -> None:
    longest = max(max(size) for size in crop_sizes(options.target_size))
    if longest // GRID_PIXELS not in vocab.grid_size_ids:
        raise ValueError(
            f"--target_size {options.target_size}: its crops have sides of up to {longest} pixels, but --tokenizer "
            f"{options.tokenizer} has size tokens up to {max(vocab.grid_size_ids) * GRID_PIXELS}; give a smaller one"
        )


def _check_vqgan(vqgan: "VQGAN", vocab: ChameleonVocab, options: Options) -> None:
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
    refused = f", {log.num_refused:,} refused, see {log.failed_path}" if log.num_refused else ", none refused"
    return f"{log.num_good:,} tokenized{refused}"


def _hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
