"""The commands, links and data of README.md, TRAIN.md and exps/bench/README.md are those of this checkout."""

import ast
import json
import os
import re
import subprocess
import textwrap
from pathlib import Path

import pytest
import yaml

from tests.exps.test_exps import parse_call, write_stub
from tests.helpers.small_run import ROOT

DOCS = ["README.md", "TRAIN.md", "exps/bench/README.md"]
# Every address outside of this repo that the documents name; a test has no network to follow them.
ADDRESSES = {
    "https://ai.meta.com/resources/models-and-libraries/chameleon-license",
    "https://arxiv.org/abs/2405.09818",
    "https://arxiv.org/abs/2408.02657",
    "https://github.com/Alpha-VLLM/Lumina-mGPT",
    "https://github.com/ByteDance-Seed/VeOmni",
    "https://github.com/GAIR-NLP/anole",
    "https://huggingface.co/Alpha-VLLM/Lumina-mGPT-34B-512",
    "https://huggingface.co/Alpha-VLLM/Lumina-mGPT-7B-1024",
    "https://huggingface.co/Alpha-VLLM/Lumina-mGPT-7B-512",
    "https://huggingface.co/Alpha-VLLM/Lumina-mGPT-7B-768",
    "https://huggingface.co/Alpha-VLLM/Lumina-mGPT-7B-768-Omni",
}


def blocks(doc: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / doc).read_text(), re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The anchors of the headings of a Markdown file, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("doc", DOCS)
def test_links_lead_somewhere(doc):
    targets = re.findall(r"\]\(([^)\s]+)\)", (ROOT / doc).read_text())
    assert {target for target in targets if target.startswith("http")} <= ADDRESSES
    for target in targets:
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            path = (ROOT / doc).parent / path if path else ROOT / doc
            assert path.exists() and (not anchor or anchor in anchors(path)), target


@pytest.mark.parametrize("doc", ["README.md", "TRAIN.md"])
def test_commands_are_accepted_by_their_parsers(doc, tmp_path):
    """Every block runs from top to bottom, with programs that only record their arguments."""
    (tmp_path / "exps").symlink_to(ROOT / "exps")
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").touch()
    (tmp_path / "stubs").mkdir()
    (tmp_path / "out").mkdir()
    for name in ("python", "python3", "torchrun", "srun", "sbatch", "pip", "hf", "pytest"):
        write_stub(tmp_path / "stubs" / name, f'printf "%s\\0" "$@" "" >> "{tmp_path}/calls"')
    environment = {"PATH": f"{tmp_path}/stubs{os.pathsep}{os.environ['PATH']}", "OUT": "out"}
    for block in blocks(doc, "bash"):
        settings = {"cwd": tmp_path, "env": environment, "stdout": subprocess.DEVNULL}
        subprocess.run(["bash", "-e", "-c", block], check=True, **settings)
    calls = [call.split("\0") for call in (tmp_path / "calls").read_text().split("\0\0") if ".py\0" in call]
    scripts = {next(word for word in call if word.endswith(".py")) for call in calls if parse_call(call)}
    assert {"finetune_solver.py", "inference_solver.py"} <= scripts


@pytest.mark.parametrize("doc", DOCS)
def test_data_and_code_can_be_read_and_named_files_exist(doc):
    for text in blocks(doc, "json"):
        json.loads(text)
    for text in blocks(doc, "yaml"):
        assert yaml.safe_load(text)
    for text in blocks(doc, "python"):
        ast.parse(textwrap.dedent(text))
    for name in re.findall(r"`((?:exps|model|data|pre_tokenize|tests)/[\w/.]+\.\w+)`", (ROOT / doc).read_text()):
        assert (ROOT / name).exists(), name
