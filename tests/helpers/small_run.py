"""What the tests of training share: a tokenizer of 200 tokens, a two-layer decoder, some dozen items, and how to run.

Nothing here is a mock: files are written by the modules that own them, and the solver is started as a user starts it.
"""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from data.formats.record import RecordEntry, write_merged
from data.formats.token_file import save_token_file
from data.items.vocab import ChameleonVocab
from model.convert import convert_checkpoint
from model.decoder.chameleon import build_config, build_model, init_weights
from model.run.checks import prepare
from model.run.options import Options, build_parser
from model.training.distributed import Launch
from model.weights.export import carried_vqgan, export_tensors
from model.weights.hf_folder import copy_tokenizer_files
from model.weights.load import clean_name
from tests.helpers import forked
from tests.helpers.decoder_helpers import code_name, write_word_tokenizer
from tests.helpers.forked import ROOT, environment


def write_small_task(folder: Path, num_items: int = 24, seed: int = 0) -> None:
    """Fills `folder` with `tokenizer/`, `init/` (a decoder of 2 layers, hidden 32), `record.json` and `data.yaml`."""
    control = ["<s>", "<pad>", "</s>", "<unk>", "<eoss>", "<racm3:break>", "<reserved08706>", "<reserved08799>"]
    names = [*control, *(f"<reserved{8800 + n:05d}>" for n in range(1, 9))]
    names += map(code_name, range(64))
    names += [f"word{n}" for n in range(200 - len(names))]
    tokenizer = write_word_tokenizer({name: i for i, name in enumerate(names)}, folder / "tokenizer")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 512}
    config = build_config("tiny", tokenizer, **shape)
    model = build_model(config, device="cpu")
    init_weights(model, seed=seed)
    export_hf(model, config, folder / "init", folder / "tokenizer")
    write_items(folder, ChameleonVocab.from_tokenizer(tokenizer), num_items, seed)
    (folder / "data.yaml").write_text("META:\n  - path: record.json\n")


def export_hf(model, config, out_dir, tokenizer_dir=None, *, dtype=None, **changes) -> None:
    """Writes a model as a checkpoint of our shape; `changes` are options of `convert_checkpoint`, which rewrites it."""
    folder = Path(f"{out_dir}-raw" if changes else out_dir)
    parameters = {clean_name(name): parameter for name, parameter in model.named_parameters()}
    shapes = {name: (tuple(p.shape), dtype or p.dtype) for name, p in parameters.items()}
    export_tensors(shapes, parameters.__getitem__, config, folder, carried_vqgan(config))
    if tokenizer_dir is not None:
        copy_tokenizer_files(tokenizer_dir, folder)
    if changes:
        convert_checkpoint(folder, out_dir, image_head_init="keep", **changes)


def write_items(folder: Path, vocab: ChameleonVocab, num_items: int, seed: int) -> None:
    """Items of some words and, every other one, an image that is to be predicted; of different lengths."""
    rng = np.random.default_rng(seed)
    (folder / "files").mkdir()
    entries = []
    for item_id in range(num_items):
        prompt = [vocab.bos_id, *rng.integers(80, 200, rng.integers(2, 12)).tolist(), vocab.end_of_turn_id]
        answer, image_len = rng.integers(80, 200, rng.integers(2, 20)).tolist(), None
        if item_id % 2:
            answer = vocab.image_to_tokens(rng.integers(0, 64, (2, 4)))
            image_len = len(answer)
        answer.append(vocab.end_of_turn_id)
        token, label = prompt + answer, [-100] * len(prompt) + answer
        save_token_file(folder / "files" / f"{item_id}.pkl", token, label, item_id)
        entries.append(RecordEntry(f"files/{item_id}.pkl", len(token), item_id, image_len))
    write_merged(entries, folder / "record.json")


def solver_args(folder: Path, output_dir: Path, **changes: object) -> list[str]:
    """Flags of a small run on the CPU; `changes` replace or add flags by name, None leaves one away."""
    flags = {"init_from": folder / "init", "data_config": folder / "data.yaml", "output_dir": output_dir}
    flags |= {"batch_size": 2, "accum_iter": 1, "max_seq_len": 64, "epochs": 2, "lr": 1e-2, "warmup_epochs": 0.1}
    flags |= {"wd": 0.1, "z_loss_weight": 1e-5, "precision": "fp32", "device": "cpu", "num_workers": 0}
    args = []
    for name, value in (flags | {"log_interval": 1} | changes).items():
        if value is not None:
            args += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return args


def find_problems(folder: Path, output_dir: Path, **changes: object) -> str:
    """What keeps a small run from starting, as one message; empty if nothing does."""
    options = Options.from_namespace(build_parser().parse_args(solver_args(folder, output_dir, **changes)))
    try:
        prepare(options, Launch())
    except ValueError as error:
        return str(error)
    return ""


def command(num_ranks: int, args: list[str]) -> list[str]:
    """The command line of a run: plain python for one rank (0), torchrun otherwise."""
    python = [sys.executable, "-u"]
    if num_ranks:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    return [*python, str(ROOT / "finetune_solver.py"), *args]


def run_solver(num_ranks: int, args: list[str], timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    """Runs to the end; 0 ranks means without a launcher."""
    return forked.run(command(num_ranks, args), environment(), timeout=timeout_s)


def train(num_ranks: int, args: list[str]) -> str:
    """Runs to a good end and returns what was printed."""
    done = run_solver(num_ranks, args)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read_lines(output_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def losses(output_dir: Path) -> dict[int, float]:
    """Loss by step, of training alone; every step is there once."""
    lines = [line for line in read_lines(output_dir) if "loss" in line]
    by_step = {line["step"]: line["loss"] for line in lines}
    assert len(by_step) == len(lines), "a step was logged twice"
    return by_step


def call_main(args: list[str]) -> tuple[int, str]:
    """Calls the solver's `main` in this process: (exit code, what it said on stderr)."""
    import finetune_solver

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            code = finetune_solver.main(args)
        except SystemExit as end:
            code = end.code
        finally:
            # A process that ends leaves its group; here another run may follow.
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    return code, said.getvalue()
