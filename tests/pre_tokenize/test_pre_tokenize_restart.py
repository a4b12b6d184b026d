"""Workers that are killed, stopped by SIGTERM, sent after rejected items, or started over another run's files."""

import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

import data.whole_file
from data.formats.manifest import Manifest
from data.formats.record import read_record
from data.formats.token_file import load_token_file
from data.whole_file import open_locked
from pre_tokenize import pre_tokenize as script
from pre_tokenize.concat_record import main as concat
from pre_tokenize.out_folder import settle_manifest
from pre_tokenize.pre_tokenize import main as pre_tokenize
from pre_tokenize.worker_log import WorkerLog, read_failed
from tests.helpers import forked
from tests.helpers.tokenize_helpers import command, environment, snapshot
from tests.pre_tokenize.test_pre_tokenize import BAD, MANIFEST, NUM_ITEMS, SCRIPT, arguments, task, undisturbed  # noqa: F401

# Killed and stopped


@pytest.fixture
def start(task, tmp_path):  # noqa: F811
    """A function that starts a worker in a process group of its own, on `tmp_path / "out"`.

    It returns the process, once the first item is written, and the pids of its two loaders.
    """
    workers = []

    def start_worker() -> tuple[forked.Popen, list[int]]:
        argv = arguments(task, tmp_path / "out", batch_size=1, num_workers=2)
        worker = forked.Popen(command(SCRIPT, *argv), environment(), start_new_session=True)
        workers.append(worker)
        while worker.poll() is None and not (tmp_path / "out" / "files" / "0.pkl").exists():
            time.sleep(0.001)
        children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
        loaders = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(loaders) == 2, worker.stderr.read_text()
        return worker, loaders

    yield start_worker
    for worker in workers:
        worker.kill()
        worker.wait()


def assert_resumes(task, tmp_path: Path) -> None:  # noqa: F811
    """The same command gives the files of a worker that nothing disturbed."""
    for name in ("out", "calm"):
        assert pre_tokenize(arguments(task, tmp_path / name, batch_size=1)) == 3
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "calm")


@pytest.mark.slow
def test_a_killed_worker_resumes_and_its_loaders_die(task, tmp_path, start):  # noqa: F811
    worker, loaders = start()
    worker.kill()
    worker.wait()
    # The loaders keep no lock.
    assert_resumes(task, tmp_path)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in loaders) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in loaders if Path(f"/proc/{pid}").exists()]


@pytest.mark.slow
def test_sigterm_to_the_whole_group_finishes_the_window(task, tmp_path, start):  # noqa: F811
    worker, loaders = start()
    os.killpg(worker.pid, signal.SIGTERM)
    _, message = worker.communicate(timeout=60)
    assert worker.returncode == 143, message
    num_done = sum(path.read_bytes().count(b"\n") for path in (tmp_path / "out").glob("0-of-1-*.jsonl"))
    assert num_done in (8, 16, 24)
    assert f"ended by SIGTERM with {num_done} of 30 items done; the same command resumes from here" in message
    assert "Traceback" not in message and "killed" not in message
    assert not [pid for pid in loaders if Path(f"/proc/{pid}").exists()]
    assert_resumes(task, tmp_path)


@pytest.mark.parametrize("damage", ["torn_record", "torn_failed", "lost_failed_line", "lost_token_file"])
def test_what_an_interruption_left_is_repaired(task, tmp_path, undisturbed, damage):  # noqa: F811
    out = tmp_path / "out"
    shutil.copytree(task / "undisturbed", out)
    record, failed = out / "0-of-1-record.jsonl", out / "0-of-1-failed.jsonl"
    if damage == "torn_record":
        record.write_bytes(record.read_bytes()[:-9])
    elif damage == "torn_failed":
        failed.write_bytes(failed.read_bytes()[:-9])
    elif damage == "lost_failed_line":
        # As after a power cut: the record has later lines.
        failed.write_bytes(b"")
    else:
        (out / "files" / "9.pkl").rename(out / "files" / "9.pkl.partial")
    assert pre_tokenize(arguments(task, out)) == 3
    assert snapshot(out) == undisturbed


# Rejected items tried again


@pytest.fixture
def mended(task, tmp_path):  # noqa: F811
    """A copy of the task whose missing images came after a first run, which is in `out`; `calm` is a run with them.

    One of the items is still bad.
    """
    folder = tmp_path / "task"
    shutil.copytree(task, folder, ignore=shutil.ignore_patterns("undisturbed"))
    (folder / "img" / "9.png").rename(folder / "img" / "later.png")
    assert pre_tokenize(arguments(folder, folder / "out")) == 3
    (folder / "img" / "later.png").rename(folder / "img" / "9.png")
    shutil.copy(folder / "img" / "0.png", folder / f"img/{BAD[0]}.png")
    assert pre_tokenize(arguments(folder, folder / "calm")) == 3
    assert dict(read_failed(folder / "calm" / "0-of-1-failed.jsonl")).keys() == {BAD[1]}
    return folder


