"""The data config: a YAML that lists the record files to train on.

    META:
      - path: record.json   # or .jsonl, .pkl, .pth; relative to the folder of the YAML, then to the working directory
        ratio: 0.5          # default 1; below 1 a fresh sample each epoch, above 1 repeats
        type: captions      # default "default"; items of different types never share an optimizer step

All problems are reported in one error, before anything starts.
"""

import codecs
import os
from dataclasses import dataclass
from pathlib import Path

import yaml

from data.formats.plain_pickle import LIST_SUFFIXES
from data.messages import brief, one_line

DEFAULT_TYPE = "default"
RECORD_SUFFIXES = (".json", ".jsonl", *LIST_SUFFIXES)
_KEYS = ("path", "ratio", "type")


@dataclass(frozen=True)
class DataSource:
    """One record file; `ratio` is how often each of its items occurs in an epoch."""

    path: Path
    ratio: float = 1.0
    type: str = DEFAULT_TYPE


def load_data_config(path: str | os.PathLike) -> list[DataSource]:
    """The sources of a data config, in its order, with paths that open from here.

    Raises FileNotFoundError if there is no such YAML, and one ValueError with all problems in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data config {path} does not exist")
    with path.open("rb") as file:
        head = file.read(100).removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith((b"[", b'{"file"')) or path.suffix in (".jsonl", *LIST_SUFFIXES):
        raise ValueError(
            f"data config {path} seems to be a record itself; write a YAML file beside it that lists it, with the line "
            f"META: [{{path: {path.name}}}]"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"data config {path} is not valid YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(content, dict) or not isinstance(content.get("META"), list) or not content["META"]:
        raise ValueError(
            f"data config {path} must have a key META with a list of one or more {{path, ratio, type}}, got "
            f"{brief(content)}"
        )
    problems = [f"unknown key {brief(key)} beside META" for key in content if key != "META"]
    numbered = enumerate(content["META"], start=1)
    sources = [_parse_entry(entry, f"META entry {number}", path.parent, problems) for number, entry in numbered]
    first: dict[Path, int] = {}
    for number, source in enumerate(sources, start=1):
        earlier = first.setdefault(source.path.resolve(), number) if source else number
        if earlier != number:
            problems.append(
                f"META entry {number} lists {source.path} again, as entry {earlier} does; use one entry and its ratio"
            )
    if problems:
        raise ValueError(f"data config {path}: " + "; ".join(problems))
    return sources


def _parse_entry(entry: object, name: str, folder: Path, problems: list[str]) -> DataSource | None:
    if not isinstance(entry, dict):
        problems.append(f"{name} must be a mapping with the key path, got {brief(entry)}")
        return None
    known = ", ".join(_KEYS)
    problems += [f"{name} has an unknown key {brief(key)} (known: {known})" for key in entry if key not in _KEYS]
    ratio, type_name = entry.get("ratio", 1.0), entry.get("type", DEFAULT_TYPE)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1e9:
        problems.append(f"{name}: ratio must be a number above 0 and below 1e9, got {brief(ratio)}")
        ratio = 1.0
    if not isinstance(type_name, str) or not type_name:
        problems.append(f"{name}: type must be a name, got {brief(type_name)}")
    record = _find_record(entry.get("path"), name, folder, problems)
    return record and DataSource(record, float(ratio), type_name)


def _find_record(value: object, name: str, folder: Path, problems: list[str]) -> Path | None:
    if not isinstance(value, str) or not value:
        problems.append(f"{name}: path must name a record file, got {brief(value)}")
        return None
    candidates = (folder / value, Path(value))
    found = next((candidate for candidate in candidates if os.path.isfile(candidate)), None)
    if found is None:
        looked_for = " and ".join(map(one_line, dict.fromkeys(candidates)))
        problems.append(f"{name}: record {one_line(value)} does not exist (looked for {looked_for})")
    elif found.suffix not in RECORD_SUFFIXES:
        problems.append(f"{name}: record {value} must end in {' or '.join(RECORD_SUFFIXES)}")
    elif not found.stat().st_size:
        problems.append(f"{name}: record {value} is empty")
    return found
