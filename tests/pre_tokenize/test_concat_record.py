"""Merging: what it rejects, what it merges in part, and moving tokens into shards, killed before every step."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from data.epoch.dataset import TokenDataset
from data.formats.data_config import DataSource
from data.formats.record import read_record
from data.formats.record_index import open_index
from data.formats.token_file import load_token_file, save_token_file
from data.whole_file import is_locked
from pre_tokenize import concat_record
from pre_tokenize.concat_record import main as concat
from pre_tokenize.shards import remove_moved
from pre_tokenize.worker_log import WorkerLog
from tests.helpers.tokenize_helpers import snapshot

NUM_ITEMS, SPLITS, BAD = 14, 2, (3, 9)


def write_output(folder: Path, num_items: int = NUM_ITEMS, splits: int = SPLITS, bad: tuple[int, ...] = BAD) -> Path:
    """The output folder of finished workers: item i has 3 + i tokens, the bad ones are rejected."""
    for rank in range(splits):
        first, stop = (num_items * part // splits for part in (rank, rank + 1))
        with WorkerLog(folder, rank, splits, first, stop) as log:
            log_items(log, range(first, stop), bad)
    (folder / "manifest.json").write_text(json.dumps({"num_items": num_items, "splits": splits}))
    return folder


def log_items(log: WorkerLog, ids: range, bad: tuple[int, ...] = BAD) -> None:
    for i in ids:
        if i in bad:
            log.add_rejected(i, "its image is bad")
        else:
            log.add_item(tokens_of(i), [-100] * (3 + i), i, 2 if i % 2 else None)


def tokens_of(item_id: int) -> list[int]:
    return [100 * item_id + t for t in range(3 + item_id)]


def run(folder: Path, *flags: str) -> int:
    return concat([f"--sub_record_dir={folder}", f"--save_path={folder}/record.json", *flags])


def merged_ids(record: Path) -> list[int]:
    """Ids in the order of a record. Each item is loaded and compared."""
    ids = []
    for entry in read_record(record):
        item = load_token_file(entry.file, entry.offset, entry.nbytes)
        assert item.token.tolist() == tokens_of(entry.id) and item.id == entry.id and len(item.token) == entry.len
        assert entry.image_len == (2 if entry.id % 2 else None)
        ids.append(entry.id)
    return ids


GOOD = [i for i in range(NUM_ITEMS) if i not in BAD]


def test_totals_lengths_and_reasons_are_printed(tmp_path, capsys):
    out = write_output(tmp_path / "out")
    assert concat([f"--sub_record_dir={out}", f"--save_path={tmp_path}/deep/record.json"]) == 0
    printed = capsys.readouterr().out
    num_tokens = sum(3 + i for i in GOOD)
    assert f"12 items, {num_tokens} tokens, 2 items rejected" in printed
    assert "p0 3, p5 " in printed and "p50 " in printed and "p100 16" in printed
    assert "rejected 2: its image is bad" in printed and "PARTIAL" not in printed
    assert merged_ids(tmp_path / "deep" / "record.json") == GOOD


def edit(name: str, change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    """A damage that changes the lines of a file of the workers."""

    def damage(out: Path) -> None:
        lines = (out / name).read_text().splitlines(keepends=True)
        (out / name).write_text("".join(change(lines)))

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda out: (out / name).unlink()


stop_a_worker_early = edit("1-of-2-record.jsonl", lambda lines: lines[:-2])
DAMAGES = {
    "no rank 1": (remove("1-of-2-record.jsonl"), ["lacks the sub-records of --rank 1 of --splits 2"], GOOD[:6]),
    "torn line": (
        edit("0-of-2-record.jsonl", lambda lines: [*lines[:-1], lines[-1][:-9]]),
        ["not valid JSON at line 6", "--rank 0 of --splits 2 has done 6 of its 7"],
        GOOD[:5] + GOOD[6:],
    ),
    "no last newline": (
        edit("0-of-2-record.jsonl", lambda lines: [*lines[:-1], lines[-1].rstrip()]),
        ["0-of-2-record.jsonl: the last line is torn; run --rank 0 of --splits 2 again"],
        GOOD,
    ),
    "no token file": (
        remove("files/8.pkl"),
        ["8.pkl of id 8 does not exist", "--rank 1 of --splits 2 has done 6 of its 7"],
        GOOD[:7] + GOOD[8:],
    ),
    "item twice": (edit("1-of-2-record.jsonl", lambda lines: [*lines, lines[0]]), ["id 7 occurs twice"], GOOD),
    "good item rejected": (
        edit("0-of-2-failed.jsonl", lambda lines: [*lines, '{"id": 5, "reason": "also bad"}\n']),
        ["0-of-2-failed.jsonl: id 5 occurs twice"],
        GOOD,
    ),
    "worker stopped early": (stop_a_worker_early, ["has done 5 of its 7 items: run it again"], GOOD[:-2]),
    "no list of the rejected": (remove("0-of-2-failed.jsonl"), ["--rank 0 of --splits 2 has done 6 of its 7"], GOOD),
}


@pytest.mark.parametrize("damage, messages, kept", DAMAGES.values(), ids=DAMAGES.keys())
def test_what_is_incomplete_is_rejected_or_merged_in_part(tmp_path, capsys, damage, messages, kept):
    damage(write_output(tmp_path))
    assert run(tmp_path) == 2 and not (tmp_path / "record.json").exists()
    error = capsys.readouterr().err
    assert run(tmp_path, "--allow_partial") == 0
    printed = capsys.readouterr().out
    assert "PARTIAL" in printed and f"{len(kept)} items" in printed
    for message in messages:
        assert message in error and message in printed
    assert merged_ids(tmp_path / "record.json") == kept


def test_folders_without_anything_to_merge_are_rejected(tmp_path, capsys):
    def error(folder: Path, *flags: str) -> str:
        assert run(folder, *flags) == 2
        return capsys.readouterr().err

    assert "is not a folder" in error(tmp_path / "gone")
    assert "has no sub-record" in error(tmp_path)
    write_output(tmp_path, 2, 1, bad=(0, 1))
    assert "no item was tokenized, all 2 were rejected" in error(tmp_path, "--allow_partial")
    (tmp_path / "0-of-3-record.jsonl").touch()
    assert "mixes sub-records of --splits 1, 3" in error(tmp_path)


def test_a_record_whose_files_do_not_open_is_an_error_and_removes_nothing(tmp_path, capsys, monkeypatch):
    out = write_output(tmp_path)
    monkeypatch.setattr(concat_record, "relative_file", lambda *_: "gone/0.pkl")
    assert run(out, "--shard_size=4") == 2
    assert "gone/0.pkl does not open" in capsys.readouterr().err and len(os.listdir(out / "files")) == len(GOOD)


def test_items_move_into_shards_that_the_trainer_reads(tmp_path, capsys, monkeypatch):
    def remove_locked(sub_record: Path) -> None:
        assert is_locked(sub_record)
        remove_moved(sub_record)

    monkeypatch.setattr(concat_record, "remove_moved", remove_locked)
    out = write_output(tmp_path / "out")
    assert run(out) == 0
    source = DataSource(out / "record.json")
    before = TokenDataset([source], 64)
    expected = [before.read(i).token.tolist() for i in range(len(before))]
    assert run(out, "--shard_size=4") == 0
    assert "12 items moved into shards" in capsys.readouterr().out
    shards = sorted(os.listdir(out / "shards"))
    assert shards == [f"{rank}-of-2-{number:05d}.pkls" for rank in (0, 1) for number in (0, 1)]
    assert not os.listdir(out / "files") and not list(out.rglob("*.partial"))
    for record in ("record.json", "0-of-2-record.jsonl"):
        assert all(entry.is_sharded for entry in read_record(out / record))
    assert merged_ids(out / "record.json") == GOOD
    after = TokenDataset([source], 64)
    assert [after.read(i).token.tolist() for i in range(len(after))] == expected
    files = snapshot(out)
    assert run(out, "--shard_size=100") == run(out) == 0
    assert "0 items moved into shards" in capsys.readouterr().out and snapshot(out) == files


def test_a_sharded_folder_merges_into_another_and_moves_as_a_whole(tmp_path):
    out = write_output(tmp_path / "out")
    deep = tmp_path / "deep" / "record.json"
    assert concat([f"--sub_record_dir={out}", f"--save_path={deep}", "--shard_size=5"]) == 0
    assert merged_ids(deep) == GOOD and not (out / "record.json").exists()
    assert run(out) == 0
    out.rename(tmp_path / "elsewhere")
    assert merged_ids(tmp_path / "elsewhere" / "record.json") == GOOD


@pytest.mark.slow
def test_killed_before_any_step_it_loses_nothing_and_the_same_command_resumes(tmp_path):
    """A child kills itself before its k-th call that changes the disk; then the command runs again."""
    # Each file takes three such calls at least, so that a kill falls between any two.
    for step in range(1, 1000, 3):
        out = write_output(tmp_path / f"step{step}")
        assert run(out) == 0
        if not was_killed(out, step):
            break
        # What the workers wrote is all there, and so is the merged record until it is replaced.
        assert sorted(i for rank in range(2) for i in merged_ids(out / f"{rank}-of-2-record.jsonl")) == GOOD
        assert merged_ids(out / "record.json") == GOOD
        assert run(out, "--shard_size=4") == 0
        assert merged_ids(out / "record.json") == GOOD and not os.listdir(out / "files")
        shards = {os.path.basename(entry.file) for entry in read_record(out / "record.json")}
        assert shards == set(os.listdir(out / "shards")) and len(shards) == 4 and not list(out.glob("*.partial"))
    # 4 shards, 2 sub-records, the record, 12 token files
    assert step > 30


def was_killed(out: Path, step: int) -> bool:
    """Run the merge into shards in a child that dies by SIGKILL before its `step`-th change of the disk."""
    pid = os.fork()
    if not pid:
        remaining = step

        def counted(function):
            def call(*args, **kwargs):
                nonlocal remaining
                remaining -= 1
                if not remaining:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        for name in ("replace", "fsync", "unlink", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        os._exit(run(out, "--shard_size=4"))
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_another_shard_size_after_a_kill_leaves_no_other_shards(tmp_path):
    out = write_output(tmp_path)
    # Before the sub-record of rank 0 points into the two shards.
    assert was_killed(out, 8)
    assert len(os.listdir(out / "shards")) == 2
    assert run(out, "--shard_size=100") == 0
    assert sorted(os.listdir(out / "shards")) == ["0-of-2-00002.pkls", "1-of-2-00000.pkls"]
    assert merged_ids(out / "record.json") == GOOD and not os.listdir(out / "files")


def test_items_tokenized_later_go_into_further_shards(tmp_path):
    """A rejected item is tried again after the others were moved: its line stands among theirs."""
    out = write_output(tmp_path, splits=1)
    assert run(out, "--shard_size=5") == 0
    shards = snapshot(out / "shards")
    save_token_file(out / "files" / "3.pkl", tokens_of(3), [-100] * 6, 3)
    record = out / "0-of-1-record.jsonl"
    lines = record.read_text().splitlines()
    lines.insert(3, json.dumps({"file": "files/3.pkl", "len": 6, "id": 3, "image_len": 2}))
    record.write_text("\n".join(lines) + "\n")
    (out / "0-of-1-failed.jsonl").write_text('{"id": 9, "reason": "its image is bad"}\n')
    # The trainer reads a record of both kinds.
    assert run(out) == 0
    assert merged_ids(out / "record.json") == sorted([*GOOD, 3])
    assert run(out, "--shard_size=5") == 0
    assert merged_ids(out / "record.json") == sorted([*GOOD, 3]) and not os.listdir(out / "files")
    after = snapshot(out / "shards")
    assert shards.items() <= after.items() and set(after) - set(shards) == {"0-of-1-00003.pkls"}


def test_until_the_record_is_merged_again_its_shards_stay(tmp_path, monkeypatch):
    """Items of a shard are tokenized again by `--retry_failed`, and the next merge is interrupted."""
    out = write_output(tmp_path, splits=1)
    assert run(out, "--shard_size=5") == 0
    with WorkerLog(out, 0, 1, 0, NUM_ITEMS) as log:
        log.recover(stop_id=6)
        log_items(log, range(6, NUM_ITEMS))

    def interrupted(*_):
        raise OSError("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(concat_record, "write_merged", interrupted)
        assert run(out, "--shard_size=3") == 2
    assert merged_ids(out / "record.json") == GOOD
    assert run(out, "--shard_size=3") == 0
    assert merged_ids(out / "record.json") == GOOD and len(os.listdir(out / "shards")) == 4


def test_datasets_of_the_old_recipe_move_too(tmp_path, monkeypatch):
    """Files named from the working directory, no manifest."""
    (tmp_path / "data" / "files").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        save_token_file(f"data/files/{i}.pkl", tokens_of(i), [-100] * (3 + i), i)
        entry = {"file": f"data/files/{i}.pkl", "len": 3 + i, "id": i}
        with open(f"data/{i // 2}-of-2-record.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")
    assert run(Path("data"), "--shard_size=2") == 0
    monkeypatch.chdir("/")
    items = [load_token_file(e.file, e.offset, e.nbytes) for e in read_record(tmp_path / "data" / "record.json")]
    assert [item.token.tolist() for item in items] == [tokens_of(i) for i in range(4)]
    assert not os.listdir(tmp_path / "data" / "files")


@pytest.mark.parametrize(
    "damage, flags, message",
    [
        (
            lambda out: save_token_file(out / "files" / "5.pkl", [1, 2], [1, 2], 5),
            ["--shard_size=4"],
            "has 2 tokens, but its record says 8",
        ),
        (lambda out: (out / "files/5.pkl").write_bytes(b"x"), ["--shard_size=4"], "5.pkl cannot be read"),
        (stop_a_worker_early, ["--shard_size=4"], "has done 5 of its 7 items"),
        (lambda out: None, ["--shard_size=4", "--allow_partial"], "omit --allow_partial"),
        (lambda out: None, ["--shard_size=0"], "--shard_size must be at least 1, got 0"),
    ],
)
def test_what_may_not_move_stays_as_it_is(tmp_path, capsys, damage, flags, message):
    out = write_output(tmp_path)
    damage(out)
    files = sorted(os.listdir(out / "files"))
    assert run(out, *flags) == 2
    assert message in capsys.readouterr().err
    assert sorted(os.listdir(out / "files")) == files and not (out / "record.json").exists()


def test_nothing_moves_under_a_worker_and_a_shard_that_is_gone_or_cut_is_rejected(tmp_path, capsys):
    out = write_output(tmp_path)
    with WorkerLog(out, 1, SPLITS, 7, 14):
        assert run(out, "--shard_size=4") == 2
    assert "a worker is running on" in capsys.readouterr().err and not (out / "shards").exists()
    assert run(out, "--shard_size=4") == 0
    shard = out / "shards" / "1-of-2-00001.pkls"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert run(out) == 2 and "ends before the tokens of id 13" in capsys.readouterr().err
    shard.unlink()
    assert run(out) == 2 and "1-of-2-00001.pkls of id 12 does not exist" in capsys.readouterr().err


def test_links_to_a_record_and_to_its_folder_are_read_and_written_through(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_output(Path("disk/deep/tokens"))
    Path("tokens").symlink_to("disk/deep/tokens")
    Path("link.json").symlink_to("tokens/record.json")
    assert concat(["--sub_record_dir=tokens", "--save_path=out/record.json"]) == 0
    assert merged_ids(Path("out/record.json")) == GOOD
    assert concat(["--sub_record_dir=tokens", "--save_path=link.json", "--shard_size=4"]) == 0
    assert Path("link.json").is_symlink()
    for record in ("link.json", "tokens/record.json", "disk/deep/tokens/record.json"):
        assert merged_ids(Path(record)) == GOOD
    index = open_index("link.json", tmp_path / "cache")
    assert all(os.path.exists(index.place(i)[0]) for i in range(len(index.lens)))


def test_a_record_in_a_linked_folder_moves_with_its_tokens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_output(Path("here/tokens"))
    Path("here/disk/deep/records").mkdir(parents=True)
    Path("records").symlink_to("here/disk/deep/records")
    assert concat(["--sub_record_dir=here/tokens", "--save_path=records/record.json"]) == 0
    assert merged_ids(Path("records/record.json")) == merged_ids(Path("here/disk/deep/records/record.json")) == GOOD
    assert '"file": "../../../tokens/' in Path("records/record.json").read_text()
    os.rename("here", "moved")
    assert merged_ids(Path("moved/disk/deep/records/record.json")) == GOOD


@pytest.mark.parametrize(
    "name, message",
    [
        ("record.pkl", "record.pkl must end in .json"),
        ("1-of-2-failed.jsonl", "1-of-2-failed.jsonl is a file of the workers"),
        ("manifest.json", "manifest.json is a file of the workers"),
        ("link.json", "0-of-2-record.jsonl is a file of the workers"),
        ("", "is a folder; name a file in it"),
    ],
)
def test_a_record_is_saved_under_no_other_name(tmp_path, capsys, name, message):
    before = snapshot(write_output(tmp_path))
    (tmp_path / "link.json").symlink_to("0-of-2-record.jsonl")
    assert concat([f"--sub_record_dir={tmp_path}", f"--save_path={tmp_path}/{name}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    (tmp_path / "link.json").unlink()
    assert snapshot(tmp_path) == before