def test_rejected_items_tried_again_give_the_files_of_an_undisturbed_run(mended, capsys):
    before = snapshot(mended / "out")
    assert pre_tokenize(arguments(mended, mended / "out")) == 3
    assert snapshot(mended / "out") == before
    assert pre_tokenize(arguments(mended, mended / "out", "--retry_failed")) == 3
    assert snapshot(mended / "out") == snapshot(mended / "calm")
    ids = [entry.id for entry in read_record(mended / "out" / "0-of-1-record.jsonl")]
    assert ids == [i for i in range(NUM_ITEMS) if i != BAD[1]]
    shutil.copy(mended / "img" / "0.png", mended / f"img/{BAD[1]}.png")
    assert pre_tokenize(arguments(mended, mended / "out", "--retry_failed")) == 0
    assert pre_tokenize(arguments(mended, mended / "out", "--retry_failed")) == 0
    assert "no rejected item to try again" in capsys.readouterr().out


def test_an_interrupted_retry_resumes_without_the_flag(mended, monkeypatch, capsys):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script, "run", interrupt)
        assert pre_tokenize(arguments(mended, mended / "out", "--retry_failed")) == 130
    assert "the same command without --retry_failed resumes" in capsys.readouterr().err
    assert not (mended / "out" / "0-of-1-failed.jsonl").read_bytes()
    assert pre_tokenize(arguments(mended, mended / "out")) == 3
    assert snapshot(mended / "out") == snapshot(mended / "calm")


def test_tokens_moved_into_shards_are_done_and_are_cleared_like_the_others(mended, capsys):
    out = mended / "out"
    merge = [f"--sub_record_dir={out}", f"--save_path={out}/record.json", "--shard_size=8"]
    assert concat(merge) == 0 and not os.listdir(out / "files")
    before = snapshot(out)
    assert pre_tokenize(arguments(mended, out)) == 3
    assert "nothing to do" in capsys.readouterr().out
    assert snapshot(out) == before
    assert pre_tokenize(arguments(mended, out, "--retry_failed")) == 3
    assert concat(merge) == 0 and not os.listdir(out / "files")
    calm = list(read_record(mended / "calm" / "0-of-1-record.jsonl"))
    ours = list(read_record(out / "record.json"))
    assert [entry.id for entry in ours] == [entry.id for entry in calm]
    for mine, other in zip(ours, calm, strict=True):
        item = load_token_file(mine.file, mine.offset, mine.nbytes)
        assert item.token.tolist() == load_token_file(other.file).token.tolist()
    assert pre_tokenize(arguments(mended, out, "--overwrite", target_size=96)) == 3
    assert not os.listdir(out / "shards") and not (out / "record.json").exists()


# Overwritten


@pytest.mark.parametrize("damage", ["", "[]", "gone"])
def test_a_damaged_or_missing_manifest_is_rejected_until_overwritten(task, tmp_path, undisturbed, capsys, damage):  # noqa: F811
    out = tmp_path / "out"
    shutil.copytree(task / "undisturbed", out)
    (out / "notes.txt").write_text("mine")
    if damage == "gone":
        (out / "manifest.json").unlink()
    else:
        (out / "manifest.json").write_text(damage)
    assert pre_tokenize(arguments(task, out)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert len(list(read_record(out / "0-of-1-record.jsonl"))) == NUM_ITEMS - len(BAD)
    assert pre_tokenize(arguments(task, out, "--overwrite")) == 3
    assert snapshot(out) == {**undisturbed, "notes.txt": b"mine"}


def test_a_folder_is_not_overwritten_under_a_running_worker(tmp_path):
    with settle_manifest(tmp_path, MANIFEST):
        log = WorkerLog(tmp_path, 0, 2, 0, 5)
    new = replace(MANIFEST, splits=3)
    with log, pytest.raises(ValueError, match="the worker of 0-of-2-record.jsonl is running"):
        with settle_manifest(tmp_path, new, overwrite=True):
            pass


def settle_in_a_child(folder: Path, manifest: Manifest) -> int:
    """Fork, settle, open the log of a rank in it, and leave a line there. Returns the process id."""
    if child := os.fork():
        return child
    try:
        with settle_manifest(folder, manifest, overwrite=True):
            rank = os.getpid()
            log = WorkerLog(folder, rank, manifest.splits, 0, 1)
        with log:
            log.add_rejected(0, "here")
        os._exit(0)
    finally:
        os._exit(1)


def test_many_workers_settling_at_once_clear_the_folder_once(tmp_path):
    (tmp_path / "files").mkdir()
    with settle_manifest(tmp_path, MANIFEST):
        for item_id in range(300):
            (tmp_path / "files" / f"{item_id}.pkl").touch()
        (tmp_path / "0-of-2-record.jsonl").touch()
    new = replace(MANIFEST, input_sha256="new")
    children = [settle_in_a_child(tmp_path, new) for _ in range(8)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 8
    assert not os.listdir(tmp_path / "files")
    assert {path.name for path in tmp_path.glob("*-failed.jsonl")} == {f"{pid}-of-2-failed.jsonl" for pid in children}
    assert all(path.read_text() for path in tmp_path.glob("*-failed.jsonl"))


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
