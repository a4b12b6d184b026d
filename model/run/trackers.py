"""Trackers: rank 0 sends the figures of `metrics.jsonl` also to TensorBoard, Weights & Biases or Trackio.

accelerate's tracker classes do the work, without its `Accelerator`, which would take over the process group. A resumed
run continues its curves: TensorBoard hides what was written after the resumed step (`purge_step`). The others find
the run by an id kept in `output_dir`, and get no step twice.
"""

import importlib.util
import math
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.flags import flag

# These are the names of their packages too.
TRACKERS = ("tensorboard", "wandb", "trackio")
RUN_ID_NAME = "tracker_run_id"
TENSORBOARD_DIR = "tensorboard"
# accelerate looks for other ranks by these.
LAUNCHER_VARIABLES = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class TrackerOptions:
    """Which trackers get the figures."""

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
        config: Mapping[str, Any],
        say: Callable[[str], None],
        last_step: int = 0,
    ) -> None:
        """Continues after `resume_step`; `last_step` was logged before. `config` is shown beside the curves.

        `say` prints a line, once for a tracker that fails; the run continues without it.
        """
        self._say = say
        self._trackers: dict[str, Any] = {}
        if not options.names:
            return
        from accelerate.state import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        # Without a state accelerate's own log lines raise errors, and with other ranks it would join their group.
        hidden = {name: os.environ.pop(name) for name in LAUNCHER_VARIABLES if name in os.environ}
        PartialState(cpu=True)
        os.environ.update(hidden)
        run_id, self._last_step = open_run(output_dir, last_step)
        run = {
            "name": f"{output_dir.resolve().name}-{run_id}",
            "resume": "allow",
            "config": {key: value if isinstance(value, int | float) else str(value) for key, value in config.items()},
        }
        arguments = {
            "tensorboard": (TENSORBOARD_DIR, {"logging_dir": output_dir, "purge_step": resume_step + 1}),
            "wandb": (options.log_project, {"dir": output_dir, "id": run_id, **run}),
            "trackio": (options.log_project, run),
        }

        def start(name: str, _: None) -> None:
            project, settings = arguments[name]
            self._trackers[name] = LOGGER_TYPE_TO_CLASS[name](project, **settings)
            self._trackers[name].start()

        self._trackers = dict.fromkeys(options.names)
        self._each(start)

    def log(self, step: int, line: Mapping[str, Any]) -> None:
        """Sends the numbers of a line of metrics.jsonl, nested ones as `loss_by_type/captions`; None is left out."""
        nested = {key: part for key, part in line.items() if isinstance(part, Mapping)}
        numbers = dict(line) | {f"{key}/{name}": value for key, part in nested.items() for name, value in part.items()}
        numbers = {key: value for key, value in numbers.items() if isinstance(value, int | float) and key != "step"}
        self._each(lambda name, tracker: tracker.log(numbers, step=step), step)

    def log_images(self, step: int, images: Mapping[str, Image.Image]) -> None:
        """Sends images of an optimizer step by name."""

        def send(name: str, tracker: Any) -> None:
            if name == "tensorboard":
                arrays = {key: np.asarray(image.convert("RGB"))[None] for key, image in images.items()}
                tracker.log_images(arrays, step=step, dataformats="NHWC")
            elif name == "wandb":
                tracker.log_images({key: [image] for key, image in images.items()}, step=step)
            else:
                # accelerate sends no images to trackio.
                import trackio

                tracker.log({key: trackio.Image(image) for key, image in images.items()}, step=step)

        self._each(send, step)

    def close(self) -> None:
        """Waits until everything was sent."""
        self._each(lambda name, tracker: tracker.finish())

    def _each(self, send: Callable[[str, Any], None], step: float = math.inf) -> None:
        for name, tracker in list(self._trackers.items()):
            # TensorBoard has hidden a step that comes again, the others cannot.
            if step <= self._last_step and name != "tensorboard":
                continue
            try:
                send(name, tracker)
            except Exception as error:
                # Whatever a package or the network does must not end hours of training.
                del self._trackers[name]
                reason = f"{type(error).__name__}: {error}"
                self._say(f"--log_with {name} is off from here on: {reason}; metrics.jsonl continues")


def open_run(output_dir: Path, last_step: int) -> tuple[str, int]:
    """(id of the run in that folder, a new one if there is none; last step that any part of the run has logged).

    The file keeps that step too: two kills in a row cut `metrics.jsonl` twice.
    """
    path = output_dir / RUN_ID_NAME
    run_id, *steps = (path.read_text().split() if path.is_file() else []) or [secrets.token_hex(4)]
    last_step = max([last_step, *(int(step) for step in steps if step.isdecimal())])
    path.write_text(f"{run_id}\n{last_step}\n")
    return run_id, last_step
