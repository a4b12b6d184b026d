"""What a run could not use: items that cannot be read and steps that were skipped, written down in `output_dir`.

Both are agreed on by all ranks, told once, and end the run (`RunError`) if there are too many.
"""

import json
from collections.abc import Callable, Mapping, Sequence

from data.rows import BadItem
from model.distributed import gather_lists
from model.options import Options

BAD_ITEMS_NAME = "bad_items.jsonl"
BAD_STEPS_NAME = "bad_steps.jsonl"


class RunError(Exception):
    """What all ranks agree to end at; the message is for the person, `exit_code` for the shell."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class BadData:
    """The items left out and the steps skipped in one run; every method is called by all ranks at once."""

    def __init__(
        self,
        options: Options,
        found: Mapping[str, str],
        place: Callable[[int], str],
        say: Callable[[str], None],
        is_main: bool,
    ) -> None:
        """`found`: the items that are left out already, place on disk: reason. `place(item)` tells where one lies."""
        self.items = dict(found)
        self._output_dir, self._place, self._say, self._is_main = options.checkpoint.output_dir, place, say, is_main
        self._max_bad_items, self._max_bad_steps = options.data.max_bad_items, options.guard.max_bad_steps

    def leave_out(self, bad_items: Sequence[BadItem], step: int) -> None:
        """Notes the items of all ranks' rows that could not be read. Raises RunError if there are too many."""
        for bad in gather_lists(list(bad_items)):
            if bad.place in self.items:
                continue
            self.items[bad.place] = bad.reason
            if self._is_main:
                line = {"step": step, "place": bad.place, "reason": bad.reason}
                with (self._output_dir / BAD_ITEMS_NAME).open("a") as file:
                    file.write(json.dumps(line) + "\n")
                self._say(f"left out: {bad.reason}")
        if len(self.items) > self._max_bad_items:
            raise RunError(
                f"{len(self.items)} items cannot be read (--max_bad_items {self._max_bad_items}), the last: "
                f"{list(self.items.values())[-1]}. Mend them, or give --max_bad_items a larger number to train without "
                "them",
                exit_code=3,
            )

    def report_skipped(self, skipped: Sequence[tuple[int, list[int]]], is_too_many: bool) -> None:
        """Writes down which items the skipped steps held. Raises RunError if there were too many in a row."""
        held: dict[int, list[str]] = {}
        for step, items in gather_lists(list(skipped)):
            held.setdefault(step, []).extend(map(self._place, items))
        if self._is_main:
            with (self._output_dir / BAD_STEPS_NAME).open("a") as file:
                file.writelines(json.dumps({"step": step, "items": places}) + "\n" for step, places in held.items())
            steps = f"{len(held)} step{'s' if len(held) > 1 else ''}"
            self._say(f"skipped {steps}: gradient not finite or too large (see {BAD_STEPS_NAME})")
        if is_too_many:
            raise RunError(
                f"{self._max_bad_steps} steps in a row had a gradient that is not finite or above --skip_grad_norm and "
                f"were skipped, the last step {max(held)}. The weights are those before them; {BAD_STEPS_NAME} in "
                "--output_dir lists the items. Look at them, lower --lr, or go on with --max_bad_steps",
                exit_code=1,
            )
