"""Plans on disk: those of the synchronous planner, made once, whole, also after a planner was killed."""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import data.plan_cache
from data.packing import ItemTable, PlanOptions, plan_epoch
from data.plan_cache import ARRAYS, PLAN_NAME, PlanCache
from tests import forked

OPTIONS = PlanOptions(batch_size=2, max_seq_len=400, units_per_step=4, packing=True, seed=2)


def make_table(num_items: int = 3000) -> ItemTable:
    lengths = np.random.default_rng(0).integers(5, 401, num_items).astype(np.int32)
    return ItemTable(lengths, np.array([0, num_items]), np.zeros(1, int), np.ones(1))


def make_cache(folder: Path, options=OPTIONS, fingerprint="f", plans_ahead=True, num_epochs=5) -> PlanCache:
    return PlanCache(make_table(), fingerprint, options, folder, num_epochs, plans_ahead)


def assert_same(plan, expected) -> None:
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(plan, name), getattr(expected, name))
    rest = (plan.options, plan.epoch, plan.num_tokens, plan.num_steps, plan.fill)
    assert rest == (expected.options, expected.epoch, expected.num_tokens, expected.num_steps, expected.fill)


@pytest.fixture
def ahead(monkeypatch):
    """Plans are made in the background also for a small table."""
    monkeypatch.setattr(data.plan_cache, "MIN_ITEMS_AHEAD", 1)


def test_a_plan_from_disk_is_that_of_the_planner(tmp_path):
    cache = make_cache(tmp_path)
    for _ in range(2):
        assert_same(cache.get(1), plan_epoch(make_table(), OPTIONS, 1))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_plan_made_in_the_background_is_the_same(tmp_path, ahead):
    cache = make_cache(tmp_path)
    cache.prefetch(1)
    deadline = time.monotonic() + 30
    while not (cache.folder(1) / PLAN_NAME).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    made = (cache.folder(1) / PLAN_NAME).stat().st_mtime_ns
    assert_same(cache.get(1), plan_epoch(make_table(), OPTIONS, 1))
    assert (cache.folder(1) / PLAN_NAME).stat().st_mtime_ns == made


def test_a_killed_planner_is_replaced(tmp_path, ahead, monkeypatch):
    cache = make_cache(tmp_path)
    original = data.plan_cache.save_plan

    def die_half_way(plan, folder):
        (folder.with_name(folder.name + ".building")).mkdir()
        (folder.with_name(folder.name + ".building") / "items.npy").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(data.plan_cache, "save_plan", die_half_way)
    others = set(multiprocessing.active_children())  # of earlier tests, that are still ending
    cache.prefetch(0)
    (planner,) = set(multiprocessing.active_children()) - others
    planner.join(30)
    assert planner.exitcode == -signal.SIGKILL
    monkeypatch.setattr(data.plan_cache, "save_plan", original)
    assert_same(cache.get(0), plan_epoch(make_table(), OPTIONS, 0))
    assert [path.name for path in tmp_path.iterdir()] == [cache.folder(0).name]


def test_what_decides_a_plan_is_in_its_name(tmp_path):
    folders = {
        make_cache(tmp_path).folder(0),
        make_cache(tmp_path).folder(1),
        make_cache(tmp_path, fingerprint="g").folder(0),
        make_cache(tmp_path, options=PlanOptions(2, 400, 4, packing=True, seed=3)).folder(0),
        make_cache(tmp_path, options=PlanOptions(2, 400, 4, packing=True, seed=2, context_dropout=0.1)).folder(0),
    }
    assert len(folders) == 5
    assert make_cache(tmp_path).folder(0) in folders


def test_old_plans_are_removed_and_all_at_the_end(tmp_path):
    cache, other = make_cache(tmp_path), make_cache(tmp_path, plans_ahead=False)
    plans = [(cache.get(epoch), other.get(epoch)) for epoch in range(4)]
    assert {path.name for path in tmp_path.iterdir()} == {cache.folder(2).name, cache.folder(3).name}
    assert_same(plans[0][1], plan_epoch(make_table(), OPTIONS, 0))  # whoever has a plan open keeps it
    other.close()
    cache.close()
    assert not list(tmp_path.iterdir())


RANK_SCRIPT = """
import json, sys
from pathlib import Path
import data.plan_cache
from tests.test_plan_cache import make_cache
made = []
original = data.plan_cache.save_plan
data.plan_cache.save_plan = lambda plan, folder: made.append(1) or original(plan, folder)
plan = make_cache(Path(sys.argv[1]), plans_ahead=False).get(2)
print(json.dumps({"made": len(made), "items": plan.items.tolist()}))
"""


@pytest.mark.slow
def test_ranks_that_come_together_make_one_plan(tmp_path):
    ranks = [forked.Popen([sys.executable, "-c", RANK_SCRIPT, str(tmp_path)], os.environ) for _ in range(3)]
    results = [json.loads(rank.communicate(timeout=60)[0]) for rank in ranks]
    assert sum(result["made"] for result in results) == 1
    assert all(result["items"] == plan_epoch(make_table(), OPTIONS, 2).items.tolist() for result in results)
