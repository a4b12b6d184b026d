"""A made-up dataset for exps/bench/data.py: any number of items over few real token files, so that it fits a disk.

There is one token file for each length, in one folder; `files/0`, `files/1`, ... are links to it. Items have lengths
drawn evenly from a seed, and each lies under a path of its own, or nearly so, that opens and holds as many tokens.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.index_file import IndexWriter
from data.record import RecordEntry, write_merged
from data.record_index import index_key
from data.token_file import save_token_file, write_shard
from data.vocab import IGNORE_INDEX

VOCAB_SIZE = 65536  # Chameleon's
ITEMS_PER_FOLDER = 1000
ITEMS_PER_SHARD = 100_000
SHARD_NAME, PLACES_NAME = "items.pkls", "places.npy"


@dataclass(frozen=True)
class Pool:
    """A folder with a token file `{n}.pkl` for each length n from `min_len` to `max_len`, and all of them in a shard.

    `folder` is absolute.
    """

    folder: str
    min_len: int
    max_len: int

    def places(self) -> np.ndarray:
        """Offset and nbytes in the shard of the item of each length, int64 [2, max_len - min_len + 1]."""
        return np.load(Path(self.folder) / PLACES_NAME)


def write_pool(folder: Path, min_len: int, max_len: int) -> Pool:
    """Random tokens; the first half of an item has no targets."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lens = range(min_len, max_len + 1)
    for length in lens:
        token = rng.integers(0, VOCAB_SIZE, length).tolist()
        save_token_file(folder / f"{length}.pkl", token, [IGNORE_INDEX] * (length // 2) + token[length // 2 :], length)
    places = write_shard(folder / SHARD_NAME, ((folder / f"{length}.pkl").read_bytes() for length in lens))
    np.save(folder / PLACES_NAME, np.array(places).T)
    return Pool(os.fspath(folder.absolute()), min_len, max_len)


def draw_lengths(pool: Pool, num_items: int) -> Iterator[np.ndarray]:
    """Lengths in tokens int64 of all items, `ITEMS_PER_SHARD` at a time."""
    rng = np.random.default_rng(1)
    for start in range(0, num_items, ITEMS_PER_SHARD):
        yield rng.integers(pool.min_len, pool.max_len + 1, min(ITEMS_PER_SHARD, num_items - start))


def write_record(folder: Path, pool: Pool, num_items: int) -> Path:
    """`record.json` of `num_items` items with a file each, as pre-tokenizing leaves it; returns its path."""
    _link_folders(folder, pool, -(-num_items // ITEMS_PER_FOLDER))
    lens = (length for part in draw_lengths(pool, num_items) for length in part.tolist())
    entries = (
        RecordEntry(f"files/{number // ITEMS_PER_FOLDER}/{length}.pkl", length, number)
        for number, length in enumerate(lens)
    )
    path = folder / "record.json"
    write_merged(entries, path)
    return path


def write_placeholder(folder: Path, pool: Pool, num_items: int) -> Path:
    """A record without items, for `write_index` to write the index of as if it had them; returns its path."""
    _link_folders(folder, pool, -(-num_items // ITEMS_PER_SHARD))
    path = folder / "record.json"
    path.write_text(json.dumps([]))
    return path


def write_index(record: Path, cache_dir: Path, pool: Pool, num_items: int) -> None:
    """The index of `num_items` items in shards that no record lists; `open_index(record, cache_dir)` then gives it."""
    cache_dir.mkdir()
    places = pool.places()
    key = index_key(record)
    with IndexWriter(cache_dir / key.folder_name) as writer:
        for number, lens in enumerate(draw_lengths(pool, num_items)):
            ids = number * ITEMS_PER_SHARD + np.arange(len(lens))
            shard = os.fspath(record.parent.absolute() / "files" / str(number) / SHARD_NAME)
            writer.append(lens, np.zeros(len(lens)), ids, shard, *places[:, lens - pool.min_len])
        writer.finish(key)


def _link_folders(folder: Path, pool: Pool, num_links: int) -> None:
    (folder / "files").mkdir()
    for number in range(num_links):
        (folder / "files" / str(number)).symlink_to(pool.folder, target_is_directory=True)
