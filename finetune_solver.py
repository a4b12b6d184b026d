"""Training: from records of token files to checkpoints, by `python`, `torchrun` or `srun`, on GPUs or CPU.

    python -u finetune_solver.py --data_config exps/data/sample.yaml --init_from CHECKPOINT --output_dir output/run
    torchrun --nproc_per_node 8 finetune_solver.py ...

From top to bottom: the `Solver` (build, run, train step, log, save), and the start. The options are in
model/options.py, the checks before anything starts in model/checks.py. An optimizer step is `accum_iter x ranks` rows
of tokens (data/packing.py); its loss is a sum over all their targets divided once by their number, over ranks and
micro-steps.
"""

import contextlib
import dataclasses
import itertools
import json
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch.distributed.elastic.multiprocessing.errors import record

from data.dataset import TokenDataset
from data.item_processor import load_text_tokenizer
from data.packing import EpochPlan, PlanOptions
from data.plan_cache import PlanCache
from data.rows import EpochRows, build_loader
from data.vocab import ChameleonVocab
from model.adapter_folder import AdapterWriter, BaseWeights, open_weights
from model.async_checkpoint import CheckpointSaver, SaveError
from model.bad_data import BadData, RunError
from model.checkpoint import (
    Position,
    TrainerState,
    due_checkpoint,
    find_changes,
    find_start,
    load_checkpoint,
    lock_output_dir,
    read_state,
)
from model.checks import prepare, settle_codebook
from model.convert import load_checkpoint_weights, load_config
from model.cpu_memory import keep_freed_memory
from model.decoder.chameleon import build_config, grow_positions, init_weights
from model.distributed import (
    Launch,
    barrier,
    detect_launch,
    end_process,
    find_shared_gpu,
    from_main,
    process_group,
    stop_at_start,
    sum_counts,
)
from model.flops import peak_tokens_per_s
from model.hf_folder import resolve_checkpoint
from model.image_head import HEAD
from model.optim import build_optimizer, lr_at, set_lr
from model.options import Options, build_parser, resolve_model
from model.parallelize import allocate, build_mesh, set_matmul_precision
from model.plan import print_plan
from model.report import report_at_end
from model.run_log import RunLog, describe_losses
from model.samples import Sampler
from model.step_guard import StepGuard
from model.stop_signal import SIGNALS, NoRowsError, StopSignal, requeue_on_slurm
from model.trainable import TrainableOptions, init_adapters
from model.training import build_sharded, micro_step, optimizer_step
from model.validation import Validator
from model.watch import HangWatch, StepProfiler

PATIENCE = 4  # what is no step may take so many times --hang_timeout_s


