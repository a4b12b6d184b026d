r"""One pre-tokenizing worker: its share of the raw JSON to token files, a sub-record and a list of refused items.

    for i in {0..7}; do
      python -u pre_tokenize/pre_tokenize.py --splits=8 --rank=$i --in_filename in.json --out_dir out \
        --target_size 768 &
    done
    wait

Then `concat_record.py` merges the sub-records. Started again, a worker goes on where it was. Exit codes: 0 all is done,
2 could not start, 3 done but more than --max_failures items were refused, 143 ended early by SIGTERM (130 by Ctrl-C).
"""

import argparse
import hashlib
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from data import item_processor  # noqa: E402
from data.conversation import Conversation, FormatError, ItemError  # noqa: E402
from data.image_transform import crop_sizes  # noqa: E402
from data.item_processor import (  # noqa: E402
    IMAGE_SLOT,
    PreparedItem,
    build_text_encode,
    hash_tokenizer,
    load_text_tokenizer,
)
from data.json_stream import iter_json_values  # noqa: E402
from data.manifest import Manifest, settle_manifest  # noqa: E402
from data.vocab import CODE_PIXELS, GRID_PIXELS, ChameleonVocab  # noqa: E402
from data.worker_log import RetriedLog, WorkerLog, read_failed  # noqa: E402
from model.vqgan import VQGAN, hash_vqgan, load_vqgan  # noqa: E402
from pre_tokenize import options as command_line  # noqa: E402
from pre_tokenize.image_encoder import ImageEncoder  # noqa: E402
from pre_tokenize.options import Options  # noqa: E402
from pre_tokenize.progress import Progress  # noqa: E402
from pre_tokenize.termination import EXIT_CODE as EXIT_CODE_TERMINATED  # noqa: E402
from pre_tokenize.termination import Termination  # noqa: E402

BATCHES_PER_WINDOW = 8  # a window is what is prepared, encoded and written at once


class ItemProcessor(item_processor.ItemProcessor):
    def process_item(self, raw_item: dict, item_id: int) -> Conversation:
        """THE PLACE TO ADAPT ANOTHER FORMAT: turn `raw_item` into the standard one, with `conversations` and `image`.

        TRAIN.md has worked examples. Raise ItemError(reason) to refuse an item.
        """
        item = raw_item
        return super().process_item(item, item_id)


@dataclass(frozen=True)
class Refused:
    """An item that cannot be used, and why."""

    id: int
    reason: str


@dataclass(frozen=True)
class Worker:
    """All that `run` needs, checked and loaded."""

    options: Options
    processor: ItemProcessor
    encoder: ImageEncoder
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
    with worker.log, Termination() as termination:
        try:
            is_done = (not worker.options.retry_failed or retry(worker, termination)) and run(worker, termination)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            return 130
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
    manifest = Manifest(
        tokenizer_sha256=hash_tokenizer(tokenizer),
        vqgan_sha256=hash_vqgan(options.vqgan_dir),
        vocab_size=vocab.vocab_size,
        target_size=options.target_size,
        crop=options.crop,
        seed=options.seed if options.crop == "random" else None,
        splits=options.splits,
        num_items=num_items,
        input_sha256=_hash_file(options.in_filename),
        max_seq_len=options.max_seq_len,
    )
    vqgan = load_vqgan(options.vqgan_dir, device=options.device)
    _check_vqgan(vqgan, vocab, options)
    encoder = processor.image_encode = ImageEncoder(vqgan, options.precision, options.batch_size)
    _share_cores(options)
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
            first_wrong = first_wrong or f"item {item_id}: {error}"
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
        while not termination.is_asked and (window := next(windows, None)):
            num_images = write_window(worker, log, window, {item.id for item in window if item.id >= log.next_id})
            progress.update(log.next_id - worker.first_id, num_images, log.num_refused)
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
            write_window(worker, retried, window, {item.id for item in usable if item.id < log.next_id})
    log.merge_retried()
    print(f"{worker.name}: of {len(refused):,} refused items {len(refused) - log.num_refused:,} could be used now")
    return not termination.is_asked


