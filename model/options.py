"""The options of a training run and its command line; their defaults are the recipe's."""

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from data.dataset import OVERLONG_CHOICES
from data.hub import DEFAULT_TOKENIZER
from model.checkpoint import CheckpointOptions
from model.decoder.chameleon import MODEL_SIZES
from model.distributed import detect_launch, stop_at_start
from model.float8 import Float8Options
from model.hf_folder import find_tokenizer
from model.image_head import IMAGE_HEAD_INITS
from model.optim import OPTIMIZERS, OptimOptions
from model.parallelize import ParallelOptions
from model.samples import SampleOptions
from model.step_guard import GuardOptions
from model.trackers import TrackerOptions
from model.trainable import IMAGE_HEAD, LORA_TARGETS, TrainableOptions
from model.validation import ValidationOptions
from model.watch import WatchOptions

# What the recipe starts from when no --init_from is given.
DEFAULT_STARTS = {"7B": "Alpha-VLLM/Chameleon_7B_mGPT", "34B": "Alpha-VLLM/Chameleon_34B_mGPT"}


@dataclass(frozen=True)
class ModelOptions:
    """Which decoder, from which weights; None: decided by `resolve_model`."""

    model_size: str = "7B"
    init_from: str | None = None
    tokenizer: str | None = None
    image_head_init: str | None = None
    dropout: float = 0.0
    z_loss_weight: float = 0.0
    mask_image_logits: bool = False
    model_parallel_size: int = 1

    def problems(self) -> list[str]:
        """What is wrong with these options, one sentence each; files are not looked at."""
        found = []
        if self.model_parallel_size != 1:
            found.append(f"--model_parallel_size must be 1 (FSDP shards the model), got {self.model_parallel_size}")
        if not 0 <= self.dropout < 1:
            found.append(f"--dropout must lie between 0 and 1, got {self.dropout:g}")
        if not 0 <= self.z_loss_weight < float("inf"):
            found.append(f"--z_loss_weight must not be negative, got {self.z_loss_weight:g}")
        return found

    @property
    def start_head_init(self) -> str:
        """What becomes of the image rows of `lm_head` of the weights to start from, if there are any."""
        return self.image_head_init or ("keep" if self.init_from else "zero")


@dataclass(frozen=True)
class DataOptions:
    """Which items, and how they become rows and steps."""

    data_config: Path | None
    batch_size: int = 4
    accum_iter: int = 4
    max_seq_len: int = 4096
    packing: bool = False
    length_clustering: bool = True
    overlong: str = "error"
    context_dropout: float = 0.0
    max_bad_items: int = 0
    cache_ann_on_disk: bool = False
    mix_vqgans: bool = False
    num_workers: int = 8
    pin_mem: bool = True

    @property
    def max_row_len(self) -> int:
        """Tokens of the longest row that there may be."""
        return self.batch_size * self.max_seq_len


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
class PlanningOptions:
    """`plan`: say what the run would need, and end. For so many ranks, and a GPU of so many GiB."""

    plan: bool = False
    plan_world_size: int = 1
    plan_gpu_gib: float | None = None

    def problems(self) -> list[str]:
        """What is wrong with these options, one sentence each."""
        found = []
        if self.plan_world_size < 1:
            found.append(f"--plan_world_size must be at least 1, got {self.plan_world_size}")
        if self.plan_gpu_gib is not None and not 0 < self.plan_gpu_gib < float("inf"):
            found.append(f"--plan_gpu_gib must be above 0, got {self.plan_gpu_gib:g}")
        return found


@dataclass(frozen=True)
class Options:
    """All options of a run; `resolved` is the command line as it was understood, for the checkpoint."""

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
        values = vars(args)
        parts = {
            field.name: field.type(**{part.name: values[part.name] for part in dataclasses.fields(field.type)})
            for field in dataclasses.fields(cls)
            if dataclasses.is_dataclass(field.type)
        }
        return cls(**parts, resolved=values)

    @property
    def start_options(self) -> CheckpointOptions:
        """How to find the checkpoint to start from; with `--eval_only`, `--resume_path` goes before any newer one."""
        if self.validation.eval_only and self.checkpoint.resume_path is not None:
            return dataclasses.replace(self.checkpoint, auto_resume=False)
        return self.checkpoint


