"""Workers that are killed, told to end, started afresh over another run's files, or sent after refused items."""

import json
import os
import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import data.whole_file
from data.manifest import Manifest, settle_manifest
from data.record import read_record
from data.token_file import load_token_file
from data.whole_file import open_locked
from data.worker_log import WorkerLog, read_failed
from pre_tokenize.concat_record import main as concat
from pre_tokenize.pre_tokenize import main as pre_tokenize
from tests import forked
from tests.test_pre_tokenize import BAD, NUM_ITEMS, SCRIPT, arguments, task, undisturbed  # noqa: F401  (fixtures)
from tests.tokenize_helpers import command, environment, snapshot, write_items

NUM_KILLS = int(os.environ.get("PRE_TOKENIZE_KILLS", "3"))
LONG_NUM_ITEMS, LONG_BAD = 120, (3, 8, 41, 95, 119)


@pytest.fixture(scope="module")
def long_task(task, tmp_path_factory):  # noqa: F811
    """An input of 120 items, five of which name a missing picture."""
    folder = tmp_path_factory.mktemp("long")
    for name in ("tokenizer", "vqgan"):
        shutil.copytree(task / name, folder / name)
    write_items(folder, LONG_NUM_ITEMS, LONG_BAD)
    return folder


def start(*args: str) -> forked.Popen:
    return forked.Popen(command(SCRIPT, *args), environment())


def wait_until(condition, worker: forked.Popen) -> None:
    while worker.poll() is None and not condition():
        time.sleep(0.001)


def num_token_files(out: Path, ids: range) -> int:
    return sum((out / "files" / f"{item_id}.pkl").exists() for item_id in ids)


# Killed and told to end


