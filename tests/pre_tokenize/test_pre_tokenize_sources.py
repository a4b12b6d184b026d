"""The same items in every container and form give the same token files, also after a kill; bad input is named."""

import json
import os
import re
import subprocess
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.formats.record import read_record
from pre_tokenize import pre_tokenize as script
from pre_tokenize.concat_record import main as concat
from pre_tokenize.pre_tokenize import main as pre_tokenize
from pre_tokenize.worker_log import read_failed
from tests.data.formats.test_containers import write_tar
from tests.exps.test_exps import write_stub
from tests.helpers import forked
from tests.helpers.tokenize_helpers import ROOT, command, environment, snapshot
from tests.pre_tokenize.test_pre_tokenize import BAD, NUM_ITEMS, SCRIPT, arguments, task, undisturbed  # noqa: F401


def with_bytes(folder: Path, item: dict) -> dict:
    """The item as `datasets` stores it: bytes, or the path of an image that is missing."""
    (path,) = item["image"]
    file = folder / path
    content = file.read_bytes() if file.exists() else None
    return {**item, "image": [{"bytes": content, "path": path}]}


def as_messages(item: dict) -> dict:
    human, gpt = (turn["value"] for turn in item["conversations"])
    answer = [{"type": "image", "image": path} for path in item["image"]]
    assert gpt == "<|image|>"
    return {"messages": [{"role": "user", "content": human}, {"role": "assistant", "content": answer}]}


def write_input(task: Path, folder: Path, kind: str) -> Path:  # noqa: F811
    """The items of the task in a container or form; what to give as --in_filename."""
    items = json.loads((task / "in.json").read_text())
    if kind in ("jsonl", "messages", "sharegpt"):
        if kind == "messages":
            items = list(map(as_messages, items))
        elif kind == "sharegpt":
            text = json.dumps(items).replace("<|image|>", "<image>").replace('"image":', '"images":')
            items = json.loads(text)
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        return folder / f"{kind}.jsonl"
    if kind == "parquet":
        (folder / kind).mkdir()
        rows = [with_bytes(task, item) for item in items]
        for name, part in (("0.parquet", rows[:13]), ("1.parquet", rows[13:])):
            pq.write_table(pa.Table.from_pylist(part), folder / kind / name, row_group_size=5)
        return folder / kind
    if kind == "datasets":
        datasets.Dataset.from_list([with_bytes(task, item) for item in items]).save_to_disk(folder / kind)
        return folder / kind
    for name, numbers in (("0.tar", range(11)), ("1.tar", range(11, NUM_ITEMS))):
        members = []
        for number in numbers:
            fields = json.dumps({"conversations": items[number]["conversations"]})
            members.append((f"{number:04d}.json", fields.encode()))
            if number not in BAD:
                members.append((f"{number:04d}.png", (task / items[number]["image"][0]).read_bytes()))
        write_tar(folder / name, members)
    return folder / "*.tar"


def tokens(found: dict[str, bytes]) -> dict[str, bytes]:
    """Token files and record, which name no input, and the ids of rejected items."""
    kept = {name: content for name, content in found.items() if name.startswith("files/") or "-record" in name}
    failed = found["0-of-1-failed.jsonl"].splitlines()
    return {**kept, "rejected": [json.loads(line)["id"] for line in failed]}


@pytest.mark.parametrize("kind", ["jsonl", "messages", "sharegpt", "parquet", "datasets", "tar"])
def test_the_same_items_give_the_same_files(task, tmp_path, undisturbed, capsys, kind):  # noqa: F811
    name = write_input(task, tmp_path, kind)
    argv = arguments(task, tmp_path / "out", in_filename=name, image_root=task)
    assert pre_tokenize(argv) == 3
    form = {"messages": "chat `messages`", "sharegpt": "ShareGPT or LLaVA, <image> in the text"}.get(kind)
    out = capsys.readouterr().out
    assert (f"rank 0 of 1: rows of {name} are read as {form}" in out) if form else "are read as" not in out
    assert tokens(snapshot(tmp_path / "out")) == tokens(undisturbed)
    # The same input is known again.
    assert pre_tokenize(argv) == 3 and "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_two_workers_share_a_source(task, tmp_path, undisturbed, kind):  # noqa: F811
    name = write_input(task, tmp_path, kind)
    for rank in (1, 0):
        argv = arguments(task, tmp_path / "out", in_filename=name, image_root=task, splits=2, rank=rank)
        assert pre_tokenize(argv) == 3
    ours = snapshot(tmp_path / "out")
    assert {name: ours[name] for name in ours if name.startswith("files/")}.keys() == {
        name for name in undisturbed if name.startswith("files/")
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_killed_worker_resumes_with_the_same_files(task, tmp_path, kind):  # noqa: F811
    changes = {"in_filename": write_input(task, tmp_path, kind), "image_root": task, "batch_size": 1}
    argv = arguments(task, tmp_path / "out", **changes, num_workers=2)
    worker = forked.Popen(command(SCRIPT, *argv), environment(), start_new_session=True)
    try:
        while worker.poll() is None and not (tmp_path / "out" / "files" / "9.pkl").exists():
            time.sleep(0.001)
    finally:
        worker.kill()
        worker.wait()
    assert len(list((tmp_path / "out" / "files").glob("*.pkl"))) < NUM_ITEMS - len(BAD)
    for name in ("out", "calm"):
        assert pre_tokenize(arguments(task, tmp_path / name, **changes)) == 3
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "calm")


