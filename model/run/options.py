"""The options of a training run and its command line; the defaults are those of the recipe.

    python -m model.run.options        # writes the table of flags into TRAIN.md

Each part is a dataclass beside the module that uses it. Its fields are the flags (data/flags.py).
"""

import argparse
import dataclasses
import difflib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from data.epoch.dataset import OVERLONG_CHOICES
from data.epoch.packing import OrderOptions
from data.flags import add_flags, flag, flag_rows, range_problems
from data.hub import DEFAULT_TOKENIZER
from model.decoder.chameleon import MODEL_SIZES
from model.decoder.trainable import TrainableOptions
from model.run.sample_prompts import SampleOptions
from model.run.trackers import TrackerOptions
from model.run.validation import ValidationOptions
from model.run.watch import WatchOptions
from model.training.checkpoint import CheckpointOptions
from model.training.distributed import detect_launch, stop_at_start
from model.training.float8 import Float8Options
from model.training.optim import OptimOptions
from model.training.parallelize import ParallelOptions
from model.training.step_guard import GuardOptions
from model.weights.adapter_folder import IMAGE_HEAD_INITS
from model.weights.hf_folder import find_tokenizer

# What the recipe starts from without --init_from.
DEFAULT_STARTS = {"7B": "Alpha-VLLM/Chameleon_7B_mGPT", "34B": "Alpha-VLLM/Chameleon_34B_mGPT"}
MANUAL = Path(__file__).parents[2] / "TRAIN.md"
TABLE_BEGIN = "<!-- The table is written by python -m model.run.options. -->\n"
TABLE_END = "<!-- End of the table. -->\n"


@dataclass(frozen=True)
class ModelOptions:
    """The decoder and the weights from which it starts."""

    model_size: str = flag(
        "7B", "shape without --init_from; 7B and 34B then start from the recipe's weights", choices=[*MODEL_SIZES]
    )
    init_from: str | None = flag(None, "folder or hub id to start from, whose config.json decides the shape")
    tokenizer: str | None = flag(
        None, f"folder or hub id; by default that of --init_from if it has one, else {DEFAULT_TOKENIZER}"
    )
    image_head_init: str | None = flag(
        None,
        "image rows of lm_head at the start: zeroed, kept, or drawn by --seed; by default zero for the recipe's "
        "weights, else keep",
        choices=IMAGE_HEAD_INITS,
    )
    dropout: float = flag(0.0, "probability after attention and MLP; the recipe's is 0.05", least=0, most=0.99)
    z_loss_weight: float = flag(0.0, "weight of the squared log-normalizer; the recipe's scripts pass 1e-5", least=0)
    mask_image_logits: bool = flag(
        False, "mask the logits of image tokens; rejected if there are images to learn", off="unmask_image_logits"
    )
    model_parallel_size: int = flag(1, "accepted for the recipe's commands: must be 1", least=1, most=1)

    @property
    def start_head_init(self) -> str:
        """How the image rows of `lm_head` are set at the start: "zero", "keep" or "normal"."""
        return self.image_head_init or ("keep" if self.init_from else "zero")


@dataclass(frozen=True)
class DataOptions:
    """The items, and how they become rows and steps."""

    data_config: Path | None = flag(None, "YAML that lists the records to train on; required except with --plan")
    batch_size: int = flag(4, "items per rank and micro-step", least=1)
    accum_iter: int = flag(4, "micro-steps per optimizer step", least=1)
    max_seq_len: int = flag(4096, "tokens of the longest item; the model gets at least as many positions", least=1)
    packing: bool = flag(False, "fill rows of batch_size x max_seq_len tokens best-fit", off="no_packing")
    length_clustering: bool = flag(True, "put items of similar length into a row", off="disable_length_clustering")
    overlong: str = flag("error", "what to do with longer items", choices=OVERLONG_CHOICES)
    context_dropout: float = flag(0.0, "share of items that are shown as their generated image alone", least=0, most=1)
    max_bad_items: int = flag(0, "number of items that may be skipped because they cannot be read", least=0)
    cache_ann_on_disk: bool = flag(False, "keep the index of the records in output_dir/data_index")
    mix_vqgans: bool = flag(False, "train on records, or from a checkpoint, of several VQGANs")
    num_workers: int = flag(8, "loader processes per rank; 0: none, the rank loads its rows", least=0)
    pin_mem: bool = flag(True, "page-lock the rows, for faster copies to the GPU", off="no_pin_mem")

    @property
    def max_row_len(self) -> int:
        """Tokens of the longest possible row."""
        return self.batch_size * self.max_seq_len


@dataclass(frozen=True)
class RunOptions:
    """The length of the run, its log, its seed and its device."""

    seed: int = flag(0, "seed of fresh weights, order of items and dropout", least=0)
    max_steps: int | None = flag(None, "number of optimizer steps after which the run ends with a checkpoint", least=1)
    log_interval: int = flag(10, "optimizer steps between lines of metrics.jsonl", least=1)
    loss_norm: str = flag(
        "global", "mean over the targets of a step, or of the means of micro-batches", choices=("global", "micro_batch")
    )
    device: str = flag("auto", "device of every rank; auto: CUDA where there is one", choices=("auto", "cuda", "cpu"))
    dist_timeout_s: float = flag(1800.0, "seconds that a rank waits for the others", least=1)


