"""Training: from records of token files to checkpoints, by `python`, `torchrun` or `srun`, on GPUs or CPU.

    python -u finetune_solver.py --data_config exps/data/sample.yaml --init_from CHECKPOINT --output_dir output/run
    torchrun --nproc_per_node 8 finetune_solver.py ...

From top to bottom: the options, the checks before anything starts, the `Solver` (build, run, train step, log, save),
and the command line. An optimizer step is `accum_iter x ranks` rows of tokens (data/packing.py); its loss is a sum over
all their targets divided once by their number, over ranks and micro-steps.
"""

import argparse
import contextlib
import dataclasses
import difflib
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from data.data_config import load_data_config
from data.dataset import OVERLONG_CHOICES, EpochRows, TokenDataset, build_loader
from data.item_processor import load_text_tokenizer
from data.packing import EpochPlan, PlanOptions
from data.vocab import ChameleonVocab
from model.chameleon import MODEL_SIZES, build_config, build_model, init_weights, reset_rotary_buffers
from model.checkpoint import (
    CheckpointOptions,
    Position,
    TrainerState,
    describe_changes,
    due_checkpoint,
    find_start,
    load_checkpoint,
    lock_output_dir,
    read_state,
    remove_old,
    save_checkpoint,
)
from model.convert import check_weights, export_hf, load_checkpoint_weights, load_config, prepare_starting_point
from model.distributed import (
    Launch,
    detect_launch,
    end_process,
    from_main,
    process_group,
    stop_at_start,
    sum_count,
    sum_over_ranks,
)
from model.metrics import MetricsFile, MetricSums, Progress, summarize
from model.optim import OptimOptions, build_optimizer, lr_at, set_lr
from model.parallelize import (
    ParallelOptions,
    begin_micro_step,
    build_mesh,
    clip_grad_norm,
    parallelize,
    set_matmul_precision,
)

# What the recipe starts from when no --init_from is given.
DEFAULT_STARTS = {"7B": "Alpha-VLLM/Chameleon_7B_mGPT", "34B": "Alpha-VLLM/Chameleon_34B_mGPT"}
DEFAULT_TOKENIZER = "Alpha-VLLM/Lumina-mGPT-7B-768"


@dataclass(frozen=True)
class ModelOptions:
    """Which decoder, from which weights; None: decided by `resolve_model`."""

    model_size: str = "7B"
    init_from: str | None = None
    tokenizer: str | None = None
    dropout: float = 0.0
    z_loss_weight: float = 0.0
    mask_image_logits: bool = False
    model_parallel_size: int = 1


@dataclass(frozen=True)
class DataOptions:
    """Which items, and how they become rows and steps."""

    data_config: Path
    batch_size: int = 4
    accum_iter: int = 4
    max_seq_len: int = 4096
    packing: bool = False
    length_clustering: bool = True
    overlong: str = "error"
    num_workers: int = 8
    pin_mem: bool = True


@dataclass(frozen=True)
class RunOptions:
    """How the run itself goes; `max_steps` and `log_interval` count optimizer steps."""

    seed: int = 0
    max_steps: int | None = None
    log_interval: int = 10
    loss_norm: str = "global"
    device: str = "auto"
    dist_timeout_s: float = 1800.0


@dataclass(frozen=True)
class Options:
    """All options of a run; `resolved` is the command line as it was understood, for the checkpoint."""

    model: ModelOptions
    data: DataOptions
    optim: OptimOptions
    parallel: ParallelOptions
    checkpoint: CheckpointOptions
    run: RunOptions
    resolved: Mapping[str, Any]

    @classmethod
    def from_namespace(cls, args: argparse.Namespace) -> "Options":
        values = vars(args)
        parts = {
            field.name: field.type(**{part.name: values[part.name] for part in dataclasses.fields(field.type)})
            for field in dataclasses.fields(cls)
            if dataclasses.is_dataclass(field.type)
        }
        return cls(**parts, resolved=values)


