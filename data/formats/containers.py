"""The files of an input as numbered rows, whatever holds them: JSON, Parquet, tar (WebDataset), a `datasets` folder.

    source = open_source(find_files("shards/*.tar"), index_dir)
    source.num_rows, source.read(start, stop)

`pre_tokenize.py` reads its input so. A row is what `process_item` gets; a row that is damaged is an ItemError.
"""

import glob
import hashlib
import importlib
import json
import math
import os
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, chain, groupby, islice, pairwise, repeat
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np

from data.formats.json_stream import COMPRESSED_SUFFIXES, iter_json_values
from data.items.conversation import ItemError
from data.messages import brief, one_line
from data.whole_file import open_locked, open_whole

FORMATS = ("json", "jsonl", "parquet", "tar", "datasets")
# Rows that are in memory at once, beside the windows of the caller.
BATCH_ROWS = 64
BUFFER_BYTES = 1 << 20
# Of each file, hashed beside its name and size. Parquet has its statistics at the end.
HEAD_TAIL_BYTES = 4096
MAX_MEMBER_BYTES = 1 << 30
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm")
_FORMAT_OF = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".tar": "tar"}
_Row = object | ItemError


@dataclass(frozen=True)
class InputFiles:
    """The files of an input in the order of their rows, and the folder that they share. `format`: one of FORMATS."""

    format: str
    files: tuple[Path, ...]
    folder: Path

    def sha256(self) -> str:
        """Hexadecimal, changes with the input. Of a single plain JSON it is the hash of the content."""
        if self.format == "json" and len(self.files) == 1 and self.files[0].suffix not in COMPRESSED_SUFFIXES:
            with open(self.files[0], "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        for path in chain.from_iterable(sorted(path.rglob("*")) if path.is_dir() else [path] for path in self.files):
            if path.is_file():
                digest.update(f"{path.relative_to(self.folder)}\0{path.stat().st_size}\0".encode())
                with open(path, "rb") as file:
                    digest.update(file.read(HEAD_TAIL_BYTES))
                    file.seek(max(0, path.stat().st_size - HEAD_TAIL_BYTES))
                    digest.update(file.read(HEAD_TAIL_BYTES))
        return digest.hexdigest()


def find_files(name: str | os.PathLike, in_format: str | None = None) -> InputFiles:
    """The files that a path or a glob names, sorted; a folder holds .parquet or .tar files, or `datasets` saved it.

    The suffix decides about the format where `in_format` is None. Raises ValueError or FileNotFoundError.
    """
    path = Path(name)
    if in_format == "datasets" or (in_format is None and any(map(Path.is_file, _datasets_marks(path)))):
        return InputFiles("datasets", (path,), path)
    wanted = "json" if in_format == "jsonl" else in_format
    if path.is_dir():
        files = [file for file in path.iterdir() if _format_of(file) in ([wanted] if wanted else ["parquet", "tar"])]
    else:
        files = [path] if path.is_file() else list(map(Path, glob.glob(os.fspath(path), recursive=True)))
    if not files:
        raise FileNotFoundError(
            f"--in_filename {one_line(name)} is not a file, not a glob that matches any, and not a folder of .parquet "
            "or .tar files or one that `datasets` saved"
        )
    found = {wanted or _format_of(file) or "json" for file in files}
    if len(found) > 1:
        raise ValueError(f"--in_filename {one_line(name)} mixes {' and '.join(sorted(found))} files: give one kind")
    return InputFiles(found.pop(), tuple(sorted(files)), Path(os.path.commonpath([file.parent for file in files])))


def open_source(files: InputFiles, index_dir: str | os.PathLike) -> "Source":
    """The rows of an input. The index of tar files is kept in `index_dir`.

    Raises ValueError for a damaged file and for a package that is missing.
    """
    if files.format == "tar":
        return TarSource(files, Path(index_dir))
    kind = {"json": JsonSource, "parquet": ParquetSource, "datasets": DatasetSource}[files.format]
    return kind(files)


class JsonSource:
    """`num_rows` is not known before all of it was read, and `read` passes over what comes before its start."""

    num_rows = None

    def __init__(self, files: InputFiles):
        self.files = files.files

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[_Row]:
        values = chain.from_iterable(iter_json_values(path, what="input") for path in self.files)
        return islice(values, start, stop)


class ParquetSource:
    """Row groups are streamed. `read` skips whole row groups, and decodes the rows of its first one up to its start."""

    def __init__(self, files: InputFiles):
        self.files = files.files
        counts = [self._open(path).metadata.num_rows for path in self.files]
        self._starts = list(accumulate(counts, initial=0))
        self.num_rows = self._starts[-1]

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[_Row]:
        stop = self.num_rows if stop is None else stop
        for path, (first, end) in zip(self.files, pairwise(self._starts), strict=True):
            if first < stop and start < end:
                yield from self._read_file(path, max(0, start - first), min(end, stop) - first)

    def _read_file(self, path: Path, start: int, stop: int) -> Iterator[_Row]:
        file = self._open(path)
        sizes = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
        for group, (first, end) in enumerate(pairwise(accumulate(sizes, initial=0))):
            if first >= stop or end <= start:
                continue
            position, end = max(first, start), min(end, stop)
            try:
                rows = _batch_rows(file.iter_batches(BATCH_ROWS, row_groups=[group]), position - first)
                for row in islice(rows, end - position):
                    yield row
                    position += 1
            except _arrow_errors() as error:
                # Errors without a number are of the content, all others of the system.
                if getattr(error, "errno", None):
                    raise
                reason = f"row group {group} of {path.name} is damaged: {one_line(error)}"
                yield from repeat(ItemError(reason), end - position)

    def _open(self, path: Path) -> Any:
        parquet = _import("pyarrow.parquet", "Parquet")
        try:
            return parquet.ParquetFile(path, buffer_size=BUFFER_BYTES)
        except _arrow_errors() as error:
            raise ValueError(f"input {path} is no Parquet file, or it is cut off: {one_line(error)}") from None


class DatasetSource:
    """A folder saved by `Dataset.save_to_disk`. Images stay as they are stored: {"bytes": ..., "path": ...}."""

    def __init__(self, files: InputFiles):
        datasets = _import("datasets", "a folder saved by datasets")
        (folder,) = files.files
        try:
            found = datasets.load_from_disk(os.fspath(folder))
        # The errors of a damaged folder have no common class.
        except Exception as error:
            raise ValueError(f"input {folder} cannot be read by datasets: {one_line(error)}") from error
        if isinstance(found, dict):
            raise ValueError(f"input {folder} has the splits {', '.join(found)}: give the folder of one of them")
        self._dataset = found.with_format("arrow")
        self.num_rows = len(found)

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[_Row]:
        stop = self.num_rows if stop is None else stop
        return _batch_rows(self._dataset.select(range(start, stop)).iter(BATCH_ROWS)) if start < stop else iter(())


class TarSource:
    """Samples of WebDataset: neighbouring members whose names are equal up to the first dot.

    The fields of the `.json` member are the row. A `.txt` member is its `caption`, image members in their order are its
    `image`, and all members but the `.json` are there under their suffix. The first worker writes the index: int64
    [num_rows, 2], the number of the shard and where in it a sample begins.
    """

    def __init__(self, files: InputFiles, index_dir: Path):
        self.files = files.files
        path = index_dir / f"tar-index-{files.sha256()[:16]}.npy"
        is_new = not index_dir.exists()
        index_dir.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock")
        try:
            with open_locked(lock, patience_s=math.inf):
                try:
                    if not path.exists():
                        samples = chain.from_iterable(map(_find_samples, range(len(self.files)), self.files))
                        index = np.fromiter(samples, np.dtype((np.int64, 2)))
                        for older in index_dir.glob("tar-index-*.npy"):
                            older.unlink()
                        with open_whole(path) as file:
                            np.save(file, index)
                finally:
                    lock.unlink(missing_ok=True)
        except BaseException:
            if is_new:
                with suppress(OSError):
                    index_dir.rmdir()
            raise
        self._index = np.load(path, mmap_mode="r")
        self._starts = np.searchsorted(self._index[:, 0], range(len(self.files) + 1)).tolist()
        self.num_rows = len(self._index)

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[_Row]:
        stop = self.num_rows if stop is None else stop
        for path, (first, end) in zip(self.files, pairwise(self._starts), strict=True):
            begin = max(start, first)
            if begin >= min(end, stop):
                continue
            with open(path, "rb") as file:
                members = _iter_members(file, int(self._index[begin, 1]))
                samples = groupby(members, key=lambda found: _sample_key(found[0].name))
                reason = "it ends too early"
                try:
                    for key, of_sample in islice(samples, min(end, stop) - begin):
                        row = _read_sample(path.name, key, of_sample)
                        begin += 1
                        yield row
                except tarfile.TarError as error:
                    reason = one_line(error)
            yield from repeat(ItemError(f"{path.name} is damaged: {reason}"), min(end, stop) - begin)


Source = JsonSource | ParquetSource | DatasetSource | TarSource


def _format_of(path: Path) -> str | None:
    plain = path.with_suffix("") if path.suffix in COMPRESSED_SUFFIXES else path
    return _FORMAT_OF.get(plain.suffix)


def _datasets_marks(folder: Path) -> tuple[Path, Path]:
    return folder / "state.json", folder / "dataset_dict.json"


def _import(name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ValueError(
            f"to read {what}, the package {package} is needed: pip install -r exps/requirements-extra.txt, or only "
            f"{package} ({error})"
        ) from error


def _arrow_errors() -> tuple[type[Exception], ...]:
    return _import("pyarrow", "Parquet").ArrowException, OSError


def _batch_rows(batches: Iterable[Any], num_skipped: int = 0) -> Iterator[_Row]:
    """The rows of arrow batches or tables, one by one."""
    for batch in batches:
        if num_skipped < batch.num_rows:
            wanted = batch.slice(num_skipped)
            try:
                yield from wanted.to_pylist()
            # A text that is not UTF-8; a date after the year 9999.
            except (ValueError, OverflowError):
                yield from (_row_alone(wanted.slice(position, 1)) for position in range(wanted.num_rows))
        num_skipped = max(0, num_skipped - batch.num_rows)


def _row_alone(batch: Any) -> _Row:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return ItemError(f"a text of the row is not UTF-8: {error.reason}")
    except (ValueError, OverflowError) as error:
        return ItemError(f"a value of the row cannot be read: {one_line(error)}")


def _find_samples(shard: int, path: Path) -> Iterator[tuple[int, int]]:
    """(shard, offset in bytes) of each sample. Raises ValueError for a file that is damaged or cut off."""
    last_key, num_samples = None, 0
    with open(path, "rb") as file:
        try:
            for info, _ in _iter_members(file, 0):
                if (key := _sample_key(info.name)) != last_key:
                    last_key = key
                    num_samples += 1
                    yield shard, info.offset
        except tarfile.TarError as error:
            raise ValueError(
                f"input {path} is no tar file, or it is cut off after {num_samples:,} samples: {one_line(error)}"
            ) from None


def _iter_members(file: BinaryIO, offset: int) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """The members from a header on, each with the TarFile that can extract it. Raises TarError."""
    file.seek(offset)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (info := tar.next()) is not None:
            if info.isfile() and not os.path.basename(info.name).startswith("."):
                yield info, tar
            # It remembers all members.
            tar.members.clear()
        # Where a header is damaged, `next` says no more than at the end, which is a block of zeros.
        file.seek(tar.offset)
        if any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError(f"a damaged header at byte {tar.offset:,}")


def _sample_key(name: str) -> str:
    folder, base = os.path.split(name)
    return os.path.join(folder, base.partition(".")[0])


def _read_sample(shard: str, key: str, members: Iterable[tuple[tarfile.TarInfo, tarfile.TarFile]]) -> _Row:
    """Raises TarError."""
    contents = []
    for info, tar in members:
        if info.size > MAX_MEMBER_BYTES:
            return ItemError(f"sample {one_line(key)} of {shard}: {one_line(info.name)} has more than 1 GiB")
        contents.append((info.name, tar.extractfile(info).read()))
    return _build_sample(shard, key, contents)


def _build_sample(shard: str, key: str, contents: list[tuple[str, bytes]]) -> _Row:
    where = f"sample {one_line(key)} of {shard}"
    fields, members, images = {}, {}, []
    try:
        for name, content in contents:
            suffix = os.path.basename(name).partition(".")[2]
            kind = suffix.rpartition(".")[2].lower()
            if kind == "json":
                fields = json.loads(content)
            elif kind == "txt":
                members["txt"] = members["caption"] = content.decode()
            else:
                members[suffix] = content
                images += [content] * (kind in IMAGE_SUFFIXES)
    except (ValueError, RecursionError) as error:
        return ItemError(f"{where}: {one_line(name)} cannot be read: {one_line(error)}")
    if not isinstance(fields, dict):
        return ItemError(f"{where}: the .json member must hold an object, got {brief(fields)}")
    if not fields and "txt" not in members or not (fields or images):
        lacking = "image" if "txt" in members else ".json or .txt"
        names = ", ".join(one_line(name) for name, _ in contents)
        return ItemError(f"{where} has no {lacking} member, only {names}; members of a sample must be neighbours")
    if images:
        fields.pop("images", None)
    return {"__key__": key, **members, **fields, **({"image": images} if images else {})}
