"""`all.sh` runs every bench and leaves a JSON object of each and one table; `gpu.sh` runs its stages."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exps.bench.common import compare, format_table, report, run_alone
from tests.exps.test_exps import parse_call, write_stub
from tests.helpers import forked
from tests.helpers.tokenize_helpers import ROOT, environment

ALL_SH, GPU_SH = (ROOT / "exps" / "bench" / name for name in ("all.sh", "gpu.sh"))
RESULT = {"ours": {"seconds": 2.0}, "baseline": {"seconds": 8.0}, "ratio": {"seconds": 0.25}}
# A bench that prints a table and a result; checkpoint.py fails without a result, generate.py with one.
BENCHES = f"""
case "$*" in
  *checkpoint.py*) echo "no space left on device" >&2; exit 3 ;;
  *generate.py*) echo '{json.dumps(RESULT)}'; exit 1 ;;
  *exps/bench*) echo "| a table |"; echo '{json.dumps(RESULT)}' ;;
esac
"""


def run_all(tmp_path: Path, script: Path = ALL_SH, body: str = BENCHES, **env: str) -> subprocess.CompletedProcess:
    """Runs a script with a Python that writes its command line to `calls` and does `body`."""
    stub = write_stub(tmp_path / "python", f'echo "$*" >> "{tmp_path}/calls"\n{body}')
    env = environment() | {"PYTHON": str(stub), "OUT": str(tmp_path / "out"), "SCALE": "ci", **env}
    return subprocess.run(["bash", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def run_bench(name: str, *flags: object) -> dict:
    """Runs a bench on the CPU, all ways in one forked process, and returns its JSON object."""
    code = """
import importlib, sys
from exps.bench import common
def run_here(function, **arguments):
    module, name = function.split(":")
    return getattr(importlib.import_module(f"exps.bench.{module}"), name)(**arguments)
