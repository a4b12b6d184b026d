"""Training: from records of token files to checkpoints, on GPUs or a CPU.

    python -u finetune_solver.py --data_config exps/data/sample.yaml --init_from CHECKPOINT --output_dir output/run
    torchrun --nproc_per_node 8 finetune_solver.py ...

An optimizer step takes `accum_iter x ranks` rows of tokens. Its loss is the sum over all their targets divided once by
their number, over ranks and micro-steps. From top to bottom: the start, evaluation, the training loop, a step.
"""

import contextlib
import dataclasses
import itertools
import json
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch.distributed.elastic.multiprocessing.errors import record

from data.epoch.packing import plan_epoch
from data.epoch.rows import EpochRows, build_loader
from data.items.vocab import ChameleonVocab
from model.plan.plan import print_plan
from model.report import report_at_end
from model.run.bad_data import RunError
from model.run.checks import Setup, prepare
from model.run.options import Options, build_parser
from model.run.run_log import describe_losses
from model.run.run_start import Run, build_model, build_run, find_run_start
from model.run.stop_signal import SIGNALS, NoRowsError, requeue_on_slurm
from model.run.validation import validate, validation_rows
from model.run.watch import HangWatch, profiling
from model.training.async_checkpoint import SaveError
from model.training.checkpoint import Position, due_checkpoint, lock_output_dir
from model.training.cpu_memory import keep_freed_memory
from model.training.distributed import (
    barrier,
    detect_launch,
    end_alone,
    end_process,
    find_shared_gpu,
    process_group,
    stop_at_start,
    sum_counts,
)
from model.training.optim import lr_at, set_lr
from model.training.step import micro_step, optimizer_step
from model.weights.load import load_checkpoint_weights

