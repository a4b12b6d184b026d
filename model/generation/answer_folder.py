"""The folder of answers to many prompts, as benchmarks read it, for `inference_solver.py --prompts --out_dir DIR`.

    geneval   DIR/00000/samples/0000.png and DIR/00000/metadata.jsonl, the prompt as it was put in
    dpg       DIR/NAME.png and nothing else, for four images a square of 2 x 2, row by row
    text      DIR/00000/samples/0000.txt and metadata.jsonl; at the end all answers in DIR/answers.jsonl

Beside DIR is `DIR.run.json`, what the answers were drawn with; a run locks it. Files appear atomically: a run that was
killed continues with what is missing.
"""

import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image

from data.messages import brief, one_line
from data.whole_file import open_locked, open_whole, replace_locked
from model.generation.loop import CUT_BY_NAN, check_length
from model.generation.prompt_files import Prompt, answer_seed
from model.generation.requests import Answer
from model.generation.sampling import SamplingOptions

LAYOUTS = GENEVAL, DPG, TEXT = "geneval", "dpg", "text"
# Images of a prompt that one file of the layout `dpg` can hold, and their columns.
DPG_COLUMNS = {1: 1, 4: 2}
# Answers at a time, where memory allows.
MAX_BATCH = 64
# Keys of a line of answers.jsonl beside those of the prompt.
ANSWER_KEYS = ("place", "number", "text")
MAX_NAME_BYTES = 200
# A run that was killed has the folder until all its processes have ended.
LOCK_PATIENCE_S = 10.0


