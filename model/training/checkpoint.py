"""Checkpoints: the folders `output_dir/epoch{E}` and `epoch{E}-iter{I}`, which appear atomically.

A checkpoint holds Hugging Face files for `from_pretrained` (of the trained weights alone if others are frozen), and

    training_state/      weights (fp32 masters) and both Adam moments, sharded, by torch.distributed.checkpoint
    trainer_state.json   position, rows per step, ranks, options, versions, and the size of every other file; written
                         last, so a folder without it, or with other files, is incomplete

Random numbers need no file: every step draws from (seed, position, rank).
"""

import functools
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from data.flags import flag
from data.whole_file import open_locked, open_whole, sync_path
from model.decoder.local_shards import set_local
from model.decoder.trainable import LORA_TARGETS
from model.training.optim import ADAMW_8BIT
from model.weights.adapter_folder import NOTE_NAME
from model.weights.hf_folder import name_checkpoints_in
from model.weights.load import clean_name

STATE_NAME = "trainer_state.json"
SHARDS_NAME = "training_state"
LOCK_NAME = ".lock"
SAVING_PREFIX = ".saving-"
REPLACED_PREFIX = ".replaced-"
OPTIONS_TO_KEEP = (
    *("model_size", "seed", "batch_size", "max_seq_len"),
    *("packing", "length_clustering", "overlong", "context_dropout"),
)
# These decide which tensors a checkpoint holds, so they cannot change. The values are those of older checkpoints.
FIXED_OPTIONS = {"lora_rank": 0, "lora_alpha": 16.0, "lora_targets": None, "train_only": None, "optim": "adamw"}
# Frozen weights are in no checkpoint.
TRAINED_STATE = StateDictOptions(ignore_frozen_params=True, strict=False)
# A killed run may need a moment to end.
LOCK_PATIENCE_S = 5.0


@dataclass(frozen=True)
class CheckpointOptions:
    """Where and how often to save, how many to keep, and what to resume from. Intervals of 0 or less switch off."""

    output_dir: Path = flag(Path("output_dir"), "folder of the checkpoints and of metrics.jsonl")
    save_interval: int = flag(1, "epochs between checkpoints; 0: only at the end of the run")
    save_iteration_interval: int = flag(5000, "micro-steps of an epoch between checkpoints; 0: none")
    ckpt_max_keep: int = flag(2, "number of newest checkpoints to keep; 0: all")
    auto_resume: bool = flag(True, "resume from the newest complete checkpoint in --output_dir", off="no_auto_resume")
    resume_anyway: bool = flag(False, "resume although the data, the seed, the batch size or the like have changed")
    new_global_batch: bool = flag(False, "resume with steps of accum_iter x ranks rows, not those of the checkpoint")
    resume_path: Path | None = flag(None, "checkpoint of another run to resume from")
    async_save: bool = flag(True, "train while a checkpoint is written, from a copy in memory", off="no_async_save")
    only_save_trainable: bool = flag(False, "accepted for the recipe's commands: frozen weights are never saved")

    def problems(self) -> list[str]:
        """What is wrong with these options and with the files of `output_dir`, one sentence each."""
        if self.output_dir.exists() and not self.output_dir.is_dir():
            return [f"--output_dir must be a folder, but {self.output_dir} is a file"]
        newest, skipped = find_newest(self.output_dir)
        found = []
        if newest is None and skipped:
            # A killed save has a hidden name, so these folders were complete once.
            found.append(
                f"--output_dir {self.output_dir} holds checkpoints, but none is complete, so a run would start over: "
                f"{'; '.join(skipped)}. Restore one; or move them away; or start another run with --no_auto_resume and "
                "another --output_dir"
            )
        if self.resume_path is not None:
            try:
                step = read_state(self.resume_path).position.global_step
                if self.resumes_itself and newest and read_state(newest).position.global_step > step:
                    found.append(
                        f"--resume_path {self.resume_path} is older than {newest}: resume in another --output_dir, or "
                        "remove the newer checkpoints first"
                    )
            except ValueError as error:
                found.append(f"--resume_path: {error}; to start from weights alone use --init_from")
        if newest is not None and not self.auto_resume and not self.resumes_itself:
            found.append(
                f"--output_dir {self.output_dir} holds checkpoints of an earlier run ({newest.name}): with "
                "--no_auto_resume choose an empty folder, or leave the flag out to resume"
            )
        return found

    @property
    def resumes_itself(self) -> bool:
        """Whether `resume_path` is in `output_dir`."""
        return self.resume_path is not None and self.resume_path.resolve().parent == self.output_dir.resolve()