# The start, and what follows a step's line of the log (samples, ...), may take so many times --hang_timeout_s.
PATIENCE = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a training, an evaluation or a plan; returns the exit code."""
    options = Options.from_namespace(build_parser().parse_args(argv))
    launch = detect_launch()
    if options.planning.plan:
        return print_plan(options, launch)
    eval_only = options.validation.eval_only
    try:
        dataset, val_dataset = prepare(options, launch)
        writes = launch.is_main and not eval_only
        lock = lock_output_dir(options.checkpoint.output_dir) if writes else contextlib.nullcontext()
    except (ValueError, OSError) as error:
        return stop_at_start(launch, f"finetune_solver.py: {error}")
    with lock, process_group(launch, options.run.device, options.run.dist_timeout_s) as device:
        setup = Setup(options=options, launch=launch, device=device, dataset=dataset, val_dataset=val_dataset)
        try:
            if problem := find_shared_gpu(device):
                raise RunError(problem, exit_code=2)
            if device.type == "cpu":
                keep_freed_memory()
                if options.run.device == "auto":
                    setup.say("torch sees no CUDA GPU: this run is on the CPU")
            return evaluate(setup) if eval_only else train(setup)
        except (RunError, SaveError) as error:
            if launch.is_main:
                print(f"finetune_solver.py: {error}", file=sys.stderr, flush=True)
            # A launcher ends all ranks as soon as one has failed: rank 0 prints first.
            barrier()
            return error.exit_code
        except NoRowsError as error:
            return end_alone(launch, f"finetune_solver.py: rank {launch.rank}: {error}", 128 + error.number)
        except KeyboardInterrupt:
            return end_alone(launch, "interrupted; the same command resumes from the last checkpoint", 130)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            advice = "give fewer --num_workers, or the container more memory (docker --shm-size)"
            message = f"rank {launch.rank}: {str(error).strip()}; {advice}; the same command resumes"
            return end_alone(launch, f"finetune_solver.py: {message}", 1)


def evaluate(setup: Setup) -> int:
    """`--eval_only`: prints the losses of validation, the last line as JSON. Returns the exit code."""
    options, launch = setup.options, setup.launch
    folder, state = find_run_start(setup)
    model, _, tokenizer, weights = build_model(setup, folder)
    load_checkpoint_weights(model, weights)
    pad_id = ChameleonVocab.from_tokenizer(tokenizer).pad_id
    order = options.order_options(state.units_per_step)
    rows = validation_rows(setup.val_dataset, order, launch.rank, launch.world_size, pad_id)
    figures, bad_items = validate(model, rows, setup.device, options.model.z_loss_weight, options.data.num_workers)
    for bad in bad_items:
        setup.say(f"skipped item: {bad.reason}")
    setup.say(f"validation of {weights}: {describe_losses(figures)} in {figures['val_s']:.1f} s")
    place = {"checkpoint": weights, "step": state.position.global_step}
    setup.say(json.dumps(place | figures | {"val_bad_items": len(bad_items)}))
    return 3 if len(bad_items) > options.data.max_bad_items else 0


def train(setup: Setup) -> int:
    """Trains to the end of the run, or until a signal. Either way ends with a checkpoint. Returns the exit code."""
    options, launch = setup.options, setup.launch
    folder, state = find_run_start(setup)
    if is_finished(options, state.position):
        setup.say(f"nothing left to train: step {state.position.global_step} is the end of this run")
        write_report(setup)
        return 0
    place = options.checkpoint.output_dir, launch.rank
    with closing(HangWatch(options.watch.hang_timeout_s, *place)) as hang_watch:
        hang_watch.restart(PATIENCE)
        run = build_run(setup, folder, state, hang_watch)
        profiled = options.watch.profiled_steps, state.position.global_step, *place, run.say
        with run.stop_signal, closing(run.log), profiling(*profiled) as profile_step:
            try:
                position, stopped_by = train_epochs(run, profile_step)
            except RunError:
                # All ranks raise it at the same place, so the save in the background can still be completed.
                finish(run)
                raise
            finish(run)
    if stopped_by:
        advice = (requeue_on_slurm() if launch.is_main else None) or "the same command resumes from here"
        ended = f"ended by {signal.Signals(stopped_by).name} after step {position.global_step}"
        raise RunError(f"{ended}, saved; {advice}", 128 + stopped_by)
    return 0


def train_epochs(run: Run, profile_step: Callable[[], None]) -> tuple[Position, int]:
    """Trains to the end of the run or until a signal. Returns (position, signal or 0)."""
    options, position, stopped_by = run.options, run.state.position, 0
    while not is_finished(options, position) and not stopped_by:
        rows = open_epoch(run, position)
        epoch, num_steps = position.epoch, rows.order.num_steps
        if position.step >= num_steps:
            # The data have changed, and the epoch has fewer steps than were taken.
            position = Position(epoch + 1, 0, position.global_step)
            continue
        settings = options.data.num_workers, options.data.pin_mem, position.step
        loader = run.stop_signal.waiting(build_loader(rows, *settings))
        for done in range(position.step + 1, num_steps + 1):
            lr = lr_at(epoch + (done - 1) / num_steps, options.optim)
            run.hang_watch.restart()
            step_rows: list[Mapping[str, Any]] = []
            with run.log.waiting(), contextlib.suppress(NoRowsError):
                step_rows = list(itertools.islice(loader, rows.micro_steps))
            grad_norm, stopped_by = train_step(run, position, step_rows, lr)
            profile_step()
            step = position.global_step + 1
            position = Position(epoch, done, step) if done < num_steps else Position(epoch + 1, 0, step)
            run.hang_watch.restart()
            is_end = is_finished(options, position)
            is_last = is_end or bool(stopped_by)
            place = epoch, done, num_steps, rows.micro_steps
            checkpoint = due_checkpoint(options.checkpoint, *place, is_last=is_last, is_first=step == 1)
            # After a signal only seconds remain: no validation and no samples.
            validates = not stopped_by and options.validation.is_due(step, is_end)
            samples = not stopped_by and options.samples.is_due(step, is_end)
            line = {"step": step, "epoch": round(epoch + done / num_steps, 6)}
            if step % options.run.log_interval == 0 or checkpoint or validates or samples:
                log_step(run, line | {"lr": lr}, grad_norm, rows.order.fill)
            run.hang_watch.restart(PATIENCE)
            # Not counted as training time, which is why a line of the log comes before it.
            with run.log.paused():
                if validates:
                    validate_step(run, line)
                if samples:
                    run.log.log_images(step, run.sampler.run(run.model, step))
                # Last: a kill would lose what comes after it.
                if checkpoint:
                    save(run, position, checkpoint)
            run.hang_watch.stop()
            if is_last:
                break
    return position, stopped_by


def open_epoch(run: Run, position: Position) -> EpochRows:
    """This rank's rows of the epoch at `position`."""
    options, launch, epoch = run.options, run.launch, position.epoch
    run.hang_watch.restart(PATIENCE)
    order = plan_epoch(run.dataset.table, options.order_options(run.state.units_per_step), epoch)
    total = order.num_steps * options.optim.epochs
    run.log.expect(min(total, options.run.max_steps or total))
    size = f"{len(order.items)} items, {order.num_steps} steps of {order.units_per_step} rows, {order.fill:.1%} filled"
    run.say(f"epoch {epoch}: {size}")
    return EpochRows(run.dataset, order, launch.rank, launch.world_size, run.pad_id)


