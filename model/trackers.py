"""Trackers: the figures of `metrics.jsonl`, sent also to TensorBoard, Weights & Biases or Trackio, by rank 0.

The work is done by accelerate's tracker classes, without its `Accelerator`, which would take over the process group.
`metrics.jsonl` stays the truth: a tracker that fails is switched off, and training goes on. A run that is resumed goes
on in the same curve: TensorBoard hides what was written after the resumed step (`purge_step`); the others know the run
by an id kept in `output_dir`, and are not sent again the steps that they have. How far each of them has come is kept
beside the id: once `metrics.jsonl` was cut back, it does not tell any more.
"""

import contextlib
import difflib
import importlib.util
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.flags import flag
from data.whole_file import open_whole

TRACKERS = ("tensorboard", "wandb", "trackio")  # also the names of their packages
RUN_ID_NAME = "tracker_run_id"
TENSORBOARD_DIR = "tensorboard"
# What tells accelerate that there are other ranks.
LAUNCHER_VARIABLES = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class TrackerOptions:
    """`log_with`: names of trackers with commas between them, or nothing; `log_project`: what wandb and trackio file
    the run under."""

    log_with: str = flag("", "trackers beside metrics.jsonl, with commas between: tensorboard, wandb, trackio")
    log_project: str = flag("chameleon", "name of the project in wandb and trackio")

    @property
    def names(self) -> list[str]:
        """The trackers asked for, each once."""
        return list(dict.fromkeys(name.strip() for name in self.log_with.split(",") if name.strip()))

    def problems(self) -> list[str]:
        """What is wrong with these options, one sentence each; a package that is missing, too."""
        found = []
        for name in self.names:
            if name not in TRACKERS:
                nearest = difflib.get_close_matches(name.lower(), TRACKERS, n=1)
                meant = f"; did you mean {nearest[0]}?" if nearest else ""
                found.append(f"--log_with knows {', '.join(TRACKERS)}, got {name!r}{meant}")
            elif importlib.util.find_spec(name) is None:
                found.append(f"--log_with {name} needs the package {name}, which is not here: pip install {name}")
        return found


class Trackers:
    """The trackers of one run, on the rank that speaks; without names it does nothing."""

    def __init__(
        self,
        options: TrackerOptions,
        output_dir: Path,
        resume_step: int,
        last_step: int,
        config: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        """Goes on after `resume_step` of a run that had told of its steps up to `last_step`; `config` is shown beside
        the curves. A tracker that cannot start is said once, and left out."""
        self._say = say
        self._trackers: dict[str, Any] = {}
        self._known_steps: dict[str, int] = {}
        if not options.names:
            return
        run_id, self._known_steps = open_run(output_dir, options.names, last_step)
        with _single_process():
            from accelerate.state import PartialState
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS

            PartialState(cpu=True)  # without it accelerate's own log lines are errors
        shown = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in config.items()}
        name = f"{output_dir.resolve().name}-{run_id}"
        arguments = {
            "tensorboard": (TENSORBOARD_DIR, {"logging_dir": output_dir, "purge_step": resume_step + 1}),
            "wandb": (
                options.log_project,
                {"dir": output_dir, "id": run_id, "name": name, "resume": "allow", "config": shown},
            ),
            "trackio": (options.log_project, {"name": name, "resume": "allow", "config": shown}),
        }
        for tracker_name in options.names:
            project, settings = arguments[tracker_name]
            with self._watched(tracker_name):
                tracker = LOGGER_TYPE_TO_CLASS[tracker_name](project, **settings)
                tracker.main_process_only = False  # this is the only process that has one
                tracker.start()
                self._trackers[tracker_name] = tracker

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Sends figures of an optimizer step; those of one step may come in several calls."""
        for name, tracker in self._of_step(step):
            with self._watched(name):
                tracker.log(dict(figures), step=step)

    def log_images(self, step: int, images: Mapping[str, Sequence[Image.Image]]) -> None:
        """Sends pictures of an optimizer step, lists of them by name."""
        for name, tracker in self._of_step(step):
            with self._watched(name):
                _send_images(name, tracker, step, images)

    def close(self) -> None:
        """Waits until everything was sent."""
        for name, tracker in list(self._trackers.items()):
            with self._watched(name):
                tracker.finish()
        self._trackers = {}

    def _of_step(self, step: int) -> list[tuple[str, Any]]:
        """The trackers that do not have this step yet; TensorBoard has hidden it."""
        known = self._known_steps
        return [(n, tracker) for n, tracker in self._trackers.items() if n == "tensorboard" or step > known[n]]

    @contextlib.contextmanager
    def _watched(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a package or the network does, hours of training are worth more
            self._trackers.pop(name, None)
            self._say(f"--log_with {name} is off from here on: {type(error).__name__}: {error}; metrics.jsonl goes on")


def open_run(output_dir: Path, names: Sequence[str], last_step: int) -> tuple[str, dict[str, int]]:
    """(the id of the run in that folder, made if it has none; the last step that each tracker has, 0 if it is new).

    In the file, the id is followed by a line `name step` for each tracker that the run has had.
    """
    path = output_dir / RUN_ID_NAME
    run_id, *lines = (path.read_text(errors="replace") if path.is_file() else "").split("\n")
    run_id = run_id.strip() or secrets.token_hex(4)
    known = {match[1]: int(match[2]) for line in lines if (match := re.fullmatch(r"(\w+) (\d+)", line))}
    known |= {name: max(known[name], last_step) if name in known else 0 for name in names}
    with open_whole(path) as file:
        file.write("".join(f"{line}\n" for line in (run_id, *(f"{n} {step}" for n, step in known.items()))).encode())
    return run_id, known


def _send_images(name: str, tracker: Any, step: int, images: Mapping[str, Sequence[Image.Image]]) -> None:
    if name == "wandb":
        tracker.log_images({key: list(pictures) for key, pictures in images.items()}, step=step)
        return
    # One by one: accelerate has none for trackio, and for TensorBoard only arrays of one size.
    numbered = {f"{key}/{i}": picture for key, pictures in images.items() for i, picture in enumerate(pictures)}
    if name == "tensorboard":
        for key, picture in numbered.items():
            tracker.tracker.add_image(key, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        tracker.tracker.flush()
    else:
        import trackio

        tracker.log({key: trackio.Image(picture) for key, picture in numbered.items()}, step=step)


@contextlib.contextmanager
def _single_process() -> Iterator[None]:
    """To accelerate this process is alone: it must not join, or reckon with, the other ranks."""
    hidden = {name: os.environ.pop(name) for name in LAUNCHER_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