common.run_alone = run_here
sys.exit(importlib.import_module(f"exps.bench.{sys.argv[1]}").main(sys.argv[2:]))
"""
    done = forked.run([sys.executable, "-c", code, name, "--device=cpu", *flags], environment())
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert {"bench", "device", "versions", "ours", "baseline", "ratio", "rows"} <= summary.keys()
    return summary


@pytest.mark.parametrize("scale", ["gpu", "cpu", "ci"])
def test_every_bench_runs_and_a_failure_gives_a_line_and_the_exit_code(tmp_path, scale):
    done = run_all(tmp_path, SCALE=scale)
    assert done.returncode == 1
    assert "checkpoint ended with exit code 3" in done.stderr and "no space left on device" in done.stderr
    # The scripts of exps/bench that measure something; gpu.sh runs that of the encoder.
    names = {path.stem for path in ALL_SH.parent.glob("*.py") if "common.report(" in path.read_text()} - {"encoder"}
    assert {path.stem for path in (tmp_path / "out").glob("*.json")} == names - {"checkpoint"}
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in done.stdout and re.match(r"\d{4}-\d\d-\d\d\n", table)
    assert "{" not in table, "JSON objects are in files of their own"
    sections = dict(section.split("\n", 1) for section in table.split("## ")[1:])
    assert sections.keys() == names
    assert "failed: exit code 3, see checkpoint.err" in sections["checkpoint"]
    assert "failed: exit code 1, see generate.err" in sections["generate"]
    assert "    python exps/bench/train.py" in sections["train"] and "| a table |" in sections["train"]
    assert len([parse_call(call.split()) for call in (tmp_path / "calls").read_text().splitlines()]) == 5


def test_a_bench_without_time_left_is_a_line_beside_the_others(tmp_path):
    body = 'if [[ $* == *pre_tokenize.py* ]]; then sleep 60; else echo "| a table |"; fi'
    done = run_all(tmp_path, body=body, SCALE="gpu", TOTAL_S="2", BENCHES="train pre_tokenize data")
    assert done.returncode == 1 and "no time was left of TOTAL_S=2" in done.stderr
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| a table |" in table and table.count("failed: exit code 124") == 2


def test_gpu_sh_runs_each_stage_with_valid_flags_and_reports_a_failure(tmp_path):
    """The parsers of the benches accept all command lines."""
    (tmp_path / "out" / "tiny").mkdir(parents=True)
    done = run_all(tmp_path, GPU_SH)
    assert done.returncode == 1 and "generate: exit code 1" in done.stdout
    assert (tmp_path / "out" / "summary.txt").read_text() == done.stdout and "{" not in done.stdout
    ways = ("2rows", "4rows_selective", "8rows_checkpointing", "4rows_split", "one_gpu")
    stages = ["tests", "encoder", "tiny", "pre_tokenize", "pre_tokenize_host", *(f"train_{way}" for way in ways)]
    assert re.findall(r"## (\w+): exit code 0", done.stdout) == stages
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert len([parse_call(call) for call in calls if call[0].startswith("exps/bench/")]) == 9
    assert any("pytest" in call and "gpu" in call for call in calls)


@pytest.mark.parametrize(
    ("script", "env", "message"),
    [
        (ALL_SH, {"BENCHES": "train trian"}, "BENCHES may name"),
        (ALL_SH, {"SCALE": "huge"}, "SCALE must be gpu, cpu or ci"),
        (GPU_SH, {"STAGES": "tets"}, "STAGES may name"),
    ],
)
def test_wrong_settings_end_before_anything_runs(tmp_path, script, env, message):
    done = run_all(tmp_path, script, **env)
    assert done.returncode == 2 and message in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_bench_that_is_killed_leaves_no_temporary_folder(tmp_path):
    command = [sys.executable, "exps/bench/checkpoint.py", "--device=cpu", "--output_dir", tmp_path]
    bench = forked.Popen(command, environment())
    deadline = time.monotonic() + 120
    while not list(tmp_path.iterdir()):
        assert bench.poll() is None and time.monotonic() < deadline, "the bench made no folder"
        time.sleep(0.1)
    bench.terminate()
    assert bench.wait(60) == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_peak_of_a_measurement_is_its_own():
    large = bytearray(b"x") * (1 << 30)
    code = "from exps.bench.common import resident_gib; print(resident_gib())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.05 < float(done.stdout) < 1, "GiB: torch and transformers, imported"
    del large


@pytest.mark.slow
def test_the_bench_of_checkpoints_saves_both_ways_and_leaves_nothing(tmp_path):
    summary = run_bench("checkpoint", "--gigabytes=0.15", "--num_tokens=16", "--repeats=1", f"--output_dir={tmp_path}")
    ours, baseline = summary["ours"], summary["baseline"]
    assert ours["gigabytes"] == pytest.approx(baseline["gigabytes"], rel=1e-3) and 0.1 < ours["gigabytes"] < 0.2
    assert baseline["slowed_s"] == 0 and ours["lost_s"] == ours["stall_s"] + ours["slowed_s"]
    assert not list(tmp_path.iterdir()), "nothing is left on the disk that was measured"


@pytest.mark.slow
def test_both_ways_of_the_data_bench_read_all_tokens_of_an_epoch_and_our_rows_are_fuller():
    task = ("--num_items", 2000, "--num_rows", 1000, "--batch_size", 4, "--num_ranks", 1, "--num_workers", 0, 1)
    summary = run_bench("data", *task, "--lengths", 30, 800, "--max_seq_len", 832, "--repeats", 1)
    ours, baseline, ratio = summary["ours"], summary["baseline"], summary["ratio"]
    assert len({count for way in (ours, baseline) for count in way["num_tokens"].values()}) == 1
    assert ours["num_tokens"]["0"] == pytest.approx(2000 * (30 + 800) / 2, rel=0.05)
    assert baseline["plan"]["fill"] < 0.8 < 0.95 < min(ours["plan"]["fill"], ours["packing"]["fill"]) <= 1
    assert ratio["plan.fill"] == pytest.approx(ours["plan"]["fill"] / baseline["plan"]["fill"])
    assert min(*ours["tokens_per_s"].values(), *baseline["tokens_per_s"].values()) > 0


def test_a_table_has_each_way_and_the_ratios_of_what_both_have():
    ours = {"speed": 5, "ms": {"min": 2.0}, "only": 1}
    rows = [
        compare({"size": 8}, ours, {"speed": 2, "ms": {"min": 4.0}}, way="batched"),
        compare({"size": 8}, ours, {"speed": 1}, way="one by one"),
        compare({"size": 9}, ours, None),
    ]
    assert [row["ratio"] for row in rows] == [{"speed": 2.5, "ms.min": 0.5}, {"speed": 5}, None]
    assert format_table(rows, ("speed", "ms.min", "nowhere")).splitlines() == [
        "| case | way | speed | ms.min |",
        "|---|---|---|---|",
        "| 8 | ours | 5 | 2 |",
        "| 8 | batched | 2 | 4 |",
        "| 8 | ours / batched | 2.5 | 0.5 |",
        "| 8 | one by one | 1 | - |",
        "| 8 | ours / one by one | 5 | - |",
        "| 9 | ours | 5 | 2 |",
    ]


def test_a_way_that_fails_is_a_line_beside_the_other_way(capsys):
    failed = run_alone("no_such_module:function")
    assert failed == {"failed": "exit code 1"}
    assert report("x", "title", "cpu", [compare({"size": 8}, {"speed": 5}, failed)], ("speed",)) == 1
    *table, last = capsys.readouterr().out.splitlines()
    assert table[-2:] == ["| 8 | ours | 5 |", "| 8 | baseline | failed: exit code 1 |"]
    summary = json.loads(last)
    assert {"bench", "device", "versions", "ours", "baseline", "ratio", "rows"} <= summary.keys()
    assert summary["ours"] == {"speed": 5} and summary["ratio"] is None