@dataclass(frozen=True)
class PlanningOptions:
    """The estimate of what a run needs, in place of the run."""

    plan: bool = flag(False, "print memory, steps, FLOPs and disk that the run needs, and end")
    plan_world_size: int = flag(1, "number of ranks to plan for", least=1)
    plan_gpu_gib: float | None = flag(None, "memory of a GPU in GiB: the plan then says whether the run fits", least=1)


@dataclass(frozen=True)
class Options:
    """All options of a run; `resolved`: the values by the names of the flags, for the checkpoint."""

    model: ModelOptions
    trainable: TrainableOptions
    data: DataOptions
    optim: OptimOptions
    parallel: ParallelOptions
    float8: Float8Options
    checkpoint: CheckpointOptions
    guard: GuardOptions
    trackers: TrackerOptions
    validation: ValidationOptions
    watch: WatchOptions
    samples: SampleOptions
    run: RunOptions
    planning: PlanningOptions
    resolved: Mapping[str, Any]

    @classmethod
    def from_namespace(cls, args: argparse.Namespace) -> "Options":
        parts = {
            name: part(**{field.name: getattr(args, field.name) for field in dataclasses.fields(part)})
            for name, part in option_classes().items()
        }
        return cls(**parts, resolved=vars(args))

    def problems(self, world_size: int, local_world_size: int, is_plan: bool = False) -> list[str]:
        """What is wrong with the options by themselves, one sentence each; files are not looked at.

        A plan asks neither for a GPU nor for the packages of trackers and adapters.
        """
        parallel, trainable, device = self.parallel, self.trainable, None if is_plan else self.run.device
        found = [text for name in option_classes() for text in range_problems(getattr(self, name))]
        found += trainable.problems(is_plan) + self.optim.problems()
        found += parallel.problems(world_size, local_world_size, trainable.is_partial)
        found += self.float8.problems(device, parallel.precision, trainable.is_partial, self.data.max_row_len)
        return found if is_plan else found + self.watch.problems() + self.trackers.problems()

    def order_options(self, units_per_step: int) -> OrderOptions:
        """What decides the order of an epoch beside the data."""
        names = ("batch_size", "max_seq_len", "packing", "length_clustering", "seed", "context_dropout")
        return OrderOptions(units_per_step=units_per_step, **{name: self.resolved[name] for name in names})

    @property
    def start_options(self) -> CheckpointOptions:
        """How to find the checkpoint to start from; with `--eval_only`, `--resume_path` wins over a newer one."""
        if self.validation.eval_only and self.checkpoint.resume_path is not None:
            return dataclasses.replace(self.checkpoint, auto_resume=False)
        return self.checkpoint


def option_classes() -> dict[str, type]:
    """The dataclasses of flags by their names in `Options`."""
    return {field.name: field.type for field in dataclasses.fields(Options) if dataclasses.is_dataclass(field.type)}


def resolve_model(options: ModelOptions) -> tuple[str | None, str | None]:
    """(weights to start from, tokenizer), each a folder or hub id; None: a fresh model, or no known tokenizer.

    The recipe's sizes have default weights and a default tokenizer; weights to start from may bring their own.
    """
    if options.init_from:
        return options.init_from, options.tokenizer or find_tokenizer(options.init_from)
    start = DEFAULT_STARTS.get(options.model_size)
    return start, options.tokenizer or (DEFAULT_TOKENIZER if start else None)


class Parser(argparse.ArgumentParser):
    """Reports an error in one line, on rank 0 only, with the flag that was probably meant."""

    def error(self, message: str) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        for word in message.split() if message.startswith("unrecognized") else []:
            nearest = difflib.get_close_matches(word.split("=")[0], known, n=1) if word.startswith("--") else []
            message += f"; did you mean {nearest[0]}?" if nearest else ""
        sys.exit(stop_at_start(detect_launch(), f"{self.prog}: {message} (--help lists the options)"))


def build_parser() -> argparse.ArgumentParser:
    """The command line of finetune_solver.py."""
    parser = Parser(
        prog="finetune_solver.py",
        description="Train a Chameleon-family decoder on tokenized conversations.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    for name, part in option_classes().items():
        add_flags(parser.add_argument_group(name), part)
    return parser


def flag_table() -> str:
    """The table of all flags for TRAIN.md."""
    rows = [row for part in option_classes().values() for row in flag_rows(part)]
    return "\n".join(["| Flag | Default | Meaning |", "|---|---|---|", *rows]) + "\n"


def main() -> None:
    """Writes the table into TRAIN.md."""
    table = f"{TABLE_BEGIN}{flag_table()}{TABLE_END}"
    MANUAL.write_text(re.sub(f"{TABLE_BEGIN}.*{TABLE_END}", lambda _: table, MANUAL.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