@dataclass(frozen=True)
class Position:
    """`step` optimizer steps of `epoch` (from 0) are done, and `global_step` steps of the whole run."""

    epoch: int = 0
    step: int = 0
    global_step: int = 0


@dataclass(frozen=True)
class TrainerState:
    """The content of `trainer_state.json`."""

    position: Position
    # Rows of an optimizer step over all ranks.
    units_per_step: int
    world_size: int
    options: dict[str, Any]
    data_fingerprint: str = ""
    # Path of a skipped item: reason.
    bad_items: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)
    # Sizes in bytes, by `seal`.
    files: dict[str, int] = field(default_factory=dict)


def due_checkpoint(
    options: CheckpointOptions,
    epoch: int,
    step: int,
    num_steps: int,
    micro_steps: int,
    is_last: bool,
    is_first: bool = False,
) -> str | None:
    """The name of the checkpoint to save after `step` of `num_steps` optimizer steps of `epoch`, if any.

    As in the recipe: `epoch{E}` at the end of an epoch, `epoch{E}-iter{I}` after I of its micro-steps. A run saves at
    its end and, so that a full disk shows early, after its first step.
    """
    if step == num_steps and (is_last or (options.save_interval > 0 and (epoch + 1) % options.save_interval == 0)):
        return f"epoch{epoch}"
    done, interval = step * micro_steps, options.save_iteration_interval
    is_due = interval > 0 and done // interval > (done - micro_steps) // interval
    return f"epoch{epoch}-iter{done}" if is_due or is_last or is_first else None


def seal(folder: Path, state: TrainerState) -> None:
    """Puts every file on disk, then writes `trainer_state.json`, which makes the folder a complete checkpoint."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files[str(path.relative_to(folder))] = path.stat().st_size
        sync_path(path)
    content = json.dumps(asdict(state) | {"files": files}, indent=1, default=str) + "\n"
    with open_whole(folder / STATE_NAME) as file:
        file.write(content.encode())


def publish(saving: Path, final: Path) -> None:
    """Gives a sealed folder its name; an older folder of that name is removed."""
    replaced = _hide(final) if final.exists() else None
    os.rename(saving, final)
    sync_path(final.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fills a sharded model and its optimizer from a checkpoint of any number of ranks; every rank calls it.

    The settings of the optimizer (weight decay and the like) stay those of this run. Raises ValueError, on all ranks,
    if a file cannot be read, or if moments in 8 bits cannot be divided.
    """
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    model_state, optimizer_state = get_state_dict(model, optimizer, options=TRAINED_STATE)
    # A checkpoint holds whole masters.
    model_state |= {name: torch.empty_like(model_state[name], dtype=torch.float32) for name in split_parameters(model)}
    state = {"model": model_state, "optimizer": {"state": optimizer_state["state"]}}
    try:
        dcp.load(state, checkpoint_id=folder / SHARDS_NAME)
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        saved = read_state(folder)
        if saved.world_size == dist.get_world_size() or saved.options.get("optim") != ADAMW_8BIT:
            raise ValueError(f"{folder} cannot be loaded: {cause}") from error
        raise ValueError(
            f"{folder} was saved by {saved.world_size} ranks and cannot be divided among "
            f"{dist.get_world_size()} ({cause}). Blocks of moments in 8 bits cannot be split: resume with the old "
            "number of ranks, or start another run with --init_from the checkpoint"
        ) from error
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=optimizer_state | state["optimizer"],
        options=TRAINED_STATE,
    )
    for name, parameter in split_parameters(model).items():
        # Above, masters were rounded and their lower halves lost.
        set_local(parameter, state["model"][name].to_local())
    for group, kept in zip(optimizer.param_groups, settings, strict=True):
        group.update(kept)


def split_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are upper halves of masters (`--master_weights split`), by their names in a state dict."""
    parameters = {clean_name(name): parameter for name, parameter in model.named_parameters()}
    return {name: parameter for name, parameter in parameters.items() if hasattr(parameter, "low_bits")}


def read_state(folder: Path) -> TrainerState:
    """Reads `trainer_state.json` and compares the files with it. Raises ValueError if the checkpoint is incomplete."""
    if not folder.is_dir():
        raise ValueError(f"there is no checkpoint folder {folder}")
    try:
        raw = json.loads((folder / STATE_NAME).read_text())
        state = TrainerState(**{**raw, "position": Position(**raw["position"])})
        if state.options.get("optim") == "adamw_bf16_states":
            # An optimizer of older versions; its moments become fp32 when they are loaded.
            state.options["optim"] = "adamw"
    except FileNotFoundError:
        within = name_checkpoints_in(folder, STATE_NAME)
        advice = f"; give {within}" if within else ""
        raise ValueError(f"{folder} is not a checkpoint to resume from: it has no {STATE_NAME}{advice}") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / STATE_NAME} cannot be read: {error!r}") from error
    for name, size in state.files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder} is incomplete: {name} is missing")
        # The note of where the frozen weights are may be edited.
        if path.stat().st_size != size and name != NOTE_NAME:
            raise ValueError(f"{folder} is incomplete: {name} has {path.stat().st_size} bytes instead of {size}")
    return state


def find_newest(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The complete checkpoint of `output_dir` with the most steps, and why others were skipped, one sentence each."""
    complete, skipped = _complete_checkpoints(output_dir)
    return (complete[-1] if complete else None), skipped


