"""`exps/bench/all.sh` runs every bench, leaves a JSON object of each and one table, and tells what failed."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exps.bench.table import figures
from tests.tokenize_helpers import ROOT, environment

ALL_SH = ROOT / "exps" / "bench" / "all.sh"
RESULT = {
    "bench": "x",
    "device": "a device",
    "versions": {"torch": "2.13.0"},
    "ours": {"seconds": 2.0, "nested": {"gib": 1.0}, "items": 3},
    "baseline": {"seconds": 8.0, "nested": {"gib": 4.0}, "items": 3},
    "ratio": {"time": 0.25},
}


def run_all(tmp_path: Path, **env: str) -> subprocess.CompletedProcess:
    env = {**environment(), "PYTHON": sys.executable, "OUT": str(tmp_path / "out"), "SCALE": "ci", **env}
    return subprocess.run(["bash", ALL_SH], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def make_launcher(tmp_path: Path) -> str:
    """A `python` that runs no bench but prints what one could; the bench of checkpoints fails before it has a result,
    that of generation with one."""
    launcher = tmp_path / "python"
    launcher.write_text(
        f"""#!/bin/bash
case "$*" in
  *table.py*) exec {sys.executable} "$@" ;;
  *checkpoint.py*) echo "no space left on device" >&2; exit 3 ;;
  *generate.py*) echo '{json.dumps(RESULT)}'; exit 1 ;;
  *) echo "| a table |"; echo '{json.dumps(RESULT)}' ;;
esac
"""
    )
    launcher.chmod(0o755)
    return str(launcher)


@pytest.mark.parametrize("scale", ["gpu", "cpu", "ci"])
def test_every_bench_runs_and_one_that_fails_is_a_line_and_the_exit_code(tmp_path, scale):
    done = run_all(tmp_path, PYTHON=make_launcher(tmp_path), SCALE=scale)
    assert done.returncode == 1
    assert "checkpoint ended with exit code 3" in done.stderr and "no space left on device" in done.stderr
    names = {path.stem for path in (tmp_path / "out").glob("*.json")}
    assert names == bench_names() - {"checkpoint"}
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in done.stdout
    assert re.search(r"a device; torch 2\.13\.0; \d{4}-\d\d-\d\d", table)
    assert "| checkpoint | failed: exit code 3, see checkpoint.err | | | |" in table
    assert "| generate | failed: exit code 1, see generate.err | | | |" in table
    assert "| generate | **time** |  |  | **0.25** |" in table, "what it measured before it failed"
    assert "| train | **time** |  |  | **0.25** |" in table and "| train | nested.gib | 1 | 4 | 0.25 |" in table
    assert "items" not in table.split("    python")[0], "what both ways share is no result"
    assert sum("    python exps/bench/" in line for line in table.splitlines()) == len(names) + 1


def bench_names() -> set[str]:
    """The scripts of exps/bench that measure something."""
    scripts = (ROOT / "exps" / "bench").glob("*.py")
    return {path.stem for path in scripts if '"ratio"' in path.read_text()} - {"table"}


def test_a_bench_that_no_time_is_left_for_is_a_line_beside_the_others(tmp_path):
    launcher = Path(make_launcher(tmp_path))
    launcher.write_text(
        launcher.read_text().replace("*generate.py*)", "*pre_tokenize.py*) sleep 60 ;;\n  *generate.py*)")
    )
    done = run_all(tmp_path, PYTHON=str(launcher), SCALE="gpu", TOTAL_S="2", BENCHES="train pre_tokenize data")
    assert done.returncode == 1 and "no time was left of TOTAL_S=2" in done.stderr
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| train | **time** |  |  | **0.25** |" in table
    assert "| pre_tokenize | failed: exit code 124" in table and "| data | failed: exit code 124" in table


@pytest.mark.slow
def test_a_bench_really_runs(tmp_path):
    done = run_all(tmp_path, BENCHES="train")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out" / "train.json").read_text())
    assert {"bench", "device", "versions", "ours", "baseline", "ratio"} <= summary.keys()
    assert "| train | tokens_per_s |" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize(
    ("env", "message"),
    [({"BENCHES": "train trian"}, "BENCHES may name"), ({"SCALE": "huge"}, "SCALE must be gpu, cpu or ci")],
)
def test_wrong_settings_end_before_anything_runs(tmp_path, env, message):
    done = run_all(tmp_path, **env)
    assert done.returncode == 2 and message in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_bench_that_is_killed_leaves_no_temporary_folder(tmp_path):
    command = [sys.executable, "exps/bench/checkpoint.py", "--device=cpu"]
    bench = subprocess.Popen(command, cwd=ROOT, env={**environment(), "TMPDIR": str(tmp_path)})
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.iterdir()):
            assert bench.poll() is None and time.monotonic() < deadline, "the bench made no folder"
            time.sleep(0.1)
        bench.send_signal(signal.SIGTERM)
        assert bench.wait(60) == 128 + signal.SIGTERM
    finally:
        bench.kill()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux")
def test_the_peak_of_a_measurement_is_not_that_of_the_process_that_started_it():
    large = bytearray(b"x") * (1 << 30)
    code = "from exps.bench.common import peak_host_gib; print(peak_host_gib())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.05 < float(done.stdout) < 1, "GiB: torch and transformers, imported"
    del large


def test_ways_of_a_baseline_are_compared_one_by_one():
    result = {"ratio": 2.5, "ours": {"speed": 5}, "baseline": {"batched": {"speed": 2}, "one by one": {"speed": 1}}}
    assert list(figures(result)) == [
        ("**ratio**", "", "", "**2.5**"),
        ("speed (batched)", "5", "2", "2.5"),
        ("speed (one by one)", "5", "1", "5"),
    ]
    assert list(figures({"ratio": None, "ours": {"speed": 5}, "baseline": None})) == [("speed", "5", "", "")]
    failed = {"fits": False, "reason": "CUDA out of memory"}
    assert list(figures({"ratio": None, "ours": {"speed": 5}, "baseline": failed})) == [("speed", "5", "", "")]
