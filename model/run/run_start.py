"""The state of a run: where it starts (a checkpoint, weights or a seed), and what a rank holds until its end.

finetune_solver.py calls `find_run_start` first, then `build_run`, or for `--eval_only` `build_model`.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from data.epoch.rows import EpochRows
from data.items.item_processor import load_text_tokenizer
from data.items.vocab import ChameleonVocab
from model.decoder.chameleon import build_config, grow_positions, init_weights
from model.decoder.trainable import TrainableOptions, init_adapters
from model.run.bad_data import BadData, RunError
from model.run.checks import Setup, settle_codebook
from model.run.flops import peak_tokens_per_s
from model.run.options import resolve_model
from model.run.run_log import RunLog
from model.run.samples import Sampler
from model.run.stop_signal import StopSignal
from model.run.validation import validation_rows
from model.run.watch import HangWatch
from model.training.async_checkpoint import CheckpointSaver
from model.training.checkpoint import Position, TrainerState, find_changes, find_start, load_checkpoint, read_state
from model.training.distributed import from_main
from model.training.optim import build_optimizer
from model.training.parallelize import allocate, build_mesh, set_matmul_precision
from model.training.step import build_sharded
from model.training.step_guard import StepGuard
from model.weights.adapter_folder import AdapterWriter, BaseWeights, open_weights
from model.weights.hf_folder import load_config, resolve_checkpoint
from model.weights.load import load_checkpoint_weights


@dataclass(frozen=True, kw_only=True)
class Run(Setup):
    """What a rank holds of a run. The position alone changes from step to step; the training loop keeps it."""

    # At the start of the run, which a checkpoint repeats with another position.
    state: TrainerState
    pad_id: int
    val_rows: EpochRows | None
    model: nn.Module
    mesh: DeviceMesh
    optimizer: torch.optim.Optimizer
    guard: StepGuard
    saver: CheckpointSaver
    sampler: Sampler | None
    bad_data: BadData
    log: RunLog
    hang_watch: HangWatch
    stop_signal: StopSignal


def find_run_start(setup: Setup) -> tuple[Path | None, TrainerState]:
    """(checkpoint to resume from, None for a new run; state of this run at its start), the same on all ranks."""
    options, launch = setup.options, setup.launch
    found = None
    if launch.is_main:
        # Rank 0 alone looks: a shared disk may show the others an older state of the folder.
        folder, notes = find_start(options.start_options)
        found = folder, notes, read_state(folder) if folder else None
    folder, notes, saved = from_main(found)
    num_units, fingerprint = options.data.accum_iter * launch.world_size, setup.dataset.fingerprint
    state = TrainerState(Position(), num_units, launch.world_size, dict(options.resolved), fingerprint)
    if saved is not None:
        state = dataclasses.replace(state, position=saved.position, bad_items=saved.bad_items)
    if saved is not None and not options.validation.eval_only:
        notes.append(f"resuming from {folder} after step {saved.position.global_step}")
        before = saved.units_per_step
        if before != num_units and options.checkpoint.new_global_batch:
            step = saved.position.step * before // num_units
            state = dataclasses.replace(state, position=dataclasses.replace(saved.position, step=step))
            notes.append(f"a step now has {num_units} rows, not {before}: the epoch continues at step {step}")
        elif before != num_units:
            state = dataclasses.replace(state, units_per_step=before)
            ours = f"accum_iter x ranks = {num_units}"
            notes.append(f"a step keeps its {before} rows, not {ours} (see --new_global_batch)")
        if launch.is_main:
            _, changes = find_changes(options.checkpoint, options.resolved, fingerprint)
            notes += [f"warning: {change}" for change in changes]
    for note in notes:
        setup.say(note)
    return folder, state


def build_model(setup: Setup, folder: Path | None) -> tuple[nn.Module, DeviceMesh, Any, str | None]:
    """(sharded model without values, its mesh, tokenizer, folder or hub id of its weights; None: fresh weights)."""
    options = setup.options
    set_matmul_precision(options.parallel.precision)
    weights, tokenizer = (str(folder), str(folder)) if folder else resolve_model(options.model)
    tokenizer = load_text_tokenizer(tokenizer)
    changes = {name: getattr(options.model, name) for name in ("dropout", "z_loss_weight", "mask_image_logits")}
    size = options.model.model_size
    config = load_config(weights, **changes) if weights else build_config(size, tokenizer, **changes)
    if grown := grow_positions(config, options.data.max_seq_len):
        setup.say(f"{grown} (--max_seq_len)")
    config.codebook_sha256 = settle_codebook(setup.dataset, config.codebook_sha256)
    mesh = build_mesh(options.parallel, setup.device.type, setup.launch.local_world_size)
    row_len, launch = options.data.max_row_len, setup.launch
    warning = options.parallel.slow_reduction(row_len, launch.world_size, launch.local_world_size)
    # Gradients of what a partial training trains are small.
    if warning and not options.trainable.is_partial:
        setup.say(warning)
    # An evaluation reads adapters merged into the weights.
    trainable = TrainableOptions() if options.validation.eval_only else options.trainable
    model = build_sharded(config, mesh, options.parallel, trainable, options.float8)
    allocate(model, setup.device, options.parallel)
    return model, mesh, tokenizer, weights


def build_run(setup: Setup, folder: Path | None, state: TrainerState, hang_watch: HangWatch) -> Run:
    """Builds all that a run needs, filled from a checkpoint or a start. Raises RunError, on all ranks."""
    options, launch, step = setup.options, setup.launch, state.position.global_step
    model, mesh, tokenizer, weights = build_model(setup, folder)
    sampler = Sampler(setup, model.config, tokenizer, step) if options.samples.sample_interval else None
    optimizer = build_optimizer(model, options.optim)
    adapted = _fill_model(setup, folder, weights, model, optimizer)
    model.train()
    pad_id, val_rows = ChameleonVocab.from_tokenizer(tokenizer).pad_id, None
    if setup.val_dataset is not None:
        order = options.order_options(state.units_per_step)
        val_rows = validation_rows(setup.val_dataset, order, launch.rank, launch.world_size, pad_id)
    peak = peak_tokens_per_s(model, setup.dataset.table.lengths, setup.device, launch.world_size)
    # The tokenizer is written from memory: the folder that it came from may be gone.
    parts = model, optimizer, model.config, tokenizer.save_pretrained, setup.say, adapted
    return Run(
        **vars(setup),
        state=state,
        pad_id=pad_id,
        val_rows=val_rows,
        model=model,
        mesh=mesh,
        optimizer=optimizer,
        guard=StepGuard(options.guard),
        saver=CheckpointSaver(options.checkpoint, *parts),
        sampler=sampler,
        bad_data=BadData(setup, state.bad_items),
        log=RunLog(setup, step, peak),
        hang_watch=hang_watch,
        stop_signal=StopSignal(),
    )


def _fill_model(
    setup: Setup, folder: Path | None, weights: str | None, model: nn.Module, optimizer: torch.optim.Optimizer
) -> AdapterWriter | None:
    """Gives a model and its optimizer their values; returns what writes adapters, None if all weights are trained."""
    options, seed = setup.options, setup.options.run.seed
    adapted = _note_frozen_weights(setup, folder, weights) if options.trainable.is_partial else None
    if folder is not None:
        if adapted is not None:
            load_checkpoint_weights(model, adapted.base.source, adapted.base.image_head_init, adapted.base.seed)
        try:
            load_checkpoint(folder, model, optimizer)
        except ValueError as error:
            raise RunError(str(error), exit_code=2) from error
    elif weights is not None:
        load_checkpoint_weights(model, weights, options.model.start_head_init, seed)
        init_adapters(model, seed)
    else:
        init_weights(model, seed)
    return adapted


def _note_frozen_weights(setup: Setup, folder: Path | None, weights: str) -> AdapterWriter:
    """What checkpoints note of the frozen weights: where they are, and how their image rows were set."""
    options, output_dir = setup.options, setup.options.checkpoint.output_dir
    if folder is None:
        base = BaseWeights.of(weights, output_dir, options.model.start_head_init, options.run.seed)
        base_folder = resolve_checkpoint(weights)
    else:
        base = BaseWeights.read(folder)
        base_folder = base.find(folder)
        if base.relative is not None:
            # Base and output folder may have been moved together: note where they are now.
            base = BaseWeights.of(base_folder, output_dir, base.image_head_init, base.seed)
    return AdapterWriter(base, options.trainable, open_weights(base_folder).dtype("lm_head.weight"))