def write_window(worker: Worker, log: WorkerLog | RetriedLog, window: list, ids: set[int]) -> int:
    """Encode the images of a window together and write those of its items that have these ids. Returns the images."""
    images = [image for item in window if isinstance(item, PreparedItem) for image in item.images]
    codes = iter(worker.encoder(images))
    for item in window:
        item_codes = list(islice(codes, len(item.images))) if isinstance(item, PreparedItem) else []
        if item.id in ids:
            write_item(log, worker.processor, item, item_codes)
    log.flush()
    return len(images)


def prepare_windows(
    items: Iterable[tuple[int, dict]],
    processor: ItemProcessor,
    window_items: int,
    num_threads: int,
    max_seq_len: int | None = None,
) -> Iterator[list[PreparedItem | Refused]]:
    """Items with text encoded and images loaded, in windows; the next is prepared while the caller has the current."""
    items = iter(items)
    if not num_threads:
        while window := list(islice(items, window_items)):
            yield [prepare_item(processor, *item, max_seq_len) for item in window]
        return
    pending: deque[list[Future]] = deque()
    with ThreadPoolExecutor(num_threads) as executor:
        try:
            while window := list(islice(items, window_items)):
                pending.append([executor.submit(prepare_item, processor, *item, max_seq_len) for item in window])
                if len(pending) > 1:
                    yield [future.result() for future in pending.popleft()]
            while pending:
                yield [future.result() for future in pending.popleft()]
        finally:
            executor.shutdown(cancel_futures=True)


def prepare_item(
    processor: ItemProcessor, item_id: int, raw: dict, max_seq_len: int | None = None
) -> PreparedItem | Refused:
    """One item, or the reason why it cannot be used."""
    try:
        item = processor.prepare(processor.process_item(raw, item_id), item_id)
    except ItemError as error:
        return Refused(item_id, str(error))
    except Exception as error:  # whatever one item does, the others go on; it is counted, and its reason is kept
        return Refused(item_id, f"{type(error).__name__}: {error}")
    num_tokens = count_tokens(item, processor.vocab)
    if max_seq_len is not None and num_tokens > max_seq_len:
        return Refused(item_id, f"it needs {num_tokens} tokens, --max_seq_len is {max_seq_len}")
    return item


def count_tokens(item: PreparedItem, vocab: ChameleonVocab) -> int:
    """Length of the sequence that an item will have."""
    texts = sum(1 + sum(len(ids) for ids in turn.segments if ids is not IMAGE_SLOT) for turn in item.turns)
    return 1 + texts + sum(vocab.num_image_tokens(*image.size) for image in item.images)


def write_item(
    log: WorkerLog | RetriedLog, processor: ItemProcessor, item: PreparedItem | Refused, codes: list
) -> None:
    if isinstance(item, Refused):
        log.add_refusal(item.id, item.reason)
    else:
        done = processor.finish(item, codes)
        image_len = processor.trailing_image_len(done["token"], done["label"])
        log.add_item(done["token"], done["label"], item.id, image_len)


def _share_cores(options: Options) -> None:
    """Workers of one machine that each take all of its cores slow each other down many times over."""
    if options.device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.splits))


def _check_target_size(vocab: ChameleonVocab, options: Options) -> None:
    longest = max(max(size) for size in crop_sizes(options.target_size))
    if longest // GRID_PIXELS not in vocab.grid_size_ids:
        raise ValueError(
            f"--target_size {options.target_size}: its crops have sides of up to {longest} pixels, but --tokenizer "
            f"{options.tokenizer} has size tokens up to {max(vocab.grid_size_ids) * GRID_PIXELS}; give a smaller one"
        )


def _check_vqgan(vqgan: VQGAN, vocab: ChameleonVocab, options: Options) -> None:
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