class AnswerFolder:
    """Where answers go and which are there. An answer is named by the place of its prompt and its number."""

    def __init__(self, out_dir: Path, layout: str, prompts: Sequence[Prompt], num_answers: int):
        # Names beside the folder are made from its own: not from a link's, `.` or `..`.
        out_dir = Path(os.path.realpath(out_dir))
        if out_dir.is_mount():
            raise ValueError(f"--out_dir {out_dir} is a mount point; give a folder in it")
        self.out_dir, self.layout, self.prompts, self.num_answers = out_dir, layout, prompts, num_answers
        self._run_path = out_dir.with_name(f"{out_dir.name}.run.json")
        # Nothing unfinished is ever under DIR: GenEval would read 0000.png.partial, DPG-Bench any file.
        self._partial_dir = out_dir.with_name(f".{out_dir.name}.partial")
        # For the layout dpg: images of a prompt that still lacks others.
        self._waiting: dict[int, dict[int, Image.Image]] = {}

    def check(self) -> None:
        """Raises ValueError for what does not go together, before anything is loaded."""
        if self.num_answers < 1 or (self.layout == DPG and self.num_answers not in DPG_COLUMNS):
            wanted = f"{' or '.join(map(str, DPG_COLUMNS))} with --layout {DPG}" if self.layout == DPG else "at least 1"
            raise ValueError(f"--num_images is {self.num_answers}; it must be {wanted}")
        for place, prompt in enumerate(self.prompts):
            if self.layout == TEXT and prompt.size:
                raise ValueError(f"prompt {place} has a size, which draws an image; --layout {TEXT} is for texts")
            if self.layout == DPG and prompt.size and prompt.size[0] != prompt.size[1]:
                raise ValueError(f"prompt {place} has the size {prompt.size}; --layout {DPG} needs squares")
            is_name = Path(prompt.name).name == prompt.name and not prompt.name.startswith(".")
            if self.layout == DPG and not (is_name and 0 < len(prompt.name.encode()) <= MAX_NAME_BYTES):
                raise ValueError(f"prompt {place} has the id {brief(prompt.name)}, which cannot be the name of a file")
            if self.layout == TEXT and (keys := set(ANSWER_KEYS).intersection(json.loads(prompt.source))):
                raise ValueError(f"prompt {place} has the key {min(keys)!r}, which is the answer's; rename the key")
        [(name, num)] = Counter(prompt.name for prompt in self.prompts).most_common(1)
        if self.layout == DPG and num > 1:
            raise ValueError(f"two prompts have the id {brief(name)}; --layout {DPG} needs different ones")

    def open(self, settings: Mapping[str, Any]) -> None:
        """Make the folder ready, by one rank, and lock it until `finish`.

        Raises ValueError if answers in it were drawn with other settings, or if another run has the lock.
        """
        prompts = [[p.text, p.name, list(map(_identify, p.images)), p.size, p.seed, p.source] for p in self.prompts]
        run = json.loads(json.dumps({"settings": settings, "prompts": prompts}))
        self.out_dir.mkdir(parents=True, exist_ok=True)
        if any(self.out_dir.iterdir()) and not self._run_path.is_file():
            problem = f"is not empty, but there is no {self._run_path}"
            raise ValueError(f"--out_dir {self.out_dir} {problem}. Give another folder")
        try:
            self._lock = open_locked(self._run_path, LOCK_PATIENCE_S)
        except BlockingIOError:
            raise ValueError(f"--out_dir {self.out_dir}: another run writes there; wait until the run ends") from None
        if any(self.out_dir.iterdir()):
            if difference := self._find_difference(run):
                raise ValueError(
                    f"--out_dir {self.out_dir} holds other answers: {difference}. Give another folder, or remove this "
                    f"one and {self._run_path}"
                )
        shutil.rmtree(self._partial_dir, ignore_errors=True)
        self._partial_dir.mkdir()
        with self._lock:
            self._lock = replace_locked(self._run_path, [json.dumps(run)])

    def _find_difference(self, run: dict) -> str:
        """The first difference from what the answers in the folder were drawn with."""
        names = ("text", "id", "image", "size", "seed", "line")
        try:
            there = json.loads(self._run_path.read_text(encoding="utf-8"))
            for name, value in run["settings"].items():
                if there["settings"].get(name) != value:
                    return f"{name} was {brief(there['settings'].get(name))} and is {brief(value)}"
            if len(there["prompts"]) != len(run["prompts"]):
                return f"there were {len(there['prompts'])} prompts and are {len(run['prompts'])}"
            for place, (old, new) in enumerate(zip(there["prompts"], run["prompts"], strict=True)):
                for name, before, now in zip(names, old, new, strict=True):
                    if before != now:
                        return f"the {name} of prompt {place} was {brief(before)} and is {brief(now)}"
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            return f"{self._run_path} is damaged ({one_line(repr(error))})"
        return ""

    def path(self, place: int, number: int) -> Path:
        if self.layout == DPG:
            return self.out_dir / f"{self.prompts[place].name}.png"
        return self.out_dir / f"{place:05}" / "samples" / f"{number:04}.{'txt' if self.layout == TEXT else 'png'}"

    def missing(self, rank: int = 0, world_size: int = 1) -> list[tuple[int, int]]:
        """(place, number) of every answer that is not there, of the prompts of a rank.

        The share of a rank depends on nothing else: ranks that start at different times agree on it.
        """
        places = range(rank, len(self.prompts), world_size)
        return [(p, n) for p in places for n in range(self.num_answers) if not self.path(p, n).exists()]

    def keep(self, place: int, number: int, answer: Answer) -> None:
        """Write an answer. Raises ValueError for one without the image that is wanted, or cut off by NaN."""
        if self.layout == TEXT:
            if answer.cut_by == CUT_BY_NAN:
                raise ValueError("NaN logits: the weights are damaged, or too large for the precision")
            with self._new_file(place, number) as file:
                file.write(answer.text.encode())
            return
        if not answer.images:
            cause = f"it was cut off by {answer.cut_by}" if answer.cut_by else "--size makes the model draw one"
            raise ValueError(f"no complete image in the answer: {cause}")
        image = answer.images[0]
        if self.layout == DPG:
            image = self._join(place, number, image)
        if image is not None:
            with self._new_file(place, number) as file:
                image.save(file, format="PNG")

    def _join(self, place: int, number: int, image: Image.Image) -> Image.Image | None:
        """The square of all images of a prompt once the last has come."""
        images = self._waiting.setdefault(place, {})
        images[number] = image
        side, columns = image.width, DPG_COLUMNS[self.num_answers]
        if any(other.size != (side, side) for other in images.values()):
            raise ValueError(f"an image is {image.width}x{image.height}; {DPG} needs squares of one size: give --size")
        if len(images) < self.num_answers:
            return None
        del self._waiting[place]
        square = Image.new("RGB", (columns * side, columns * side))
        for index, part in sorted(images.items()):
            square.paste(part, (index % columns * side, index // columns * side))
        return square

    @contextmanager
    def _new_file(self, place: int, number: int) -> Iterator[BinaryIO]:
        path = self.path(place, number)
        if self.layout != DPG and not path.parent.is_dir():
            # The folder of a prompt appears with its metadata.
            folder = self._partial_dir / f"{place:05}"
            (folder / "samples").mkdir(parents=True, exist_ok=True)
            (folder / "metadata.jsonl").write_text(self.prompts[place].source + "\n", encoding="utf-8")
            os.rename(folder, self.out_dir / folder.name)
        partial = self._partial_dir / f"{place:05}-{number:04}"
        with open_whole(partial) as file:
            yield file
        os.replace(partial, path)

    def finish(self) -> list[tuple[int, int]]:
        """Write the file of all texts, by one rank at the end. Returns the answers that are missing."""
        shutil.rmtree(self._partial_dir, ignore_errors=True)
        if self.layout == TEXT:
            with open_whole(self.out_dir / "answers.jsonl") as file:
                for place, prompt in enumerate(self.prompts):
                    for number, text in self._texts(place):
                        answer = dict(zip(ANSWER_KEYS, (place, number, text), strict=True))
                        # Escaped: half a surrogate in a prompt's line cannot be encoded.
                        file.write(f"{json.dumps(json.loads(prompt.source) | answer)}\n".encode())
        self._lock.close()
        return self.missing()

    def _texts(self, place: int) -> Iterator[tuple[int, str]]:
        for number in range(self.num_answers):
            if (path := self.path(place, number)).exists():
                yield number, path.read_text(encoding="utf-8")

    def page_path(self) -> Path:
        """Of the contact sheet: `index.html` beside the folder, or a name of its own where that is another page."""
        path = self.out_dir.with_name("index.html")
        is_ours = not path.exists() or self._page_mark() in path.read_text(encoding="utf-8", errors="replace")
        return path if is_ours else self.out_dir.with_name(f"{self.out_dir.name}.html")

    def _page_mark(self) -> str:
        return f"/* answers in {hashlib.sha256(self.out_dir.name.encode()).hexdigest()[:16]} */"

    def page_values(self, missing: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """For `contact_sheet.html`; paths are relative to the page."""
        parent, rows, lacking = self.out_dir.parent, [], set(missing)
        for place, prompt in enumerate(self.prompts):
            there = [self.path(place, n) for n in range(self.num_answers) if (place, n) not in lacking]
            row = {"place": f"{place:05}", "name": prompt.name, "text": prompt.text}
            row["given"] = [os.path.relpath(path, parent) for path in prompt.images]
            row["images"] = (
                [] if self.layout == TEXT else [os.path.relpath(path, parent) for path in dict.fromkeys(there)]
            )
            row["texts"] = [text for _, text in self._texts(place)] if self.layout == TEXT else []
            rows.append({**row, "num_missing": self.num_answers - len(there)})
        num_there = len(self.prompts) * self.num_answers - len(lacking)
        counts = {"num_missing": len(lacking), "num_there": num_there}
        return {"title": self.out_dir.name, "mark": self._page_mark(), "rows": rows, **counts}


def draw_missing(
    solver: Any,
    folder: AnswerFolder,
    missing: list[tuple[int, int]],
    options: SamplingOptions,
    max_gen_len: int,
    is_shown: bool = True,
) -> None:
    """
    Draw answers, as many at a time as memory holds, and keep each batch. What cannot be drawn is reported.

    Args:
        solver: a FlexARInferenceSolver.
        missing: (place, number) of each answer; `options.seed` is the seed of all.
        is_shown: show the progress.
    """
    most, num_all, contexts = MAX_BATCH, len(missing), {}
    while missing:
        impossible = set()
        for place in sorted({place for place, _ in missing[:most]} - contexts.keys()):
            prompt = folder.prompts[place]
            try:
                tokens = solver.encode_request([[prompt.text, None]], prompt.images)
                start = solver.image_start(prompt.size)
                check_length(len(tokens), len(start), max_gen_len, solver.model.config.max_position_embeddings)
                contexts[place] = tokens, start
            except (ValueError, OSError) as error:
                _report(folder, place, error)
                impossible.add(place)
        missing = [job for job in missing if job[0] not in impossible]
        jobs = missing[:most]
        if any(place not in contexts for place, _ in jobs) or not jobs:
            # Others have moved up.
            continue
        tokens, starts = zip(*(contexts[place] for place, _ in jobs), strict=True)
        sizes = [folder.prompts[place].size for place, _ in jobs]
        longest = max_gen_len
        if all(sizes):
            # What follows the image is not kept.
            longest = min(longest, 1 + max(solver.vocab.num_image_tokens(*size) for size in sizes))
        jobs = jobs[: solver.fit_batch_size(tokens, starts, longest, options, len(jobs))]
        seeds = [answer_seed(folder.prompts[place], place, number, options.seed) for place, number in jobs]
        first = num_all - len(missing) + 1
        desc = f"answers {first} to {first + len(jobs) - 1} of {num_all}" if is_shown else None
        try:
            more = {"seeds": seeds, "batch_size": len(jobs), "desc": desc, "with_images": folder.layout != TEXT}
            answers = solver.answer_prompts(tokens[: len(jobs)], sizes[: len(jobs)], longest, options, **more)
            # Later prompts may be shorter than the one that had no room.
            most = min(2 * most, MAX_BATCH)
        except torch.OutOfMemoryError as error:
            if len(jobs) > 1:
                most = len(jobs) // 2
                continue
            _report(folder, jobs[0][0], error)
            answers = []
        for (place, number), answer in zip(jobs, answers, strict=False):
            try:
                folder.keep(place, number, answer)
            except ValueError as error:
                _report(folder, place, error)
        missing = missing[len(jobs) :]
        contexts = {place: contexts[place] for place, _ in missing if place in contexts}


def _identify(path: Path) -> list[Any]:
    """Path, size and time of an image of a prompt: another image may have the same path."""
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]


def _report(folder: AnswerFolder, place: int, error: Exception) -> None:
    print(f"prompt {place}, {brief(folder.prompts[place].text)}: {error}", file=sys.stderr, flush=True)