class Solver:
    """One training run on one rank: finds where to start, builds model and optimizer, trains to the end."""

    def __init__(
        self,
        options: Options,
        launch: Launch,
        dataset: TokenDataset,
        device: torch.device,
        val_dataset: TokenDataset | None = None,
    ) -> None:
        self.options, self.launch, self.dataset, self.device = options, launch, dataset, device
        self.val_dataset = val_dataset
        found, eval_only = None, options.validation.eval_only
        if launch.is_main:
            start, notes = find_start(options.start_options)
            found = start, notes, read_state(start) if start else None
        self.start, notes, state = from_main(found)
        self.position = state.position if state else Position()
        units_per_step = options.data.accum_iter * launch.world_size
        if state and not eval_only:
            notes.append(f"going on from {self.start} after step {self.position.global_step}")
            if state.units_per_step != units_per_step:
                units_per_step = self._settle_units_per_step(state.units_per_step, units_per_step, notes)
            changes = find_changes(options.checkpoint, options.resolved, dataset.fingerprint) if launch.is_main else []
            notes += [f"careful: {change}" for change in changes]
        for name, items in (("data_config", dataset), ("val_data_config", val_dataset)):
            if items is not None and items.num_overlong:
                done = {"drop": "left out", "truncate": "cut"}[options.data.overlong]
                above = f"above --max_seq_len {options.data.max_seq_len}"
                notes.append(f"{items.num_overlong} items of --{name} {above} are {done}")
        self.stop_signal, self.stopped_by = StopSignal(), 0
        self.hang_watch = HangWatch(options.watch.hang_timeout_s, options.checkpoint.output_dir, launch.rank)
        self.bad_items = state.bad_items if state else {}
        self.plan_options = PlanOptions(
            batch_size=options.data.batch_size,
            max_seq_len=options.data.max_seq_len,
            units_per_step=units_per_step,
            packing=options.data.packing,
            length_clustering=options.data.length_clustering,
            seed=options.run.seed,
            context_dropout=options.data.context_dropout,
        )
        self.plans = PlanCache(
            dataset.table, dataset.fingerprint, self.plan_options, dataset.cache_dir, options.optim.epochs,
            plans_ahead=launch.local_rank == 0,
        )  # fmt: skip
        if launch.is_main:
            print("\n".join(notes), end="\n" if notes else "", flush=True)

    def _settle_units_per_step(self, saved: int, wanted: int, notes: list[str]) -> int:
        """The rows of a step: those of the checkpoint, unless --new_global_batch asks for others."""
        if not self.options.checkpoint.new_global_batch:
            notes.append(f"a step keeps its {saved} rows, not accum_iter x ranks = {wanted} (see --new_global_batch)")
            return saved
        step = self.position.step * saved // wanted
        self.position = dataclasses.replace(self.position, step=step)
        notes.append(f"a step has {wanted} rows from now on, not {saved}; its epoch goes on at step {step}")
        return wanted

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
                print(report_at_end(self.options.checkpoint.output_dir), flush=True)
            return
        with closing(self.hang_watch):
            self.hang_watch.expect("building the model and loading its weights", PATIENCE)
            self.build()
            with self.stop_signal, closing(self.run_log), closing(self.profiler):
                try:
                    while not self.is_finished and not self.stopped_by:
                        self.run_epoch()
                except RunError:  # on all ranks at once: a save that is on its way still ends well
                    self.end()
                    raise
                self.end()
        if not self.stopped_by:
            self.plans.close()

    def end(self) -> None:
        """Waits for the checkpoint that is on its way, and tells the run on one page."""
        self.hang_watch.expect("the last checkpoint", PATIENCE)
        self.saver.wait()
        self.hang_watch.rest()
        if self.launch.is_main:
            self.say(report_at_end(self.options.checkpoint.output_dir))

    def evaluate(self) -> int:
        """`--eval_only`: prints the figures of validation, the last line as JSON. Returns the exit code."""
        weights = self.build_model()
        load_checkpoint_weights(self.model, weights)
        figures, bad_items = self.validator.run(self.model)
        if self.launch.is_main:
            print("\n".join(f"left out: {bad.reason}" for bad in bad_items), end="\n" if bad_items else "")
            print(f"validation of {weights}: {describe_losses(figures)} in {figures['val_s']:.1f} s")
            place = {"checkpoint": weights, "step": self.position.global_step}
            print(json.dumps(place | figures | {"val_bad_items": len(bad_items)}), flush=True)
        return 3 if len(bad_items) > self.options.data.max_bad_items else 0

    def build_model(self) -> str | None:
        """Builds the sharded model, still empty; returns where its weights are, None for a fresh one."""
        options = self.options
        set_matmul_precision(options.parallel.precision)
        weights, tokenizer = (str(self.start),) * 2 if self.start else resolve_model(options.model)
        self.tokenizer = load_text_tokenizer(tokenizer)
        self.pad_id = ChameleonVocab.from_tokenizer(self.tokenizer).pad_id
        changes = {name: getattr(options.model, name) for name in ("dropout", "z_loss_weight", "mask_image_logits")}
        if weights is None:
            self.config = build_config(options.model.model_size, self.tokenizer, **changes)
        else:
            self.config = load_config(weights, **changes)
        grown = grow_positions(self.config, options.data.max_seq_len)
        if grown and self.launch.is_main:
            print(f"{grown} (--max_seq_len)", flush=True)
        self.config.codebook_sha256 = settle_codebook(self.dataset, self.config.codebook_sha256)
        self._build_sampler()
        self.mesh = build_mesh(options.parallel, self.device.type, self.launch.local_world_size)
        # Whatever was trained, the whole is what is looked at.
        trainable = TrainableOptions() if options.validation.eval_only else options.trainable
        self.model = build_sharded(self.config, self.mesh, options.parallel, trainable, options.float8)
        allocate(self.model, self.device, options.parallel)
        if self.val_dataset is not None:
            self.validator = Validator(
                self.val_dataset, self.plan_options, self.launch.rank, self.launch.world_size, self.pad_id, self.device,
                options.model.z_loss_weight, options.data.num_workers,
            )  # fmt: skip
        return weights

    def build(self) -> None:
        """Builds the model, its optimizer and the logs, and fills them from a checkpoint or a start."""
        options, weights = self.options, self.build_model()
        self.optimizer = build_optimizer(self.model, options.optim)
        adapted = self._note_frozen_weights(weights) if options.trainable.is_partial else None
        if self.start is not None:
            if adapted is not None:
                load_checkpoint_weights(
                    self.model, adapted.base.source, adapted.base.image_head_init, adapted.base.seed
                )
            try:
                load_checkpoint(self.start, self.model, self.optimizer)
            except ValueError as error:  # the same on all ranks
                raise RunError(str(error), exit_code=2) from error
        elif weights is not None:
            load_checkpoint_weights(self.model, weights, options.model.start_head_init, options.run.seed)
            init_adapters(self.model, options.run.seed)
        else:
            init_weights(self.model, options.run.seed)
        self.model.train()

        peak = peak_tokens_per_s(self.model, self.dataset.table.lengths, self.device, self.launch.world_size)
        self.run_log = RunLog(
            options, self.position.global_step, self.device, self.launch.is_main, self.dataset.types, peak
        )
        self.say = self.run_log.progress.say
        self.bad_data = BadData(options, self.bad_items, self.dataset.place, self.say, self.launch.is_main)
        self.guard = StepGuard(options.guard)
        output_dir, rank = options.checkpoint.output_dir, self.launch.rank
        self.profiler = StepProfiler(options.watch.profiled_steps, output_dir, rank, self.say)
        # The tokenizer is written from memory: the folder that it came from may be gone by then.
        self.saver = CheckpointSaver(
            options.checkpoint, self.model, self.optimizer, self.config, self.tokenizer.save_pretrained, self.say,
            adapted,
        )  # fmt: skip

    def run_epoch(self) -> None:
        """Trains the rest of the epoch in which the run stands."""
        epoch, launch = self.position.epoch, self.launch
        self.hang_watch.expect(f"the plan of epoch {epoch}", PATIENCE)
        plan = self.plans.get(epoch)
        if self.position.step >= plan.num_steps:  # planned anew, with fewer steps than were done
            self.position = Position(epoch + 1, 0, self.position.global_step)
            return
        self.plans.prefetch(epoch + 1)
        rows = EpochRows(self.dataset, plan, launch.rank, launch.world_size, self.pad_id)
        self._show_plan(plan)
        data = self.options.data
        loader = build_loader(rows, data.num_workers, data.pin_mem, start_step=self.position.step)
        loader = self.stop_signal.waiting(loader)
        for step in range(self.position.step, plan.num_steps):
            lr = lr_at(epoch + step / plan.num_steps, self.options.optim)
            self.hang_watch.expect(f"step {self.position.global_step + 1}")
            with self.profiler.step(self.position.global_step + 1):
                rows_of_step: list[Mapping[str, Any]] = []
                with self.run_log.waiting(), contextlib.suppress(NoRowsError):
                    rows_of_step = list(itertools.islice(loader, rows.micro_steps))
                self.train_step(rows_of_step, lr)

            done = step + 1
            ended = done == plan.num_steps
            self.position = Position(epoch + ended, 0 if ended else done, self.position.global_step + 1)
            checkpoint = due_checkpoint(
                self.options.checkpoint, epoch, done, plan.num_steps, rows.micro_steps,
                is_last=self.is_finished or bool(self.stopped_by), is_first=self.position.global_step == 1,
            )  # fmt: skip
            validates = self.options.validation.is_due(self.position.global_step, self.is_finished)
            samples = self.options.samples.is_due(self.position.global_step, self.is_finished)
            is_log_step = self.position.global_step % self.options.run.log_interval == 0
            if is_log_step or checkpoint or validates or samples:  # all of these leave the clock out
                self.hang_watch.expect(f"what the device had to do up to step {self.position.global_step}")
                self.log(epoch + done / plan.num_steps, lr, plan.fill)
            if validates and not self.stopped_by:  # who ends a run grants it seconds
                self.validate(epoch + done / plan.num_steps)
            if samples and not self.stopped_by:
                self.sample()
            if checkpoint:  # last: what comes after it would be lost with a kill
                self.save(checkpoint)
            self.hang_watch.rest()
            if self.is_finished or self.stopped_by:
                break

    def train_step(self, rows: Sequence[Mapping[str, Any]], lr: float) -> None:
        """One optimizer step over this rank's rows (as `data.rows.collate_row` makes them), none if none came.

        The gradient is that of the sum of the loss over all targets of the step divided by their number, over ranks and
        micro-steps; with `--loss_norm micro_batch` the mean over micro-steps and ranks of each one's mean.
        """
        self._seed_step()
        bad_items = [bad for row in rows for bad in row["bad_items"]]
        num_valid = sum(row["num_valid_tokens"] for row in rows)
        num_valid, num_bad, num_failed, num_without_rows, *signals = sum_counts(
            num_valid, len(bad_items), int(self.saver.has_failed), int(not rows), *self.stop_signal.counts()
        )
        self.stopped_by = next((number for number, count in zip(SIGNALS, signals, strict=True) if count), 0)
        if num_without_rows:
            raise RunError(str(NoRowsError(self.stopped_by)), 128 + self.stopped_by)
        if num_failed:
            self.saver.wait()  # raises SaveError
        if num_bad:
            self.bad_data.leave_out(bad_items, self.position.global_step + 1)
        for micro, row in enumerate(rows):
            divisor = num_valid
            if self.options.run.loss_norm == "micro_batch":
                divisor = row["num_valid_tokens"] * len(rows) * self.launch.world_size
            output = micro_step(
                self.model, row, self.device, self.options.parallel, is_last=micro == len(rows) - 1,
                max_seqlen=self.dataset.max_seq_len, divisor=divisor,
            )  # fmt: skip
            self.run_log.sums.add(output, row["num_tokens"], row["type_id"])
        items = [item for row in rows for item in row["item_indices"]]
        set_lr(self.optimizer, lr)
        self.grad_norm = optimizer_step(
            self.model, self.mesh, self.optimizer, self.guard, self.options.optim.clip_grad,
            self.position.global_step + 1, items,
        )  # fmt: skip
        self.run_log.progress.advance()

    def log(self, epoch: float, lr: float, fill: float) -> None:
        """One line of figures over the steps since the last one; the only place where the host waits for the device."""
        figures, ((grad_norm,), guarded) = self.run_log.collect(self.grad_norm.reshape(1), self.guard.numbers())
        skipped, is_too_many = self.guard.read(guarded)
        line = {"step": self.position.global_step, "epoch": round(epoch, 6), "lr": lr, **figures}
        line |= {"grad_norm": grad_norm, "skipped_steps": len(skipped)}
        line |= {"fill": round(fill, 4), "bad_items": len(self.bad_data.items)}
        self.run_log.write(line)
        if skipped:
            self.bad_data.report_skipped(skipped, is_too_many)

    def validate(self, epoch: float) -> None:
        """One line of the loss on the validation set, right after `log`."""
        self.hang_watch.expect(f"validation after step {self.position.global_step}", PATIENCE)
        with self.run_log.paused():
            figures, bad_items = self.validator.run(self.model, self.stop_signal.waiting)
        self.run_log.write_validation({"step": self.position.global_step, "epoch": round(epoch, 6), **figures})
        if bad_items:
            self.bad_data.leave_out(bad_items, self.position.global_step)

    def save(self, name: str) -> None:
        """Saves a checkpoint under that name; the lines of `metrics.jsonl` up to it are on disk before it is.

        Returns before it is whole (`saver.wait`). Raises SaveError, on all ranks, if it or the one before cannot be.
        """
        self.hang_watch.expect(f"the start of checkpoint {name}, or the end of the one before it", PATIENCE)
        self.run_log.sync()
        units_per_step, resolved = self.plan_options.units_per_step, dict(self.options.resolved)
        state = TrainerState(
            self.position, units_per_step, self.launch.world_size, resolved, self.dataset.fingerprint,
            self.bad_data.items,
        )  # fmt: skip
        with self.run_log.paused():
            self.saver.save(name, state)

    def sample(self) -> None:
        """Answers the prompts of `--sample_prompts` with the weights as they are."""
        self.hang_watch.expect(f"sampling after step {self.position.global_step}", PATIENCE)
        trackers = self.run_log.trackers
        with self.run_log.paused():
            log_images = trackers.log_images if trackers else None
            self.sampler.run(self.model, self.position.global_step, self.say, log_images)

    def _build_sampler(self) -> None:
        options = self.options
        if options.samples.sample_interval and not options.validation.eval_only:
            try:
                self.sampler = Sampler(
                    options.samples, options.parallel, self.config, self.tokenizer, self.device,
                    options.checkpoint.output_dir, self.position.global_step, self.launch.is_main,
                )  # fmt: skip
            except ValueError as error:
                raise SystemExit(stop_at_start(self.launch, f"finetune_solver.py: {error}")) from None

    def _note_frozen_weights(self, weights: str) -> AdapterWriter:
        """What checkpoints say of the frozen weights: what the one says from which the run goes on, or as they are."""
        output_dir = self.options.checkpoint.output_dir
        if self.start is None:
            base = BaseWeights.of(weights, output_dir, self.options.model.start_head_init, self.options.run.seed)
            folder = resolve_checkpoint(weights)
        else:
            base = BaseWeights.read(self.start)
            folder = base.find(self.start)
            if base.relative is not None:  # both may have been moved
                base = BaseWeights.of(folder, output_dir, base.image_head_init, base.seed)
        return AdapterWriter(base, self.options.trainable, open_weights(folder).dtype(HEAD))

    def _seed_step(self) -> None:
        """Dropout depends on where the run stands and on the rank, on nothing that came before."""
        place = [self.options.run.seed, self.position.epoch, self.position.step, self.launch.rank]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    def _show_plan(self, plan: EpochPlan) -> None:
        total = plan.num_steps * self.options.optim.epochs
        self.run_log.progress.expect(min(total, self.options.run.max_steps or total), self.position.global_step)
        size = f"{len(plan.items)} items, {plan.num_steps} steps of {plan.units_per_step} rows, {plan.fill:.1%} filled"
        self.say(f"epoch {self.position.epoch}: {size}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a training; returns the exit code."""
    options = Options.from_namespace(build_parser().parse_args(argv))
    launch = detect_launch()
    if options.planning.plan:
        return print_plan(options, launch)
    try:
        dataset, val_dataset = prepare(options, launch)
        writes = launch.is_main and not options.validation.eval_only
        lock = lock_output_dir(options.checkpoint.output_dir) if writes else contextlib.nullcontext()
    except (ValueError, OSError) as error:
        return stop_at_start(launch, f"finetune_solver.py: {error}")
    with lock, process_group(launch, options.run.device, options.run.dist_timeout_s) as device:
        if device.type == "cpu":
            keep_freed_memory()
            if options.run.device == "auto" and launch.is_main:
                print("torch sees no CUDA GPU: this run is on the CPU", flush=True)
        if problem := find_shared_gpu(device):
            return end_together(launch, f"finetune_solver.py: {problem}", 2)
        solver = Solver(options, launch, dataset, device, val_dataset)
        try:
            if options.validation.eval_only:
                return solver.evaluate()
            solver.run()
        except (RunError, SaveError) as error:
            return end_together(launch, f"finetune_solver.py: {error}", error.exit_code)
        except NoRowsError as error:  # in validation: the other ranks are in a collective, which ends with this rank
            print(f"finetune_solver.py: rank {launch.rank}: {error}", file=sys.stderr, flush=True)
            return 128 + error.number
        except KeyboardInterrupt:
            step = solver.position.global_step
            print(f"interrupted after step {step}; the same command goes on from the last checkpoint", file=sys.stderr)
            return 130
        except RuntimeError as error:  # raised wherever the rank was when one of its loader workers was killed
            if "DataLoader worker" not in str(error):
                raise
            raise RuntimeError(
                f"a loader worker of rank {launch.rank} died ({error}), perhaps for want of memory; the same command "
                "goes on from the last checkpoint, with fewer --num_workers if it happens again"
            ) from error
        if solver.stopped_by:
            name, step = signal.Signals(solver.stopped_by).name, solver.position.global_step
            how = requeue_on_slurm() if launch.is_main else None
            message = f"ended by {name} after step {step}, saved; {how or 'the same command goes on from here'}"
            return end_together(launch, message, 128 + solver.stopped_by)
    return 0


def end_together(launch: Launch, message: str, exit_code: int) -> int:
    """Rank 0 says why the run ends; the others wait, for a launcher ends all ranks as soon as one has failed."""
    if launch.is_main:
        print(message, file=sys.stderr, flush=True)
    barrier()
    return exit_code


if __name__ == "__main__":
    try:
        exit_code = record(main)()  # torchrun then shows the error of the rank that failed first as the last thing
    except Exception:
        traceback.print_exc()
        exit_code = 1
    end_process(exit_code or 0)  # `record` gives None where --help ends