def resolve_model(options: ModelOptions) -> tuple[str | None, str | None]:
    """(weights to start from, tokenizer), each a folder or hub id; None: a fresh model, or no tokenizer known.

    The recipe's sizes have default weights and a default tokenizer; weights to start from may bring their own.
    """
    if options.init_from:
        return options.init_from, options.tokenizer or find_tokenizer(options.init_from)
    start = DEFAULT_STARTS.get(options.model_size)
    return start, options.tokenizer or (DEFAULT_TOKENIZER if start else None)


def find_number_problems(options: Options) -> list[str]:
    """What is wrong with the plain numbers, one sentence each."""
    least = {"batch_size": 1, "accum_iter": 1, "max_seq_len": 1, "log_interval": 1, "max_steps": 1, "dist_timeout_s": 1}
    least |= {"seed": 0, "num_workers": 0, "max_bad_items": 0}
    least |= {"max_bad_steps": 1, "val_interval": 0}
    given = [(name, low, options.resolved[name]) for name, low in least.items() if options.resolved[name] is not None]
    found = [f"--{name} must be at least {low}, got {value}" for name, low, value in given if value < low]
    if not 0 <= options.data.context_dropout <= 1:
        found.append(f"--context_dropout must lie between 0 and 1, got {options.data.context_dropout:g}")
    return found


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, on rank 0 only, and names the option that was probably meant."""

    def error(self, message: str) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        for word in message.split() if message.startswith("unrecognized") else []:
            nearest = difflib.get_close_matches(word.split("=")[0], known, n=1) if word.startswith("--") else []
            message += f"; did you mean {nearest[0]}?" if nearest else ""
        sys.exit(stop_at_start(detect_launch(), f"{self.prog}: {message} (--help lists the options)"))


def build_parser() -> argparse.ArgumentParser:
    """The command line of finetune_solver.py; defaults are those of the dataclasses above."""
    parser = Parser(
        prog="finetune_solver.py",
        description="Train a Chameleon-family decoder on tokenized conversations.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    _add_model_flags(parser.add_argument_group("model"))
    _add_trainable_flags(parser.add_argument_group("what is trained"))
    _add_data_flags(parser.add_argument_group("data"))
    _add_optim_flags(parser.add_argument_group("optimizer"))
    _add_parallel_flags(parser.add_argument_group("ranks and precision"))
    _add_checkpoint_flags(parser.add_argument_group("checkpoints"))
    _add_run_flags(parser.add_argument_group("run"))
    _add_plan_flags(parser.add_argument_group("plan"))
    _add_watch_flags(parser.add_argument_group("watching"))
    _add_validation_flags(parser.add_argument_group("validation"))
    _add_sample_flags(parser.add_argument_group("samples"))
    for part in dataclasses.fields(Options):
        fields = dataclasses.fields(part.type) if dataclasses.is_dataclass(part.type) else ()
        parser.set_defaults(**{f.name: f.default for f in fields if f.default is not dataclasses.MISSING})
    return parser


def _add_model_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model_size", choices=list(MODEL_SIZES), help="shape of the decoder when nothing is loaded")
    group.add_argument("--init_from", help="folder or hub id to start from; its config.json decides the shape")
    group.add_argument("--tokenizer", help="folder or hub id; None: that of --init_from, else the recipe's")
    group.add_argument(
        "--image_head_init",
        choices=IMAGE_HEAD_INITS,
        help="rows of lm_head of image tokens at the start; "
        "None: zero for the recipe's weights, keep for --init_from; a fresh model has nothing to keep or zero",
    )
    group.add_argument("--dropout", type=float, help="after attention and MLP, 0 to 1")
    group.add_argument("--z_loss_weight", type=float, help="weight of the squared log-normalizer in the loss")
    _add_switch(group, "mask_image_logits", "unmask_image_logits", "train without image targets, their logits masked")
    group.add_argument("--model_parallel_size", type=int, help="accepted for the recipe's commands: only 1")


def _add_trainable_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--lora_rank", type=int, help="train LoRA adapters of this rank (by peft); 0: none")
    group.add_argument("--lora_alpha", type=float, help="adapters add lora_alpha / lora_rank times what they compute")
    group.add_argument(
        "--lora_targets", nargs="+", metavar="NAME", help=f"projections with an adapter; None: {' '.join(LORA_TARGETS)}"
    )
    group.add_argument(
        "--train_only",
        nargs="+",
        metavar="NAME",
        help=f"{IMAGE_HEAD} (the rows of image tokens in lm_head and embedding), or patterns of parameter names; None: "
        "everything, with --lora_rank the adapters alone. What is not trained is kept in bf16, or with --precision "
        "tf32 and fp32 in fp32",
    )


def _add_data_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--data_config", type=Path, required=True, help="YAML that lists the record files")
    group.add_argument("--batch_size", type=int, help="items per rank and micro-step")
    group.add_argument("--accum_iter", type=int, help="micro-steps per optimizer step")
    group.add_argument("--max_seq_len", type=int, help="tokens of the longest item allowed")
    group.add_argument("--overlong", choices=OVERLONG_CHOICES, help="what to do with longer items")
    _add_switch(group, "packing", "no_packing", "rows of batch_size x max_seq_len tokens, filled best-fit")
    _add_switch(group, "length_clustering", "disable_length_clustering", "items of similar length share a row")
    group.add_argument("--context_dropout", type=float, help="share of items shown as their generated image alone")
    group.add_argument("--max_bad_items", type=int, help="items that may be left out because they cannot be read")
    _add_switch(
        group, "cache_ann_on_disk", None, "keep the index of the records in --output_dir, not a temporary folder"
    )
    _add_switch(group, "mix_vqgans", None, "train on records, or from a checkpoint, of several VQGANs")
    group.add_argument("--num_workers", type=int, help="loader processes per rank; 0 loads in the rank itself")
    _add_switch(group, "pin_mem", "no_pin_mem", "page-locked rows, for faster copies to the GPU")


def _add_optim_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--optim",
        type=_parse_optim,
        choices=OPTIMIZERS,
        help="moments in fp32 (8 bytes per trained parameter), or in 8 bits by torchao (2)",
    )
    group.add_argument("--epochs", type=int, help="passes over the data; also the end of the cosine")
    group.add_argument("--warmup_epochs", type=float, help="epochs of linear warm-up from 0; 0 switches it off")
    group.add_argument("--lr", type=float, help="highest learning rate")
    group.add_argument("--min_lr", type=float, help="learning rate at the end")
    group.add_argument("--wd", type=float, help="AdamW's weight decay, on matrices")
    _add_switch(group, "decay_all", None, "weight decay on norms and biases too, as the recipe does")
    group.add_argument("--clip_grad", type=float, help="bound of the gradient's norm; 0 switches it off")
    group.add_argument("--skip_grad_norm", type=float, help="skip steps whose gradient's norm is above it; 0: none")
    group.add_argument("--max_bad_steps", type=int, help="steps in a row that may be skipped before the run ends")
    group.add_argument("--loss_norm", choices=("global", "micro_batch"), help="mean over targets, or mean of means")


def _parse_optim(name: str) -> str:
    if name == "adamw_bf16_states":
        raise argparse.ArgumentTypeError(f"{name} is gone: use adamw, under which its checkpoints resume")
    return name


def _add_parallel_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--data_parallel", choices=("fsdp", "sdp", "hsdp"), help="see model/parallelize.py")
    group.add_argument("--hsdp_shard_size", type=int, help="ranks that share one copy under hsdp; 0: those of a node")
    group.add_argument("--precision", choices=("bf16", "fp16", "tf32", "fp32"), help="masters are fp32")
    group.add_argument("--grad_precision", choices=("fp32", "bf16", "fp16"), help="of sums of gradients over ranks")
    _add_switch(group, "checkpointing", None, "recompute activations in the backward: less memory, a third more work")
    group.add_argument("--checkpointing_every", type=int, help="recompute one of so many layers only; 0: see above")
    _add_switch(
        group, "checkpointing_selective", None,
        "recompute all but matrix products and attention: between no checkpointing and the full one in memory and work",
    )  # fmt: skip
    _add_switch(group, "cpu_offload", None, "weights, gradients and optimizer on the host; its step is taken there")
    _add_switch(group, "compile", "no_compile", "torch.compile of the decoder's layers; None: on CUDA only")
    _add_switch(group, "float8", None, "matrix products of the layers in fp8, by torchao (GPUs from Ada and Hopper on)")
    group.add_argument("--device", choices=("auto", "cuda", "cpu"), help="auto: cuda if there is one")
    group.add_argument("--dist_timeout_s", type=float, help="seconds that a rank waits for the others")


def _add_checkpoint_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--output_dir", type=Path, default=Path("output_dir"), help="checkpoints and metrics.jsonl")
    group.add_argument("--save_interval", type=int, help="epochs between checkpoints; 0 switches off")
    group.add_argument(
        "--save_iteration_interval", type=int, help="micro-steps of an epoch between checkpoints; 0: none"
    )
    group.add_argument("--only_save_trainable", action="store_true", help="accepted: frozen weights are never saved")
    group.add_argument("--ckpt_max_keep", type=int, help="newest checkpoints kept; 0 keeps all")
    _add_switch(group, "async_save", "no_async_save", "train on while a checkpoint is written, from a copy")
    _add_switch(group, "auto_resume", "no_auto_resume", "go on from the newest checkpoint in --output_dir")
    _add_switch(group, "resume_anyway", None, "go on although data, seed, batch size or the like have changed")
    _add_switch(group, "new_global_batch", None, "go on with steps of accum_iter x ranks rows, not the checkpoint's")
    group.add_argument("--resume_path", type=Path, help="go on from this checkpoint")


def _add_run_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--seed", type=int, help="of fresh weights, order of items and dropout")
    group.add_argument("--max_steps", type=int, help="end with a checkpoint after so many optimizer steps")


def _add_watch_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--log_interval", type=int, help="optimizer steps between lines of metrics.jsonl")
    group.add_argument("--log_with", help="trackers beside it: tensorboard, wandb, trackio, with commas between them")
    group.add_argument("--log_project", help="project under which wandb and trackio file the run")
    group.add_argument("--profile", metavar="START:END", help="first and last step of a torch profile, counted from 1")
    group.add_argument("--hang_timeout_s", type=float, help="write all stacks if a step takes longer; 0 switches off")


def _add_validation_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--val_data_config", type=Path, help="YAML of items that are not trained on; None: no validation"
    )
    group.add_argument("--val_interval", type=int, help="optimizer steps between validations; 0: only at the end")
    group.add_argument("--eval_only", action="store_true", help="validate a checkpoint, or --init_from, and end")


def _add_plan_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--plan", action=_Plan, nargs=0, help="print memory, steps, FLOPs and disk of the run, and end")
    group.add_argument("--plan_world_size", type=int, help="ranks to plan for")
    group.add_argument("--plan_gpu_gib", type=float, help="memory of a GPU in GiB: does the run fit it?")


class _Plan(argparse.Action):
    """Sets `plan`, and lets --data_config be absent: without it, a plan says all but steps and tokens."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        namespace.plan = True
        next(action for action in parser._actions if action.dest == "data_config").required = False


def _add_sample_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--sample_interval", type=int, help="optimizer steps between samples; 0 switches off")
    group.add_argument("--sample_prompts", type=Path, help="JSON or YAML list of prompts, or a text with one per line")
    group.add_argument("--sample_cfg", type=float, help="guidance inside their pictures; 1 switches it off")
    group.add_argument("--sample_temperature", type=float, help="of their tokens; 0 is greedy")
    group.add_argument("--sample_max_gen_len", type=int, help="most new tokens of an answer")
    group.add_argument("--vqgan_dir", type=Path, help="folder or hub id, of pictures in prompts and answers")
    _add_switch(group, "any_vqgan", None, "draw samples by another VQGAN than the records', too")
    group.add_argument("--target_size", type=int, help="pixels of pictures in prompts, as in pre-tokenizing")


def _add_switch(group: argparse._ArgumentGroup, name: str, off: str | None, help_text: str) -> None:
    """An on/off flag `--name` / `--no-name`, and `--off`, the recipe's spelling of the latter."""
    group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=help_text)
    if off:
        group.add_argument(f"--{off}", dest=name, action="store_false", help=f"the same as --no-{name}")