def find_start(options: CheckpointOptions) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, if any, and notes to print about the choice.

    The newest checkpoint of the run itself wins over a `resume_path` elsewhere: the same command resumes after a kill.
    """
    newest, notes = find_newest(options.output_dir) if options.auto_resume else (None, [])
    if options.resume_path is None:
        return newest, notes
    if newest is None or options.resumes_itself:
        return options.resume_path, notes
    return newest, [*notes, f"{newest} is resumed, not --resume_path {options.resume_path}: this run has begun already"]


def find_changes(
    options: CheckpointOptions, now: Mapping[str, Any], data_fingerprint: str
) -> tuple[list[str], list[str]]:
    """What has changed since the checkpoint to resume from: what must not change, and what the next steps depend on."""
    start, _ = find_start(options)
    if start is None:
        return [], []
    state = read_state(start)
    saved = {**FIXED_OPTIONS, **{name: now[name] for name in OPTIONS_TO_KEEP}, **state.options}
    changed = {
        name: f"--{name} was {saved[name]} and is {now[name]}"
        for name in (*FIXED_OPTIONS, *OPTIONS_TO_KEEP)
        # Without adapters `lora_alpha` has no meaning.
        if _meaning(name, saved[name]) != _meaning(name, now[name]) and (name != "lora_alpha" or now["lora_rank"])
    }
    others = [text for name, text in changed.items() if name in OPTIONS_TO_KEEP]
    if state.data_fingerprint not in ("", data_fingerprint):
        others.append("the items of --data_config, their lengths or ratios have changed")
    return [text for name, text in changed.items() if name in FIXED_OPTIONS], others


def remove_old(output_dir: Path, keep: int) -> None:
    """Removes all but the `keep` complete checkpoints with the most steps (0 or less: keeps all)."""
    complete, _ = _complete_checkpoints(output_dir)
    for folder in complete[:-keep] if keep > 0 else []:
        shutil.rmtree(_hide(folder))


def lock_output_dir(output_dir: Path) -> TextIO:
    """Makes `output_dir`, and keeps other runs out of it until the returned file is closed or this process ends.

    Removes what a killed save left; a sealed save gets its name. Raises ValueError if another run holds the folder.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    try:
        file = open_locked(output_dir / LOCK_NAME, LOCK_PATIENCE_S)
    except BlockingIOError:
        raise ValueError(
            f"another run writes to {output_dir}: wait for it, end it, or choose another --output_dir"
        ) from None
    for replaced in output_dir.glob(f"{REPLACED_PREFIX}*"):
        shutil.rmtree(replaced)
    for saving in output_dir.glob(f"{SAVING_PREFIX}*"):
        try:
            read_state(saving)
        except ValueError:
            shutil.rmtree(saving)
        else:
            publish(saving, output_dir / saving.name.removeprefix(SAVING_PREFIX))
    return file


@functools.cache
def collect_versions() -> dict[str, str | None]:
    """Versions of what the numbers of a run depend on, and the commit of this code (None outside of git)."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        commit = subprocess.check_output(command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True)
    except (OSError, subprocess.CalledProcessError):
        commit = ""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "commit": commit.strip() or None}


def _meaning(option: str, value: Any) -> Any:
    """The value of an option without the order of its names; None means all `lora_targets`."""
    if option == "lora_targets" and value is None:
        return set(LORA_TARGETS)
    return set(value) if isinstance(value, list) else str(value)


def _complete_checkpoints(output_dir: Path) -> tuple[list[Path], list[str]]:
    """The complete checkpoints, the oldest first, and why others were skipped."""
    steps, skipped = {}, []
    for folder in filter(Path.is_dir, sorted(output_dir.glob("epoch*"))):
        try:
            steps[folder] = read_state(folder).position.global_step
        except ValueError as error:
            skipped.append(str(error))
    return sorted(steps, key=steps.get), skipped


def _hide(folder: Path) -> Path:
    """Renames a checkpoint before its files go: a kill must not leave half of it under its name."""
    hidden = folder.with_name(f"{REPLACED_PREFIX}{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(folder, hidden)
    return hidden
