"""Workers that are killed, stopped by SIGTERM, sent after rejected items, or started over another run's files."""

import multiprocessing
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from data.formats.manifest import Manifest
from data.formats.record import read_record
from data.formats.token_file import load_token_file
from data.whole_file import is_locked, open_locked
from pre_tokenize import pre_tokenize as script
from pre_tokenize.concat_record import main as concat
from pre_tokenize.out_folder import settle_manifest
from pre_tokenize.pre_tokenize import main as pre_tokenize
from pre_tokenize.worker_log import WorkerLog, read_failed
from tests.helpers import forked
from tests.helpers.tokenize_helpers import command, environment, snapshot, write_items
from tests.pre_tokenize.test_pre_tokenize import BAD, MANIFEST, NUM_ITEMS, SCRIPT, arguments, task, undisturbed  # noqa: F401

NUM_KILLS = int(os.environ.get("PRE_TOKENIZE_KILLS", "3"))
MANY = 400
FORK = multiprocessing.get_context("fork")

# Killed and stopped


@pytest.fixture(scope="module")
def many(task, tmp_path_factory):  # noqa: F811
    """A function from an output folder to the arguments of one of two workers, with loaders and windows of 8 items."""
    folder = tmp_path_factory.mktemp("many")
    write_items(folder, MANY, BAD)

    def many_arguments(out: Path, rank: int = 0, **changes) -> list[str]:
        changes = {"in_filename": folder / "in.json", "batch_size": 1, "num_workers": 2, **changes}
        return arguments(task, out, splits=2, rank=rank, **changes)

    return many_arguments


@pytest.fixture
def start():
    """A function that starts a worker in a process group of its own, and waits until it has written a token file."""
    workers = []

    def start_worker(argv: list[str], new_files: int = 1) -> forked.Popen:
        out = Path(next(flag for flag in argv if flag.startswith("--out_dir")).removeprefix("--out_dir="))
        before = num_files(out)
        worker = forked.Popen(command(SCRIPT, *argv), environment(), start_new_session=True)
        workers.append(worker)
        while worker.poll() is None and num_files(out) < before + new_files:
            time.sleep(0.001)
        return worker

    yield start_worker
    for worker in workers:
        worker.kill()
        worker.wait()


def num_files(out: Path) -> int:
    return len(list(out.glob("files/*.pkl")))


def loaders_of(worker: forked.Popen) -> list[str]:
    loaders = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    assert len(loaders) == 2, worker.stderr.read_text()
    return loaders


def assert_gone(loaders: list[str]) -> None:
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in loaders) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in loaders if Path(f"/proc/{pid}").exists()]


@pytest.fixture(scope="module")
def calm(many, tmp_path_factory):
    """Content of the folder of the first worker, and then of both, that nothing disturbed."""
    out, snapshots = tmp_path_factory.mktemp("calm"), []
    for rank in (0, 1):
        assert pre_tokenize(many(out, rank, num_workers=0)) in (0, 3)
        snapshots.append(snapshot(out))
    return snapshots


@pytest.mark.slow
def test_killed_workers_resume_and_leave_nothing_behind(many, calm, tmp_path, start):
    """PRE_TOKENIZE_KILLS=20 kills as many, two ranks in turn."""
    generator, loaders = random.Random(0), []
    for number in range(NUM_KILLS):
        worker = start(many(tmp_path / "out", number % 2), new_files=generator.randrange(1, 10))
        loaders += loaders_of(worker)
        mapped = Path(f"/proc/{loaders[-1]}/maps").read_text().splitlines()
        shared = [line for line in mapped if line.split()[1] == "rw-s"]
        # Memory without a name is gone with its processes.
        assert shared and all(line.endswith("(deleted)") for line in shared)
        worker.kill()
        worker.wait()
    assert_gone(loaders)
    for rank in (0, 1):
        assert pre_tokenize(many(tmp_path / "out", rank)) in (0, 3)
    assert snapshot(tmp_path / "out") == calm[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, code, message",
    [
        (signal.SIGTERM, 143, "rank 0 of 2 ended by SIGTERM with {} of 200 items done; the same command resumes"),
        (signal.SIGINT, 130, "interrupted; the same command resumes"),
        (signal.SIGKILL, 1, "a process that loads images was killed; if memory was short, give fewer --num_workers"),
    ],
)
def test_a_signal_is_one_message_and_the_same_command_resumes(many, calm, tmp_path, start, number, code, message):
    """SIGTERM, after which the window is finished, and Ctrl-C to all processes; SIGKILL to one loader."""
    out = tmp_path / "out"
    worker = start(many(out))
    loaders = loaders_of(worker)
    if number == signal.SIGKILL:
        os.kill(int(loaders[0]), number)
    else:
        os.killpg(worker.pid, number)
    _, errors = worker.communicate(timeout=60)
    assert worker.returncode == code, errors
    num_done = sum(path.read_bytes().count(b"\n") for path in out.glob("0-of-2-*.jsonl"))
    assert num_done < MANY // 2 and (number != signal.SIGTERM or num_done % 8 == 0)
    *progress, last = errors.splitlines()
    assert message.format(num_done) in last and all(line.startswith("rank 0 of 2: ") for line in progress), errors
    assert_gone(loaders)
    assert pre_tokenize(many(out)) in (0, 3)
    assert snapshot(out) == calm[0]


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


def settle_and_log(folder: Path, manifest: Manifest) -> None:
    """Leaves a line in the log of a rank."""
    with settle_manifest(folder, manifest, overwrite=True):
        log = WorkerLog(folder, os.getpid(), manifest.splits, 0, 1)
    with log:
        log.add_rejected(0, "here")


def test_many_workers_settling_at_once_clear_the_folder_once(tmp_path):
    (tmp_path / "files").mkdir()
    with settle_manifest(tmp_path, MANIFEST):
        for item_id in range(300):
            (tmp_path / "files" / f"{item_id}.pkl").touch()
        (tmp_path / "0-of-2-record.jsonl").touch()
    new = replace(MANIFEST, input_sha256="new")
    children = [FORK.Process(target=settle_and_log, args=(tmp_path, new)) for _ in range(8)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 8
    assert not os.listdir(tmp_path / "files")
    names = {f"{child.pid}-of-2-failed.jsonl" for child in children}
    assert {path.name for path in tmp_path.glob("*-failed.jsonl") if path.read_text()} == names


def test_a_lock_is_not_shared_by_a_forked_child(tmp_path):
    """As a loader worker that outlives its run. What the parent had not flushed is written once."""
    path, is_forked, is_over = tmp_path / "log", FORK.Event(), FORK.Event()
    first = open_locked(path)
    first.write("once\n")
    child = FORK.Process(target=lambda: (is_forked.set(), is_over.wait(), first.close()), daemon=True)
    child.start()
    is_forked.wait()
    assert is_locked(path)
    first.close()
    assert not is_locked(path)
    open_locked(path).close()
    is_over.set()
    child.join()
    assert child.exitcode == 0 and path.read_text() == "once\n"