def test_pairs_are_told_apart_by_task_and_columns(task, tmp_path, capsys):  # noqa: F811
    png = (task / "img/0.png").read_bytes()
    members = [("0.txt", b"a cat"), ("0.png", png), ("1.txt", b"a dog"), ("1.png", png)]
    # The last lacks a member.
    write_tar(tmp_path / "in.tar", [*members, ("2.txt", b"a fox"), ("2.jpg", png)])
    prompt = "Generate an image of 64x64 according to the following prompt:\na cat"
    turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": "<|image|>"}]
    (tmp_path / "in.json").write_text(json.dumps([{"conversations": turns, "image": str(task / "img/0.png")}]))
    for name, flags in (("in.json", []), ("in.tar", ["--task=t2i", "--columns=prompt=txt,image=png"])):
        argv = arguments(task, tmp_path / name[3:], *flags, in_filename=tmp_path / name)
        assert pre_tokenize(argv) == (3 if flags else 0)
    ((item_id, reason),) = read_failed(tmp_path / "tar" / "0-of-1-failed.jsonl")
    assert item_id == 2 and "has no column `png`" in reason
    assert "pairs of `txt` and `png` (t2i)" in capsys.readouterr().out
    ours, theirs = ((tmp_path / name / "files" / "0.pkl").read_bytes() for name in ("tar", "json"))
    assert ours == theirs
    # Other columns are other settings.
    assert pre_tokenize([*argv[:-2], "--task=i2t"]) == 2
    assert "pairs was t2i prompt=txt,image=png, is now i2t prompt=caption,image=image" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind, flags, message",
    [
        ("no column", ["--task=t2i", "--columns=prompt=captoin"], "has no column `captoin`.*mean `caption`"),
        ("no form", [], "3 of 3 items are not of the input format, first item 0: .*`caption`, `image`"),
        ("cut parquet", [], "is no Parquet file, or it is cut off"),
        ("cut tar", [], "is no tar file, or it is cut off after 1 samples"),
        ("no column", ["--columns=prompt=a"], "--columns needs --task"),
        ("gone", [], "is not a file, not a glob that matches any"),
    ],
)
def test_bad_sources_are_one_message_and_nothing_written(task, tmp_path, capsys, kind, flags, message):  # noqa: F811
    path = tmp_path / ("in.tar" if "tar" in kind else "in.parquet")
    if path.suffix == ".tar":
        write_tar(path, [("0.txt", b"a"), ("0.png", b"x" * 5000)])
        path.write_bytes(path.read_bytes()[:3000])
    elif kind != "gone":
        pq.write_table(pa.table({"caption": ["a"] * 3, "image": [b"x"] * 3}), path)
        path.write_bytes(path.read_bytes()[: 100 if "cut" in kind else None])
    assert pre_tokenize(arguments(task, tmp_path / "out", *flags, in_filename=path)) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err) and captured.err.count("\n") == 1 and not captured.out
    assert not (tmp_path / "out").exists()


