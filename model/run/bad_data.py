"""What a run skips: items that cannot be read, and steps whose gradient is not finite or too large.

Lines of `bad_items.jsonl` and of `bad_steps.jsonl`:

    {"step": 3, "place": "/data/files/5.pkl", "reason": "..."}
    {"step": 3, "items": ["/data/files/5.pkl"]}
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from data.epoch.rows import BadItem
from model.run.checks import Setup
from model.training.distributed import gather_lists

BAD_ITEMS_NAME = "bad_items.jsonl"
BAD_STEPS_NAME = "bad_steps.jsonl"


class RunError(Exception):
    """Why all ranks end the run at once: a message for the user, and the exit code of the process."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class BadData:
    """The skipped items and steps of a run; all ranks call every method at once."""

    def __init__(self, setup: Setup, skipped_before: Mapping[str, str]) -> None:
        """`skipped_before`: reasons of items by their place on disk, from the checkpoint."""
        self.items = dict(skipped_before)
        self._setup, self._options = setup, setup.options

    def skip_items(self, bad_items: Sequence[BadItem], step: int) -> None:
        """Notes items that a rank could not read. Raises RunError if there are too many."""
        for bad in gather_lists(list(bad_items)):
            if bad.place not in self.items:
                self.items[bad.place] = bad.reason
                self._append(BAD_ITEMS_NAME, {"step": step, "place": bad.place, "reason": bad.reason})
                self._setup.say(f"skipped item: {bad.reason}")
        most = self._options.data.max_bad_items
        if len(self.items) > most:
            count = f"{len(self.items)} items cannot be read (--max_bad_items {most}), the last"
            way = "Repair them, or raise --max_bad_items to train without them"
            raise RunError(f"{count}: {list(self.items.values())[-1]}. {way}", exit_code=3)

    def skip_steps(self, skipped: Sequence[tuple[int, list[int]]], is_too_many: bool) -> None:
        """Notes the items of skipped steps. Raises RunError if there were too many steps in a row."""
        places: dict[int, list[str]] = {}
        for step, items in gather_lists(list(skipped)):
            places.setdefault(step, []).extend(map(self._setup.dataset.place, items))
        for step, items in places.items():
            self._append(BAD_STEPS_NAME, {"step": step, "items": items})
        steps = f"{len(places)} step{'s' if len(places) > 1 else ''}"
        self._setup.say(f"skipped {steps}: gradient not finite or too large (see {BAD_STEPS_NAME})")
        if is_too_many:
            raise RunError(
                f"{self._options.guard.max_bad_steps} steps in a row had a gradient that is not finite or above "
                f"--skip_grad_norm and were skipped, the last step {max(places)}. The weights are those before these "
                f"steps. {BAD_STEPS_NAME} in --output_dir lists the items. Inspect them, lower --lr, or raise "
                "--max_bad_steps",
                exit_code=1,
            )

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        if self._setup.launch.is_main:
            with (self._options.checkpoint.output_dir / name).open("a") as file:
                file.write(json.dumps(line) + "\n")
