"""Trackers: rank 0 sends the figures of `metrics.jsonl` also to TensorBoard, Weights & Biases or Trackio.

accelerate's tracker classes do the work, without its `Accelerator`, which would take over the process group. A resumed
run continues its curves: TensorBoard hides what was written after the resumed step (`purge_step`). The others find the
run by an id kept in `output_dir`, and get no step twice.
"""

import contextlib
import importlib.util
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.flags import flag
from data.whole_file import open_whole

# These are the names of their packages too.
TRACKERS = ("tensorboard", "wandb", "trackio")
RUN_ID_NAME = "tracker_run_id"
TENSORBOARD_DIR = "tensorboard"
# accelerate looks for other ranks by these.
LAUNCHER_VARIABLES = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class TrackerOptions:
    """`log_with`: names of trackers with commas between them, or nothing; `log_project`: what wandb and trackio file
    the run under."""

    log_with: str = flag("", "trackers beside metrics.jsonl, with commas between: tensorboard, wandb, trackio")
    log_project: str = flag("chameleon", "name of the project in wandb and trackio")

    @property
    def names(self) -> list[str]:
        """The chosen trackers, each once."""
        return list(dict.fromkeys(name.strip() for name in self.log_with.split(",") if name.strip()))

    def problems(self) -> list[str]:
        """What is wrong with these options, one sentence each; missing packages too."""
        found = []
        for name in self.names:
            if name not in TRACKERS:
                found.append(f"--log_with knows {', '.join(TRACKERS)}, got {name!r}")
            elif importlib.util.find_spec(name) is None:
                found.append(f"--log_with {name} needs a package that is missing: pip install {name}")
        return found


class Trackers:
    """The trackers of one run, on rank 0; without names it does nothing."""

    def __init__(
        self,
        options: TrackerOptions,
        output_dir: Path,
        resume_step: int,
        last_step: int,
        config: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        """
        Args:
            options: which trackers.
            output_dir: of the run.
            resume_step: last step before this part of the run.
            last_step: last step that was logged before, also one that the resumed checkpoint does not have.
            config: shown beside the curves.
            say: prints a line, once for a tracker that fails; the run continues without it.
        """
        self._say = say
        self._trackers: dict[str, Any] = {}
        self._last_step = last_step
        if not options.names:
            return
        run_id, self._last_step = open_run(output_dir, last_step)
        with _single_process():
            from accelerate.state import PartialState
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS

            # Without it accelerate's own log lines raise errors.
            PartialState(cpu=True)
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
                # Only this process has trackers, whatever accelerate thinks of its rank.
                tracker.main_process_only = False
                tracker.start()
                self._trackers[tracker_name] = tracker

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Sends figures of an optimizer step; those of one step may come in several calls."""
        for name, tracker in self._of_step(step):
            with self._watched(name):
                tracker.log(dict(figures), step=step)

    def log_images(self, step: int, images: Mapping[str, Sequence[Image.Image]]) -> None:
        """Sends images of an optimizer step, lists of them by name."""
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
        """The trackers without this step. TensorBoard has hidden it, the others cannot."""
        return [(name, t) for name, t in self._trackers.items() if name == "tensorboard" or step > self._last_step]

    @contextlib.contextmanager
    def _watched(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # Whatever a package or the network does must not end hours of training.
            self._trackers.pop(name, None)
            self._say(
                f"--log_with {name} is off from here on: {type(error).__name__}: {error}; metrics.jsonl continues"
            )


def open_run(output_dir: Path, last_step: int) -> tuple[str, int]:
    """(id of the run in that folder, a new one if there is none; last step that any part of the run has logged).

    Two kills in a row cut `metrics.jsonl` twice, so the file with the id keeps the largest step, too.
    """
    path = output_dir / RUN_ID_NAME
    words = path.read_text(errors="replace").split() if path.is_file() else []
    run_id = words[0] if words else secrets.token_hex(4)
    last_step = max([last_step, *(int(word) for word in words[1:] if word.isdecimal())])
    with open_whole(path) as file:
        file.write(f"{run_id}\n{last_step}\n".encode())
    return run_id, last_step


def _send_images(name: str, tracker: Any, step: int, images: Mapping[str, Sequence[Image.Image]]) -> None:
    if name == "wandb":
        tracker.log_images({key: list(values) for key, values in images.items()}, step=step)
        return
    # accelerate sends no images to trackio, and to TensorBoard only arrays of one size.
    numbered = {f"{key}/{i}": image for key, values in images.items() for i, image in enumerate(values)}
    if name == "tensorboard":
        for key, image in numbered.items():
            tracker.tracker.add_image(key, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        tracker.tracker.flush()
    else:
        import trackio

        tracker.log({key: trackio.Image(image) for key, image in numbered.items()}, step=step)


@contextlib.contextmanager
def _single_process() -> Iterator[None]:
    """Hides the other ranks from accelerate, which would join their process group."""
    hidden = {name: os.environ.pop(name) for name in LAUNCHER_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