def test_the_form_is_checked_at_the_start_of_a_share_and_then_row_by_row(task, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(script, "CHECKED_ROWS", 2)
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    wrong = {"conversations": None}
    pq.write_table(
        pa.Table.from_pylist([{"conversations": turns, "image": None}] * 3 + [wrong]), tmp_path / "a.parquet"
    )
    assert pre_tokenize(arguments(task, tmp_path / "out", in_filename=tmp_path / "a.parquet")) == 3
    ((item_id, reason),) = read_failed(tmp_path / "out" / "0-of-1-failed.jsonl")
    assert item_id == 3 and "`conversations` must be a list" in reason
    capsys.readouterr()
    # An image column of nulls costs its items, one by one.
    table = pa.table({"caption": ["a", "b"], "image": pa.nulls(2, pa.binary())})
    pq.write_table(table, tmp_path / "nulls.parquet")
    argv = arguments(task, tmp_path / "nulls", "--task=t2i", in_filename=tmp_path / "nulls.parquet")
    assert pre_tokenize(argv) == 3
    assert "2 of 2 rejected items have one reason: column `image` must hold one image" in capsys.readouterr().out


# exps/pre_tokenize.sh

PYTHON = """
name=merge
if [[ $* =~ --rank=(.) ]]; then name=${BASH_REMATCH[1]}; fi
echo "$CUDA_VISIBLE_DEVICES" "${@:3}" > "$CALLS/$name"
if [[ $name == 1 ]]; then echo "1 rejected"; exit "$CODE"; fi
"""
# As srun does: the command in each task, the largest exit code of all.
SRUN = """
echo "$@" > "$CALLS/srun"
while [[ $1 == --* ]]; do shift; done
worst=0
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
  SLURM_STEP_ID=0 SLURM_PROCID=$rank "$@" || { code=$?; ((code > worst)) && worst=$code; }
done
exit $worst
"""
NODE = {"GPUS": "2", "CUDA_VISIBLE_DEVICES": "5,3,4"}
JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "3", "CUDA_VISIBLE_DEVICES": "0"}


def run_shell(task: Path, folder: Path, **env: str) -> tuple[subprocess.CompletedProcess, dict[str, list[str]]]:  # noqa: F811
    """Runs with stand-ins for python and srun. Also returns their GPUs and arguments, of workers by rank."""
    write_stub(folder / "python", PYTHON)
    write_stub(folder / "srun", SRUN)
    calls = folder / "calls"
    calls.mkdir()
    argv = arguments(task, folder / "out", in_filename="in.json")
    argv = [flag for flag in argv if not flag.startswith(("--splits", "--rank"))]
    env = environment() | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "CALLS": str(calls), **env}
    shell = ["bash", str(ROOT / "exps" / "pre_tokenize.sh"), *argv]
    done = subprocess.run(shell, cwd=task, env=env, capture_output=True, text=True)
    return done, {path.name: path.read_text().split() for path in calls.iterdir()}


@pytest.mark.parametrize("env", [NODE, JOB])
def test_the_script_runs_all_workers_and_merges(task, tmp_path, monkeypatch, env):  # noqa: F811
    """On a node, and as a SLURM job; from the folder in which the user stands. Its calls are then made here."""
    done, calls = run_shell(task, tmp_path, CODE="3", **env)
    assert done.returncode == 3, done.stderr
    if env == JOB:
        assert "--cpus-per-task=3" in calls["srun"]
        assert "--num_workers=3" in calls["0"] and calls["0"][-1] == "--num_workers=0"
    else:
        assert (calls["0"][0], calls["1"][0]) == ("5", "3")
        assert (tmp_path / "out" / "logs" / "1-of-2.log").read_text() == "1 rejected\n"
        assert re.search("rank 1 ended with exit code 3, see .*: 1 rejected", done.stderr)
    monkeypatch.chdir(task)
    for name, main, code in (("0", pre_tokenize, 3), ("1", pre_tokenize, 3), ("merge", concat, 0)):
        assert main(calls[name][1:]) == code
    entries = list(read_record(tmp_path / "out" / "record.json"))
    assert [entry.id for entry in entries] == [i for i in range(NUM_ITEMS) if i not in BAD]


@pytest.mark.parametrize(
    "env, code, started, message",
    [
        (NODE, 1, {"0", "1"}, "rank 1 ended with exit code 1"),
        (NODE | {"GPUS": "4"}, 2, set(), "GPUS=4, but 3 GPUs are visible"),
        (NODE | {"CUDA_VISIBLE_DEVICES": ""}, 1, {"0", "1"}, "rank 1 ended with exit code 1"),
    ],
)
def test_the_script_merges_nothing_where_a_worker_failed(task, tmp_path, env, code, started, message):  # noqa: F811
    done, calls = run_shell(task, tmp_path, CODE="1", **env)
    assert done.returncode == code and message in done.stderr and calls.keys() == started
