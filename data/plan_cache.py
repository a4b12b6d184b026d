"""Epoch plans on disk: made once per node, in the background of the epoch before, and opened by all of its ranks.

A plan is a folder `plan-{hash of data, options and epoch}` of arrays and `plan.json`, written under another name and
renamed, so that it is whole or absent. The planner is a forked process of low priority, and not a thread, which would
take its share of the training loop's interpreter. If it is killed, whoever needs the plan next makes it.
"""

import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.file_lock import open_locked
from data.packing import EpochPlan, ItemTable, PlanOptions, plan_epoch
from data.whole_file import sync_path

PLAN_VERSION = 1  # of what `plan_epoch` gives for the same arguments
PLAN_NAME = "plan.json"
ARRAYS = ("items", "unit_offsets", "row_lens", "step_offsets")
MIN_ITEMS_AHEAD = 20_000  # fewer are planned in milliseconds
NICENESS = 10
PARENT_CHECK_S = 1.0


class PlanCache:
    """The plans of a run over the items of `table`, whose content `fingerprint` names. Use `close` at the end."""

    def __init__(
        self,
        table: ItemTable,
        fingerprint: str,
        options: PlanOptions,
        cache_dir: Path,
        num_epochs: int,
        plans_ahead: bool,
    ):
        """`plans_ahead`: this rank makes plans in the background and removes old ones; one per node should."""
        self.table, self.fingerprint, self.options = table, fingerprint, options
        self.cache_dir, self.num_epochs, self.plans_ahead = cache_dir, num_epochs, plans_ahead
        self._planner: multiprocessing.Process | None = None
        self._latest = 0

    def get(self, epoch: int) -> EpochPlan:
        """The plan of `epoch`, its arrays mapped from disk; waits for whoever is making it, or makes it."""
        plan = self._make(epoch)
        self._latest = epoch
        self._remove(epoch - 2)  # all ranks have opened the one after it
        return plan

    def prefetch(self, epoch: int) -> None:
        """Begin to make the plan of `epoch` in the background, if it is one of the run and not there."""
        is_worth_it = self.plans_ahead and epoch < self.num_epochs and len(self.table) >= MIN_ITEMS_AHEAD
        if not is_worth_it or (self.folder(epoch) / PLAN_NAME).exists():
            return
        self._stop_planner()
        self._planner = multiprocessing.get_context("fork").Process(
            target=_plan_quietly, args=(self._make, epoch, os.getpid())
        )
        self._planner.start()

    def close(self) -> None:
        """At the end of the run: nobody needs its plans any more. A run that breaks off leaves them for the next."""
        self._stop_planner()
        for epoch in (self._latest - 1, self._latest, self._latest + 1):
            self._remove(epoch)

    def folder(self, epoch: int) -> Path:
        """Where the plan of `epoch` is."""
        identity = [PLAN_VERSION, self.fingerprint, dataclasses.asdict(self.options), epoch]
        return self.cache_dir / f"plan-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]}"

    def _make(self, epoch: int) -> EpochPlan:
        folder = self.folder(epoch)
        if (folder / PLAN_NAME).exists():
            return load_plan(folder)
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        with open_locked(f"{folder}.lock", patience_s=math.inf) as lock:
            if not (folder / PLAN_NAME).exists():
                save_plan(plan_epoch(self.table, self.options, epoch), folder)
            os.unlink(lock.name)
        return load_plan(folder)

    def _remove(self, epoch: int) -> None:
        if self.plans_ahead:
            shutil.rmtree(self.folder(epoch), ignore_errors=True)

    def _stop_planner(self) -> None:
        if self._planner is not None:
            self._planner.terminate()
            self._planner.join()
            self._planner = None


def save_plan(plan: EpochPlan, folder: Path) -> None:
    """Write a plan as `folder`, which appears whole; what a killed planner left beside it is removed."""
    building = folder.with_name(f"{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    for name in ARRAYS:
        np.save(building / f"{name}.npy", getattr(plan, name))
    rest = {"options": dataclasses.asdict(plan.options), "epoch": plan.epoch, "num_tokens": plan.num_tokens}
    (building / PLAN_NAME).write_text(json.dumps(rest))
    for path in (*building.iterdir(), building):
        sync_path(path)
    try:
        os.rename(building, folder)
    except OSError:  # another planner was first, on a file system where locks do not work
        if not (folder / PLAN_NAME).exists():
            raise
        shutil.rmtree(building)


def load_plan(folder: Path) -> EpochPlan:
    """A plan with its arrays mapped from disk."""
    rest = json.loads((folder / PLAN_NAME).read_text())
    arrays = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in ARRAYS}
    return EpochPlan(**arrays, **{**rest, "options": PlanOptions(**rest["options"])})


def _plan_quietly(make: Callable[[int], EpochPlan], epoch: int, rank_pid: int) -> None:
    """Runs in the planner: it hears no signal meant for the rank but SIGTERM, by which the rank ends it."""
    threading.Thread(target=_end_with_rank, args=(rank_pid,), daemon=True).start()
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.nice(NICENESS)
    make(epoch)
    os._exit(0)  # what the rank registered to run at its exit is not the planner's to run


def _end_with_rank(rank_pid: int) -> None:
    while os.getppid() == rank_pid:
        time.sleep(PARENT_CHECK_S)
    os._exit(1)
