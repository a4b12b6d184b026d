"""Tokenized items as a training run sees them: the items of all record files, read lazily by their number.

Stands between `data/record_index.py` / `data/token_file.py` (what lies on disk) and the rows of a rank:

    TokenDataset -> PlanCache (data/plan_cache.py) -> EpochRows(rank) -> build_loader(start_step) (data/rows.py) -> rows
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from data.data_config import DataSource
from data.manifest import find_manifest
from data.packing import ItemTable
from data.record_index import RecordIndex, node_cache_dir, open_index
from data.token_file import ItemReadError, TokenItem, load_token_file

OVERLONG_CHOICES = ("error", "drop", "truncate")


class TokenDataset:
    """All items of the data config, in its order, read by index.

    `table` says what a plan must know of them (tokens never above `max_seq_len`), `num_overlong` how many were dropped
    or cut, `fingerprint` (hexadecimal) changes with anything that decides a plan, `types` are those of the data config.
    `manifests` are the path of each record and the fields of its manifest (None: it has none).

    `overlong` says what happens to items above `max_seq_len`: "error", "drop" or "truncate" (cuts the end off, which
    may leave half an image). The index of a record is made in `cache_dir`, or found there.

    Raises one ValueError with all that is wrong: overlong items, nothing left, empty, broken or missing records.
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        max_seq_len: int,
        overlong: str = "error",
        cache_dir: Path | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        if overlong not in OVERLONG_CHOICES:
            raise ValueError(f"overlong must be one of {', '.join(OVERLONG_CHOICES)}, got {overlong!r}")
        self.max_seq_len = max_seq_len
        self.cache_dir = cache_dir or node_cache_dir()
        self.num_ids: int | None = None
        self.begin_image_id: int | None = None
        self._indices = _open_indices(sources, self.cache_dir, say)
        self._kept = [self._fit(index, overlong) for index in self._indices]
        self._refuse_overlong(overlong)
        sizes = [index.num_items if kept is None else len(kept) for index, kept in self._parts()]
        if not sum(sizes):
            shortest = min(int(index.lens.min()) for index in self._indices)
            raise ValueError(f"every item is longer than --max_seq_len {max_seq_len}; the shortest: {shortest}")
        self.manifests = [
            (source.path, find_manifest(source.path, index.place(0)[0]))
            for source, index in zip(sources, self._indices, strict=True)
        ]
        self.types = types = sorted({source.type for source in sources})
        self.table = ItemTable(
            lengths=self._lengths(),
            source_starts=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            type_of_source=np.array([types.index(source.type) for source in sources]),
            ratios=np.array([source.ratio for source in sources]),
            image_lens=self._image_lens(),
            ids=self._column("ids"),
        )
        identity = [
            [[index.digest, source.ratio, source.type] for index, source in zip(self._indices, sources, strict=True)],
            [max_seq_len, overlong],
        ]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.table)

    @property
    def has_images(self) -> bool:
        """Whether any item ends in a generated image, as its record says."""
        return any(bool(index.image_lens.any()) for index in self._indices)

    def use_vocabulary(self, num_ids: int, begin_image_id: int) -> None:
        """From now on refuse items with ids outside of 0..num_ids-1, and images that do not begin with that token."""
        self.num_ids, self.begin_image_id = num_ids, begin_image_id

    def __getitem__(self, item: int) -> TokenItem:
        return self.read(item)

    def read(self, item: int, image_only: bool = False) -> TokenItem:
        """Item number `item`: token and label int32 [n], and id; with `image_only` only the image that ends it.

        Raises ItemReadError, which names the file, if it cannot be read or is not what its record says.
        """
        index, position = self._find(item)
        path, offset, nbytes = index.place(position)
        found = load_token_file(path, offset, nbytes, int(index.lens[position]), self.num_ids)
        length = int(self.table.lengths[item])
        start = 0
        if image_only:
            start = length - 1 - int(self.table.image_lens[item])
            if found.token[start] != self.begin_image_id:
                raise ItemReadError(
                    f"token file {path}: its record says that it ends in an image of "
                    f"{int(self.table.image_lens[item])} tokens, but none begins there; merge the records again"
                )
        return TokenItem(token=found.token[start:length], label=found.label[start:length], id=found.id)

    def place(self, item: int) -> str:
        """Where the tokens of an item lie, for people: the file and, in a shard, the offset in bytes."""
        index, position = self._find(item)
        path, offset, _ = index.place(position)
        return path if offset is None else f"{path} at byte {offset}"

    def type_id(self, items: np.ndarray) -> int:
        """Which of `types` these items [n] of one row are of; 0 for a row without any."""
        return int(self.table.type_of_source[self.table.source_ids(items[:1])].sum())

    def check_first_items(self, max_bad_items: int = 0) -> None:
        """Read the first item of each record, so that a folder that was moved or is of another tokenizer is told early.

        Up to `max_bad_items` that cannot be read are passed over in each. Raises what `read` raises.
        """
        for start, stop in pairwise(self.table.source_starts.tolist()):
            for number, item in enumerate(range(start, stop)):
                try:
                    self.read(item)
                except ItemReadError:
                    if number >= max_bad_items:
                        raise
                else:
                    break

    def _parts(self) -> list[tuple[RecordIndex, np.ndarray | None]]:
        """The index of each record, and the positions of its items that are kept; None: all of them."""
        return list(zip(self._indices, self._kept, strict=True))

    def _find(self, item: int) -> tuple[RecordIndex, int]:
        """The index of the record that holds an item, and its position there."""
        source = int(self.table.source_ids(np.array([item]))[0])
        position = item - int(self.table.source_starts[source])
        kept = self._kept[source]
        return self._indices[source], position if kept is None else int(kept[position])

    def _fit(self, index: RecordIndex, overlong: str) -> np.ndarray | None:
        """Positions of the items that are kept; None: all of them."""
        if overlong != "drop" or index.max_len <= self.max_seq_len:
            return None
        return np.flatnonzero(index.lens <= self.max_seq_len).astype(np.int32)

    def _refuse_overlong(self, overlong: str) -> None:
        too_long = [index for index in self._indices if index.max_len > self.max_seq_len]
        self.num_overlong = sum(int((index.lens > self.max_seq_len).sum()) for index in too_long)
        if self.num_overlong and overlong == "error":
            worst = max(too_long, key=lambda index: index.max_len)
            path = worst.place(int(worst.lens.argmax()))[0]
            num_items = sum(index.num_items for index in self._indices)
            raise ValueError(
                f"{self.num_overlong} of {num_items} items are longer than --max_seq_len {self.max_seq_len}; the "
                f"longest has {worst.max_len} tokens ({path}). Train with --max_seq_len {worst.max_len}, or leave them "
                "out (--overlong drop) or cut them (--overlong truncate)"
            )

    def _column(self, name: str) -> np.ndarray:
        """A column of all records together; that of a single whole record as it is mapped from disk."""
        columns = ((getattr(index, name), kept) for index, kept in self._parts())
        parts = [column if kept is None else column[kept] for column, kept in columns]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _lengths(self) -> np.ndarray:
        lengths = self._column("lens")
        return np.minimum(lengths, self.max_seq_len) if self.num_overlong else lengths

    def _image_lens(self) -> np.ndarray:
        """Without those of items that are cut: their images are not whole."""
        image_lens = self._column("image_lens")
        return np.where(self._column("lens") > self.max_seq_len, 0, image_lens) if self.num_overlong else image_lens


def _open_indices(sources: Sequence[DataSource], cache_dir: Path, say: Callable[[str], None]) -> list[RecordIndex]:
    indices, problems = [], []
    for source in sources:
        try:
            indices.append(open_index(source.path, cache_dir, say))
            if not indices[-1].num_items:
                problems.append(f"record {source.path} has no items; tokenize its input, or list it no more")
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))
    return indices