def train_step(run: Run, position: Position, rows: Sequence[Mapping[str, Any]], lr: float) -> tuple[torch.Tensor, int]:
    """One optimizer step over this rank's rows (as `data.epoch.rows.collate_row` makes them).

    The gradient is that of the sum of the loss over all targets of the step divided by their number, over ranks and
    micro-steps. With `--loss_norm micro_batch` it is the mean over micro-steps and ranks of their means.

    Returns (norm of the gradient, a scalar on the device; the signal that ends the run, or 0). Raises RunError and
    SaveError, on all ranks.
    """
    # Dropout depends on the position and the rank alone, so that a resumed run draws the same.
    place = [run.options.run.seed, position.epoch, position.step, run.launch.rank]
    torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
    step = position.global_step + 1
    num_valid, stopped_by = agree_on_step(run, step, rows)
    for index, row in enumerate(rows):
        divisor = num_valid
        if run.options.run.loss_norm == "micro_batch":
            divisor = row["num_valid_tokens"] * len(rows) * run.launch.world_size
        output = micro_step(
            run.model,
            row,
            run.device,
            run.options.parallel,
            is_last=index == len(rows) - 1,
            max_seqlen=run.dataset.max_seq_len,
            divisor=divisor,
        )
        run.log.sums.add(output, row["num_tokens"], row["type_id"])
    set_lr(run.optimizer, lr)
    items = [item for row in rows for item in row["item_indices"]]
    clip_grad = run.options.optim.clip_grad
    grad_norm = optimizer_step(run.model, run.mesh, run.optimizer, run.guard, clip_grad, step, items)
    run.log.advance()
    return grad_norm, stopped_by


def agree_on_step(run: Run, step: int, rows: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """(targets of the step over all ranks; the signal that ends the run, or 0), by one collective on the host.

    A problem of one rank is raised on all ranks: the collectives of the step would wait forever for a missing rank.
    """
    bad_items = [bad for row in rows for bad in row["bad_items"]]
    num_valid = sum(row["num_valid_tokens"] for row in rows)
    own = num_valid, len(bad_items), int(run.saver.has_failed), int(not rows), *run.stop_signal.counts()
    num_valid, num_bad, num_failed, num_without_rows, *signals = sum_counts(*own)
    stopped_by = next((number for number, count in zip(SIGNALS, signals, strict=True) if count), 0)
    if num_without_rows:
        raise RunError(str(NoRowsError(stopped_by)), 128 + stopped_by)
    if num_failed:
        # Raises the SaveError of the save in the background.
        run.saver.wait()
    if num_bad:
        run.bad_data.skip_items(bad_items, step)
    return num_valid, stopped_by


def log_step(run: Run, line: Mapping[str, Any], grad_norm: torch.Tensor, fill: float) -> None:
    """Writes a line of figures over the steps since the last line, the only time that the host waits for the device.

    `line` has the step, the epoch and the learning rate.
    """
    figures, ((norm,), guarded) = run.log.collect(grad_norm.reshape(1), run.guard.numbers())
    skipped, is_too_many = run.guard.read(guarded)
    line = {**line, **figures, "grad_norm": norm, "skipped_steps": len(skipped), "fill": round(fill, 4)}
    run.log.write(line | {"bad_items": len(run.bad_data.items)})
    if skipped:
        run.bad_data.skip_steps(skipped, is_too_many)


def validate_step(run: Run, line: Mapping[str, Any]) -> None:
    """Writes a line of the loss on the validation set; `line` has the step and the epoch."""
    settings = run.options.model.z_loss_weight, run.options.data.num_workers, run.stop_signal.waiting
    figures, bad_items = validate(run.model, run.val_rows, run.device, *settings)
    run.log.write_validation({**line, **figures})
    if bad_items:
        run.bad_data.skip_items(bad_items, line["step"])


def save(run: Run, position: Position, name: str) -> None:
    """Starts to save a checkpoint, which `finish` or the next one waits for. Raises SaveError, on all ranks."""
    # The lines up to the checkpoint are on disk before it is complete.
    run.log.sync()
    run.saver.save(name, dataclasses.replace(run.state, position=position, bad_items=run.bad_data.items))


def finish(run: Run) -> None:
    """Waits for the last checkpoint and writes the page about the run."""
    run.hang_watch.restart(PATIENCE)
    run.saver.wait()
    run.hang_watch.stop()
    write_report(run)


def write_report(setup: Setup) -> None:
    """Writes `report.html`, on rank 0."""
    if setup.launch.is_main:
        setup.say(report_at_end(setup.options.checkpoint.output_dir))


def is_finished(options: Options, position: Position) -> bool:
    """Whether a position is the end of the run."""
    max_steps = options.run.max_steps
    return position.epoch >= options.optim.epochs or (max_steps is not None and position.global_step >= max_steps)


if __name__ == "__main__":
    try:
        # torchrun then shows the error of the rank that failed first as the last thing.
        exit_code = record(main)()
    except Exception:
        traceback.print_exc()
        exit_code = 1
    # `record` returns None where --help ends.
    end_process(exit_code or 0)
