"""Tokenized items as a training run sees them: the items of all record files, read lazily by their number.

TokenDataset -> plan_epoch (data/epoch/packing.py) -> EpochRows(rank), build_loader (data/epoch/rows.py)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from data.epoch.packing import ItemTable
from data.formats.data_config import DataSource
from data.formats.manifest import find_manifest
from data.formats.record_index import RecordIndex, node_cache_dir, open_index
from data.formats.token_file import ItemReadError, TokenItem, load_token_file

OVERLONG_CHOICES = ("error", "drop", "truncate")


class TokenDataset:
    """All items of the data config, in its order, read by index.

    `table`: what the order of an epoch depends on. `num_overlong`: items that were dropped or truncated. `fingerprint`:
    hexadecimal, changes with anything that decides the order of an epoch. `types`: of the data config, sorted.
    `manifests`: of each record its path, and the fields of its manifest or None.
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        max_seq_len: int,
        overlong: str = "error",
        cache_dir: Path | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        """`overlong`: whether items above `max_seq_len` are an error, or are dropped, or truncated at the end.

        `cache_dir` is for the indices of the records. Raises one ValueError with the problems of all records.
        """
        self.max_seq_len = max_seq_len
        self.num_ids: int | None = None
        self.begin_image_id: int | None = None
        self._indices = _open_indices(sources, cache_dir or node_cache_dir(), say)
        self.num_overlong = self._count_overlong(overlong)
        # Positions of the items that are kept in each record; None: all.
        self._kept = [
            np.flatnonzero(index.lens <= max_seq_len).astype(np.int32)
            if overlong == "drop" and index.max_len > max_seq_len
            else None
            for index in self._indices
        ]
        sizes = [len(lens) for lens in self._columns("lens")]
        if not sum(sizes):
            shortest = min(int(index.lens.min()) for index in self._indices)
            raise ValueError(f"every item is longer than --max_seq_len {max_seq_len}; the shortest: {shortest}")
        self.manifests = [
            (source.path, find_manifest(source.path, index.place(0)[0]))
            for source, index in zip(sources, self._indices, strict=True)
        ]
        self.types = types = sorted({source.type for source in sources})
        lengths, image_lens, ids = (_join(self._columns(name)) for name in ("lens", "image_lens", "ids"))
        if self.num_overlong:
            # A truncated item does not end in its image.
            image_lens = np.where(lengths > max_seq_len, 0, image_lens)
            lengths = np.minimum(lengths, max_seq_len)
        self.table = ItemTable(
            lengths=lengths,
            source_starts=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            type_of_source=np.array([types.index(source.type) for source in sources]),
            ratios=np.array([source.ratio for source in sources]),
            image_lens=image_lens,
            ids=ids,
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
        """From now on reject items with ids outside of 0..num_ids-1, and images that do not begin with that token."""
        self.num_ids, self.begin_image_id = num_ids, begin_image_id

    def read(self, item: int, image_only: bool = False) -> TokenItem:
        """Item number `item`, with `image_only` only the image that ends it. Raises ItemReadError."""
        index, position = self._find(item)
        path, offset, nbytes = index.place(position)
        found = load_token_file(path, offset, nbytes, int(index.lens[position]), self.num_ids)
        length = int(self.table.lengths[item])
        start = 0
        if image_only:
            image_len = int(self.table.image_lens[item])
            start = length - 1 - image_len
            if found.token[start] != self.begin_image_id:
                raise ItemReadError(
                    f"token file {path}: its record says that it ends in an image of {image_len} tokens, but none "
                    "begins there; merge the records again"
                )
        return TokenItem(token=found.token[start:length], label=found.label[start:length], id=found.id)

    def place(self, item: int) -> str:
        """Where the tokens of an item are, for people: the file and, in a shard, the offset in bytes."""
        index, position = self._find(item)
        path, offset, _ = index.place(position)
        return path if offset is None else f"{path} at byte {offset}"

    def type_id(self, items: np.ndarray) -> int:
        """Index into `types` of the items [n] of one row; 0 for a row without items."""
        return int(self.table.type_of_source[self.table.source_ids(items[:1])].sum())

    def check_first_items(self, max_bad_items: int = 0) -> None:
        """Read the first item of each record after up to `max_bad_items` bad ones. Raises what `read` raises.

        It fails for a moved folder or another tokenizer.
        """
        for start, stop in pairwise(self.table.source_starts.tolist()):
            for number, item in enumerate(range(start, stop)):
                try:
                    self.read(item)
                    break
                except ItemReadError:
                    if number >= max_bad_items:
                        raise

    def _find(self, item: int) -> tuple[RecordIndex, int]:
        """The index of the record that holds an item, and its position there."""
        source = int(self.table.source_ids(np.array([item]))[0])
        position = item - int(self.table.source_starts[source])
        kept = self._kept[source]
        return self._indices[source], position if kept is None else int(kept[position])

    def _count_overlong(self, overlong: str) -> int:
        num_overlong = sum(int((index.lens > self.max_seq_len).sum()) for index in self._indices)
        if num_overlong and overlong == "error":
            worst = max(self._indices, key=lambda index: index.max_len)
            path = worst.place(int(worst.lens.argmax()))[0]
            num_items = sum(index.num_items for index in self._indices)
            raise ValueError(
                f"{num_overlong} of {num_items} items are longer than --max_seq_len {self.max_seq_len}; the "
                f"longest has {worst.max_len} tokens ({path}). Train with --max_seq_len {worst.max_len}, or leave them "
                "out (--overlong drop) or cut them (--overlong truncate)"
            )
        return num_overlong

    def _columns(self, name: str) -> list[np.ndarray]:
        """A column of each record, without the items that are dropped."""
        columns = [getattr(index, name) for index in self._indices]
        return [column if kept is None else column[kept] for column, kept in zip(columns, self._kept, strict=True)]


def _join(columns: list[np.ndarray]) -> np.ndarray:
    # A single column stays as it is mapped from disk.
    return columns[0] if len(columns) == 1 else np.concatenate(columns)


def _open_indices(sources: Sequence[DataSource], cache_dir: Path, say: Callable[[str], None]) -> list[RecordIndex]:
    indices, problems = [], []
    for source in sources:
        try:
            indices.append(open_index(source.path, cache_dir, say))
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))
    return indices