def prepare(options: Options, launch: Launch) -> TokenDataset:
    """Checks everything that can be checked before the ranks meet, and opens the dataset.

    Raises one ValueError that lists every problem found.
    """
    problems = [
        *_find_number_problems(options),
        *options.optim.problems(),
        *options.parallel.problems(launch.world_size, launch.local_world_size),
        *options.checkpoint.problems(),
    ]
    if options.run.device == "cuda" and not torch.cuda.is_available():
        problems.append("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    dataset = None
    try:
        sources = load_data_config(options.data.data_config)
        dataset = TokenDataset(sources, options.data.max_seq_len, options.data.overlong)
    except (ValueError, OSError) as error:
        problems.append(f"--data_config: {error}")
    problems += _find_model_problems(options.model, dataset)
    if problems:
        raise ValueError("\n  - ".join(["training cannot start:", *problems]))
    return dataset


def resolve_model(options: ModelOptions) -> tuple[str | None, str | None]:
    """(weights to start from, tokenizer), each a folder or hub id; None: a fresh model, or no tokenizer known.

    The recipe's sizes have default weights and a default tokenizer; a folder to start from brings its own tokenizer.
    """
    start = options.init_from or DEFAULT_STARTS.get(options.model_size)
    own_tokenizer = options.init_from and (Path(options.init_from) / "tokenizer.json").is_file()
    fallback = DEFAULT_TOKENIZER if start else None
    return start, options.tokenizer or (options.init_from if own_tokenizer else fallback)


class Solver:
    """One training run on one rank: finds where to start, builds model and optimizer, trains to the end."""

    def __init__(self, options: Options, launch: Launch, dataset: TokenDataset, device: torch.device) -> None:
        self.options, self.launch, self.dataset, self.device = options, launch, dataset, device
        found = None
        if launch.is_main:
            start, notes = find_start(options.checkpoint)
            found = start, notes, read_state(start) if start else None
        self.start, notes, state = from_main(found)
        self.position = state.position if state else Position()
        units_per_step = options.data.accum_iter * launch.world_size
        if state:
            notes.append(f"going on from {self.start} after step {self.position.global_step}")
            if state.units_per_step != units_per_step:
                notes.append(f"a step keeps its {state.units_per_step} rows, not accum_iter x ranks = {units_per_step}")
                units_per_step = state.units_per_step
            notes += describe_changes(state.options, options.resolved)
        self.plan_options = PlanOptions(
            batch_size=options.data.batch_size,
            max_seq_len=options.data.max_seq_len,
            units_per_step=units_per_step,
            packing=options.data.packing,
            length_clustering=options.data.length_clustering,
            seed=options.run.seed,
        )
        if launch.is_main:
            print("\n".join(notes), end="\n" if notes else "", flush=True)

    @property
    def is_finished(self) -> bool:
        max_steps = self.options.run.max_steps
        is_cut = max_steps is not None and self.position.global_step >= max_steps
        return is_cut or self.position.epoch >= self.options.optim.epochs

    def run(self) -> None:
        """Trains from where the run stands to its end, checkpoint included."""
        if self.is_finished:
            if self.launch.is_main:
                print(f"nothing left to train: step {self.position.global_step} is the end of this run", flush=True)
            return
        self.build()
        while not self.is_finished:
            self.run_epoch()
        if self.metrics_file is not None:
            self.metrics_file.close()
        self.progress.close()

    def build(self) -> None:
        """Builds the sharded model, its optimizer and the logs, and fills them from a checkpoint or a start."""
        options = self.options
        set_matmul_precision(options.parallel.precision)
        weights, tokenizer = self._find_weights()
        self.tokenizer = load_text_tokenizer(tokenizer)
        self.pad_id = ChameleonVocab.from_tokenizer(self.tokenizer).pad_id
        changes = {name: getattr(options.model, name) for name in ("dropout", "z_loss_weight", "mask_image_logits")}
        if weights is None:
            self.config = build_config(options.model.model_size, self.tokenizer, **changes)
        else:
            self.config = load_config(weights, **changes)

        self.mesh = build_mesh(options.parallel, self.device.type, self.launch.local_world_size)
        self.model = parallelize(build_model(self.config, device="meta"), self.mesh, options.parallel)
        self.model.to_empty(device=self.device)
        reset_rotary_buffers(self.model)
        self.optimizer = build_optimizer(self.model, options.optim)
        if self.start is not None:
            load_checkpoint(self.start, self.model, self.optimizer)
        elif weights is not None:
            load_checkpoint_weights(self.model, weights)
        else:
            init_weights(self.model, options.run.seed)
        self.model.train()

        self.sums = MetricSums(self.device)
        self.progress = Progress(enabled=self.launch.is_main)
        output_dir = options.checkpoint.output_dir
        self.metrics_file = MetricsFile(output_dir, self.position.global_step) if self.launch.is_main else None

    def run_epoch(self) -> None:
        """Trains the rest of the epoch in which the run stands."""
        epoch, launch = self.position.epoch, self.launch
        plan = self.dataset.plan_epoch(self.plan_options, epoch)
        rows = EpochRows(self.dataset, plan, launch.rank, launch.world_size, self.pad_id)
        self._show_plan(plan)
        data = self.options.data
        loader = iter(build_loader(rows, data.num_workers, data.pin_mem, start_step=self.position.step))
        for step in range(self.position.step, plan.num_steps):
            lr = lr_at(epoch + step / plan.num_steps, self.options.optim)
            self.train_step(list(itertools.islice(loader, rows.micro_steps)), lr)

            done = step + 1
            ended = done == plan.num_steps
            self.position = Position(epoch + ended, 0 if ended else done, self.position.global_step + 1)
            checkpoint = due_checkpoint(
                self.options.checkpoint, epoch, done, plan.num_steps, rows.micro_steps, self.is_finished
            )
            if checkpoint or self.position.global_step % self.options.run.log_interval == 0:
                self.log(epoch + done / plan.num_steps, lr)
            if checkpoint:
                self.save(checkpoint)
            if self.is_finished:
                break

    def train_step(self, rows: Sequence[Mapping[str, Any]], lr: float) -> None:
        """One optimizer step over this rank's rows (as `data.dataset.collate_row` makes them).

        The gradient is that of the sum of the loss over all targets of the step divided by their number, over ranks and
        micro-steps; with `--loss_norm micro_batch` the mean over micro-steps and ranks of each one's mean.
        """
        self._seed_step()
        num_valid = sum_count(sum(row["num_valid_tokens"] for row in rows))
        for micro_step, row in enumerate(rows):
            begin_micro_step(self.model, self.options.parallel, is_last=micro_step == len(rows) - 1)
            divisor = num_valid
            if self.options.run.loss_norm == "micro_batch":
                divisor = row["num_valid_tokens"] * len(rows) * self.launch.world_size
            output = self.model(
                input_ids=row["input_ids"].to(self.device, non_blocking=True),
                labels=row["labels"].to(self.device, non_blocking=True),
                position_ids=row["position_ids"].to(self.device, non_blocking=True),
                cu_seqlens=row["cu_seqlens"],
                max_seqlen=self.dataset.max_seq_len,
                loss_scale=1.0 / max(divisor, 1),
            )
            output.loss.backward()
            self.sums.add(output, row["num_tokens"])
        self.grad_norm = clip_grad_norm(self.model, self.mesh, self.options.optim.clip_grad)
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.advance()

    def log(self, epoch: float, lr: float) -> None:
        """One line of figures over the steps since the last one; the only place where the host waits for the device."""
        sums, seconds = self.sums.take()
        figures = summarize(sum_over_ranks(sums), self.grad_norm, seconds, self.options.model.z_loss_weight)
        line = {"step": self.position.global_step, "epoch": round(epoch, 6), "lr": lr, **figures}
        if self.metrics_file is not None:
            self.metrics_file.append(line)
        self.progress.show(line)

    def save(self, name: str) -> None:
        """Saves a checkpoint under that name; the lines of `metrics.jsonl` up to it are on disk before it is."""
        options = self.options.checkpoint
        if self.metrics_file is not None:
            self.metrics_file.sync()
        units_per_step, resolved = self.plan_options.units_per_step, dict(self.options.resolved)
        state = TrainerState(self.position, units_per_step, self.launch.world_size, resolved)
        folder = save_checkpoint(options.output_dir, name, self.model, self.optimizer, state, self._write_hf_files)
        if self.launch.is_main:
            remove_old(options.output_dir, options.ckpt_max_keep)
        self.progress.say(f"saved {folder}")
        self.sums.restart_clock()

    def _write_hf_files(self, folder: Path) -> None:
        export_hf(self.model, self.config, folder)
        if self.launch.is_main:  # from memory: the folder that it came from may be gone by now
            self.tokenizer.save_pretrained(folder)

    def _find_weights(self) -> tuple[str | None, str]:
        """(folder or hub id that gives configuration and weights, or None for a fresh model; tokenizer)."""
        if self.start is not None:
            return str(self.start), str(self.start)
        weights, tokenizer = resolve_model(self.options.model)
        if weights is not None and self.options.model.init_from is None:
            folder = self.options.checkpoint.output_dir / "starting_point"
            if self.launch.is_main:
                prepare_starting_point(weights, folder)
            weights = from_main(str(folder))
        return weights, tokenizer

    def _seed_step(self) -> None:
        """Dropout depends on where the run stands and on the rank, on nothing that came before."""
        place = [self.options.run.seed, self.position.epoch, self.position.step, self.launch.rank]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    def _show_plan(self, plan: EpochPlan) -> None:
        total = plan.num_steps * self.options.optim.epochs
        self.progress.expect(min(total, self.options.run.max_steps or total), self.position.global_step)
        size = f"{len(plan.items)} items, {plan.num_steps} steps of {plan.units_per_step} rows, {plan.fill:.1%} filled"
        self.progress.say(f"epoch {self.position.epoch}: {size}")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, on rank 0 only, and names the option that was probably meant."""

    def error(self, message: str) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        for word in message.split() if message.startswith("unrecognized") else []:
            nearest = difflib.get_close_matches(word.split("=")[0], known, n=1) if word.startswith("--") else []
            message += f"; did you mean {nearest[0]}?" if nearest else ""
        sys.exit(stop_at_start(detect_launch(), f"{self.prog}: {message} (--help lists the options)"))


def build_parser() -> argparse.ArgumentParser:
    """The command line; defaults are those of the options' dataclasses, which are the recipe's."""
    parser = Parser(
        prog="finetune_solver.py",
        description="Train a Chameleon-family decoder on tokenized conversations.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    _add_model_flags(parser.add_argument_group("model"))
    _add_data_flags(parser.add_argument_group("data"))
    _add_optim_flags(parser.add_argument_group("optimizer"))
    _add_parallel_flags(parser.add_argument_group("ranks and precision"))
    _add_checkpoint_flags(parser.add_argument_group("checkpoints"))
    _add_run_flags(parser.add_argument_group("run"))
    for part in (ModelOptions, DataOptions, OptimOptions, ParallelOptions, CheckpointOptions, RunOptions):
        fields = dataclasses.fields(part)
        parser.set_defaults(**{f.name: f.default for f in fields if f.default is not dataclasses.MISSING})
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a training; returns the exit code."""
    options = Options.from_namespace(build_parser().parse_args(argv))
    launch = detect_launch()
    try:
        dataset = prepare(options, launch)
        lock = lock_output_dir(options.checkpoint.output_dir) if launch.is_main else contextlib.nullcontext()
    except (ValueError, OSError) as error:
        return stop_at_start(launch, f"finetune_solver.py: {error}")
    has_cuda = options.run.device == "cuda" or (options.run.device == "auto" and torch.cuda.is_available())
    with lock, process_group(launch, "cuda" if has_cuda else "cpu", options.run.dist_timeout_s) as device:
        Solver(options, launch, dataset, device).run()
    return 0


def _find_model_problems(options: ModelOptions, dataset: TokenDataset | None) -> list[str]:
    found = []
    if options.model_parallel_size != 1:
        found.append(f"--model_parallel_size must be 1 (FSDP shards the model), got {options.model_parallel_size}")
    if not 0 <= options.dropout < 1:
        found.append(f"--dropout must lie between 0 and 1, got {options.dropout:g}")
    if not 0 <= options.z_loss_weight < float("inf"):
        found.append(f"--z_loss_weight must not be negative, got {options.z_loss_weight:g}")
    tokenizer = resolve_model(options)[1]
    if tokenizer is None:
        return [*found, f"--model_size {options.model_size} starts afresh: its vocabulary needs --tokenizer DIR"]
    try:
        num_rows = check_weights(options.init_from).vocab_size if options.init_from else None
        vocab_size = ChameleonVocab.from_tokenizer(load_text_tokenizer(tokenizer)).vocab_size
        if dataset is not None:
            dataset.check_first_items(num_rows or vocab_size)
    except (ValueError, OSError) as error:
        return [*found, str(error)]
    if num_rows is not None and vocab_size > num_rows:
        found.append(f"the tokenizer {tokenizer} has {vocab_size} ids, but --init_from {options.init_from} {num_rows}")
    return found


def _find_number_problems(options: Options) -> list[str]:
    least = {"batch_size": 1, "accum_iter": 1, "max_seq_len": 1, "log_interval": 1, "max_steps": 1, "dist_timeout_s": 1}
    least |= {"seed": 0, "num_workers": 0}
    given = [(name, low, options.resolved[name]) for name, low in least.items() if options.resolved[name] is not None]
    return [f"--{name} must be at least {low}, got {value}" for name, low, value in given if value < low]


def _add_model_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model_size", choices=list(MODEL_SIZES), help="shape of the decoder when nothing is loaded")
    group.add_argument("--init_from", help="folder or hub id to start from; its config.json decides the shape")
    group.add_argument("--tokenizer", help="folder or hub id; None: that of --init_from, else the recipe's")
    group.add_argument("--dropout", type=float, help="after attention and MLP, 0 to 1")
    group.add_argument("--z_loss_weight", type=float, help="weight of the squared log-normalizer in the loss")
    _add_switch(group, "mask_image_logits", "unmask_image_logits", "train without image targets, their logits masked")
    group.add_argument("--model_parallel_size", type=int, help="accepted for the recipe's commands: only 1")


def _add_data_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--data_config", type=Path, required=True, help="YAML that lists the record files")
    group.add_argument("--batch_size", type=int, help="items per rank and micro-step")
    group.add_argument("--accum_iter", type=int, help="micro-steps per optimizer step")
    group.add_argument("--max_seq_len", type=int, help="tokens of the longest item allowed")
    group.add_argument("--overlong", choices=OVERLONG_CHOICES, help="what to do with longer items")
    _add_switch(group, "packing", "no_packing", "rows of batch_size x max_seq_len tokens, filled best-fit")
    _add_switch(group, "length_clustering", "disable_length_clustering", "items of similar length share a row")
    group.add_argument("--cache_ann_on_disk", action="store_true", help="accepted for the recipe's commands")
    group.add_argument("--num_workers", type=int, help="loader processes per rank; 0 loads in the rank itself")
    _add_switch(group, "pin_mem", "no_pin_mem", "page-locked rows, for faster copies to the GPU")


def _add_optim_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--epochs", type=int, help="passes over the data; also the end of the cosine")
    group.add_argument("--warmup_epochs", type=float, help="epochs of linear warm-up from 0; 0 switches it off")
    group.add_argument("--lr", type=float, help="highest learning rate")
    group.add_argument("--min_lr", type=float, help="learning rate at the end")
    group.add_argument("--wd", type=float, help="AdamW's weight decay, on matrices")
    _add_switch(group, "decay_all", None, "weight decay on norms and biases too, as the recipe does")
    group.add_argument("--clip_grad", type=float, help="bound of the gradient's norm; 0 switches it off")
    group.add_argument("--loss_norm", choices=("global", "micro_batch"), help="mean over targets, or mean of means")


def _add_parallel_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--data_parallel", choices=("fsdp", "sdp", "hsdp"), help="see model/parallelize.py")
    group.add_argument("--hsdp_shard_size", type=int, help="ranks that share one copy under hsdp; 0: those of a node")
    group.add_argument("--precision", choices=("bf16", "fp16", "tf32", "fp32"), help="masters are fp32")
    group.add_argument("--grad_precision", choices=("fp32", "bf16", "fp16"), help="of sums of gradients over ranks")
    _add_switch(group, "checkpointing", None, "recompute activations in the backward: less memory, a third more work")
    group.add_argument("--device", choices=("auto", "cuda", "cpu"), help="auto: cuda if there is one")
    group.add_argument("--dist_timeout_s", type=float, help="seconds that a rank waits for the others")


def _add_checkpoint_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--output_dir", type=Path, default=Path("output_dir"), help="checkpoints and metrics.jsonl")
    group.add_argument("--save_interval", type=int, help="epochs between checkpoints; 0 switches off")
    group.add_argument("--save_iteration_interval", type=int, help="micro-steps between checkpoints; 0 switches off")
    group.add_argument("--only_save_trainable", action="store_true", help="accepted: every weight is trained")
    group.add_argument("--ckpt_max_keep", type=int, help="newest checkpoints kept; 0 keeps all")
    _add_switch(group, "auto_resume", "no_auto_resume", "go on from the newest checkpoint in --output_dir")
    group.add_argument("--resume_path", type=Path, help="go on from this checkpoint")


def _add_run_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--seed", type=int, help="of fresh weights, order of items and dropout")
    group.add_argument("--max_steps", type=int, help="end with a checkpoint after so many optimizer steps")
    group.add_argument("--log_interval", type=int, help="optimizer steps between lines of metrics.jsonl")


def _add_switch(group: argparse._ArgumentGroup, name: str, off: str | None, help_text: str) -> None:
    """An on/off flag `--name` / `--no-name`, and `--off`, the recipe's spelling of the latter."""
    group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=help_text)
    if off:
        group.add_argument(f"--{off}", dest=name, action="store_false", help=f"the same as --no-{name}")


if __name__ == "__main__":
    end_process(main())