def kill_some_lives(task, out: Path, rank: int, num_kills: int) -> int:  # noqa: F811
    """Start one rank of three again and again, and kill it at random moments. Returns how often it was killed."""
    rng = random.Random(f"{rank} {time.time_ns()}")
    ids = range(LONG_NUM_ITEMS * rank // 3, LONG_NUM_ITEMS * (rank + 1) // 3)
    killed = 0
    while killed < num_kills:
        flags = ["--retry_failed"] if rng.random() < 0.5 else []
        worker = start(*arguments(task, out, *flags, splits=3, rank=rank, batch_size=1))
        wanted = num_token_files(out, ids) + rng.randint(0, 12)
        if wanted > len(ids) or rng.random() < 0.2:
            time.sleep(rng.uniform(0, 2))  # while it starts, tries items again, or has nothing to do
        else:
            wait_until(lambda wanted=wanted: num_token_files(out, ids) >= wanted, worker)
            time.sleep(rng.uniform(0, 0.02))
        worker.kill()
        worker.communicate()
        killed += worker.returncode == -signal.SIGKILL
    return killed


@pytest.mark.slow
def test_workers_killed_at_random_moments_give_the_files_of_undisturbed_ones(long_task, tmp_path):
    calm, out = tmp_path / "calm", tmp_path / "out"
    shares = [len(range(rank, NUM_KILLS, 3)) for rank in range(3)]
    with ThreadPoolExecutor(3) as executor:
        killed = list(executor.map(kill_some_lives, [long_task] * 3, [out] * 3, range(3), shares))
    assert sum(killed) == NUM_KILLS
    for rank in range(3):
        assert pre_tokenize(arguments(long_task, calm, splits=3, rank=rank, batch_size=1)) == 3
        assert pre_tokenize(arguments(long_task, out, splits=3, rank=rank, batch_size=1)) == 3
    assert snapshot(out) == snapshot(calm)
    assert concat([f"--sub_record_dir={out}", f"--save_path={out}/record.json"]) == 0
    entries = list(read_record(out / "record.json"))
    assert [entry.id for entry in entries] == [i for i in range(LONG_NUM_ITEMS) if i not in LONG_BAD]
    assert all(len(load_token_file(entry.file).token) == entry.len for entry in entries)
    failed = [item_id for rank in range(3) for item_id, _ in read_failed(out / f"{rank}-of-3-failed.jsonl")]
    assert failed == list(LONG_BAD)


@pytest.mark.slow
def test_sigterm_finishes_the_window_in_hand_and_says_how_to_go_on(long_task, tmp_path):
    calm, out = tmp_path / "calm", tmp_path / "out"
    worker = start(*arguments(long_task, out, batch_size=1))
    wait_until(lambda: (out / "files" / "0.pkl").exists(), worker)
    worker.terminate()
    _, message = worker.communicate(timeout=60)
    assert worker.returncode == 143, message
    done = [json.loads(line)["id"] for path in out.glob("0-of-1-*.jsonl") for line in path.read_text().splitlines()]
    assert sorted(done) == list(range(len(done))) and 0 < len(done) < LONG_NUM_ITEMS and len(done) % 8 == 0
    assert f"ended by SIGTERM with {len(done)} of 120 items done; the same command goes on from here" in message
    assert "Traceback" not in message
    assert pre_tokenize(arguments(long_task, calm, batch_size=1)) == 3
    assert pre_tokenize(arguments(long_task, out, batch_size=1)) == 3
    assert snapshot(out) == snapshot(calm)


# Refused items tried again


@pytest.fixture
def mended(mended_once, tmp_path):
    """The folder `mended_once` as it was at first, at the same place: reasons name it."""
    shutil.copytree(mended_once, tmp_path / "first")
    yield mended_once
    shutil.rmtree(mended_once)
    (tmp_path / "first").rename(mended_once)


@pytest.fixture(scope="module")
def mended_once(task, tmp_path_factory):  # noqa: F811
    """A copy of the task whose missing images came after a first run, which is in `out`; `calm` is a run with them.

    One of the items is still bad.
    """
    folder = tmp_path_factory.mktemp("mended") / "task"
    shutil.copytree(task, folder, ignore=shutil.ignore_patterns("undisturbed"))
    (folder / "img" / "9.png").rename(folder / "img" / "later.png")
    assert pre_tokenize(arguments(folder, folder / "out")) == 3
    (folder / "img" / "later.png").rename(folder / "img" / "9.png")
    shutil.copy(folder / "img" / "0.png", folder / f"img/{BAD[0]}.png")
    assert pre_tokenize(arguments(folder, folder / "calm")) == 3
    assert dict(read_failed(folder / "calm" / "0-of-1-failed.jsonl")).keys() == {BAD[1]}
    return folder


def test_refused_items_tried_again_give_the_files_of_an_undisturbed_run(mended, capsys):
    before = snapshot(mended / "out")
    assert pre_tokenize(arguments(mended, mended / "out")) == 3
    assert snapshot(mended / "out") == before  # only when asked to
    capsys.readouterr()
    assert pre_tokenize(arguments(mended, mended / "out", "--retry_failed")) == 3
    assert "of 3 refused items 2 could be used now" in capsys.readouterr().out
    assert snapshot(mended / "out") == snapshot(mended / "calm")
    ids = [entry.id for entry in read_record(mended / "out" / "0-of-1-record.jsonl")]
    assert ids == [i for i in range(NUM_ITEMS) if i != BAD[1]]


def test_nothing_to_try_again_is_said(mended, capsys):
    shutil.copy(mended / "img" / "0.png", mended / f"img/{BAD[1]}.png")
    assert pre_tokenize(arguments(mended, mended / "out", "--retry_failed")) == 0
    before = snapshot(mended / "out")
    assert pre_tokenize(arguments(mended, mended / "out", "--retry_failed")) == 0
    assert "no refused item to try again" in capsys.readouterr().out
    assert snapshot(mended / "out") == before and not before["0-of-1-failed.jsonl"]


def test_items_are_tried_again_before_the_others_are_done(mended):
    """The run was interrupted within the window of a refused item."""
    record, failed = (mended / "out" / f"0-of-1-{name}.jsonl" for name in ("record", "failed"))
    record.write_text("".join(line for line in record.read_text().splitlines(True) if json.loads(line)["id"] < 11))
    failed.write_text("".join(line for line in failed.read_text().splitlines(True) if json.loads(line)["id"] < 11))
    assert pre_tokenize(arguments(mended, mended / "out", "--retry_failed")) == 3
    assert snapshot(mended / "out") == snapshot(mended / "calm")


@pytest.mark.parametrize("num_replaced", [0, 1])
def test_an_interrupted_merge_is_done_again(mended, monkeypatch, num_replaced):
    """The new lines are gathered, and the process ends before the first or the second of the two logs is replaced."""
    replace, calls = os.replace, []

    def interrupted(source, target):
        if str(target).endswith(".jsonl"):
            if len(calls) == num_replaced:
                raise SystemExit("as if killed")
            calls.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(data.whole_file.os, "replace", interrupted)
        with pytest.raises(SystemExit):
            pre_tokenize(arguments(mended, mended / "out", "--retry_failed"))
    assert (mended / "out" / "0-of-1-retried.jsonl").exists()
    assert pre_tokenize(arguments(mended, mended / "out")) == 3
    assert snapshot(mended / "out") == snapshot(mended / "calm")


def test_an_item_with_tokens_keeps_them_when_its_picture_is_gone(mended):
    (mended / "img" / "5.png").unlink()
    assert pre_tokenize(arguments(mended, mended / "out", "--retry_failed")) == 3
    ids = [entry.id for entry in read_record(mended / "out" / "0-of-1-record.jsonl")]
    assert ids == [i for i in range(NUM_ITEMS) if i != BAD[1]]


def test_tokens_moved_into_shards_are_done_and_are_cleared_like_the_others(mended, capsys):
    out = mended / "out"
    merge = [f"--sub_record_dir={out}", f"--save_path={out}/record.json", "--shard_size=8"]
    assert concat(merge) == 0 and not os.listdir(out / "files")
    before = snapshot(out)
    capsys.readouterr()
    assert pre_tokenize(arguments(mended, out)) == 3
    assert "nothing to do" in capsys.readouterr().out
    assert snapshot(out) == before
    assert pre_tokenize(arguments(mended, out, "--retry_failed")) == 3
    calm = list(read_record(mended / "calm" / "0-of-1-record.jsonl"))
    ours = list(read_record(out / "0-of-1-record.jsonl"))
    assert [entry.id for entry in ours] == [entry.id for entry in calm]
    for mine, other in zip(ours, calm, strict=True):
        item = load_token_file(mine.file, mine.offset, mine.nbytes)
        assert item.token.tolist() == load_token_file(other.file).token.tolist()
    assert concat(merge) == 0
    assert pre_tokenize(arguments(mended, out, "--overwrite", target_size=96)) == 3
    assert not os.listdir(out / "shards") and not (out / "record.json").exists()


# Started afresh


@pytest.mark.slow
def test_workers_started_together_overwrite_the_folder_once(task, tmp_path):  # noqa: F811
    calm, out = tmp_path / "calm", tmp_path / "out"
    assert pre_tokenize(arguments(task, out, target_size=96)) == 3
    assert concat([f"--sub_record_dir={out}", f"--save_path={out}/record.json"]) == 0
    (out / "notes.txt").write_text("mine")
    workers = [start(*arguments(task, out, "--overwrite", splits=3, rank=rank)) for rank in range(3)]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [3, 3, 0], errors
    for rank in range(3):
        pre_tokenize(arguments(task, calm, splits=3, rank=rank))
    ours = snapshot(out)
    assert ours.pop("notes.txt") == b"mine"
    assert ours == snapshot(calm)


def test_overwriting_with_the_same_settings_changes_nothing(task, undisturbed, capsys):  # noqa: F811
    assert pre_tokenize(arguments(task, task / "undisturbed", "--overwrite")) == 3
    assert "nothing to do" in capsys.readouterr().out
    assert snapshot(task / "undisturbed") == undisturbed


@pytest.mark.parametrize("damage", ["", '{"splits": ', "[]", "gone"])
def test_a_damaged_or_missing_manifest_is_refused_until_overwritten(
    task,  # noqa: F811
    tmp_path,
    undisturbed,  # noqa: F811
    capsys,
    damage,
):
    out = tmp_path / "out"
    shutil.copytree(task / "undisturbed", out)
    if damage == "gone":
        (out / "manifest.json").unlink()
    else:
        (out / "manifest.json").write_text(damage)
    assert pre_tokenize(arguments(task, out)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert len(list(read_record(out / "0-of-1-record.jsonl"))) == NUM_ITEMS - len(BAD)
    assert pre_tokenize(arguments(task, out, "--overwrite")) == 3
    assert snapshot(out) == undisturbed


def test_a_folder_is_not_overwritten_under_a_running_worker(task, tmp_path, undisturbed, capsys):  # noqa: F811
    out = tmp_path / "out"
    shutil.copytree(task / "undisturbed", out)
    with WorkerLog(out, 0, 1, 0, NUM_ITEMS):
        assert pre_tokenize(arguments(task, out, "--overwrite", splits=2, rank=1)) == 2
    assert "the worker of 0-of-1-record.jsonl is running" in capsys.readouterr().err
    assert snapshot(out) == undisturbed


def settle_in_a_child(folder: Path, manifest: Manifest) -> int:
    """Fork, settle, open the log of a rank in it, and leave a line there. Returns the process id."""
    if child := os.fork():
        return child
    try:
        with settle_manifest(folder, manifest, overwrite=True):
            rank = os.getpid()
            log = WorkerLog(folder, rank, manifest.splits, 0, 1)
        with log:
            log.add_refusal(0, "here")
        os._exit(0)
    finally:
        os._exit(1)


def test_many_settling_at_once_clear_the_folder_once(tmp_path):
    (tmp_path / "files").mkdir()
    with settle_manifest(tmp_path, Manifest("a", "b", 100, 64, "center", None, 2, 10, "old")):
        for item_id in range(300):
            (tmp_path / "files" / f"{item_id}.pkl").touch()
        (tmp_path / "0-of-2-record.jsonl").touch()
    new = Manifest("a", "b", 100, 64, "center", None, 2, 10, "new")
    children = [settle_in_a_child(tmp_path, new) for _ in range(8)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 8
    assert not os.listdir(tmp_path / "files")
    assert {path.name for path in tmp_path.glob("*-failed.jsonl")} == {f"{pid}-of-2-failed.jsonl" for pid in children}
    assert all(path.read_text() for path in tmp_path.glob("*-failed.jsonl"))


def test_a_lock_follows_the_file_that_takes_its_place(tmp_path):
    path = tmp_path / "log"
    first = open_locked(path)
    second = data.whole_file.replace_locked(path, ["new\n"])
    first.close()
    with pytest.raises(BlockingIOError):
        open_locked(path)
    second.write("more\n")
    second.close()
    open_locked(path).close()
    assert path.read_text() == "new\nmore\n"


def test_a_lock_is_not_shared_by_a_forked_child(tmp_path):
    """As a loader worker that outlives its run. What the parent had not flushed is written once."""
    path = tmp_path / "log"
    first = open_locked(path)
    first.write("once\n")
    is_forked, forked_end = os.pipe()
    is_over, over_end = os.pipe()
    if not (child := os.fork()):
        os.close(over_end)
        os.write(forked_end, b"x")
        os.read(is_over, 1)
        first.close()
        os._exit(0)
    os.read(is_forked, 1)
    assert data.whole_file.is_locked(path)
    first.close()
    assert not data.whole_file.is_locked(path)
    open_locked(path).close()
    os.close(over_end)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert path.read_text() == "once\n"
