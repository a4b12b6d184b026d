"""Checkpoints written in the background, by real ranks: later steps do not change them, nor does a failed save.

The ranks run this file as a script: `python tests/model/training/test_async_checkpoint.py SCENARIO FOLDER
DATA_PARALLEL`.
"""

import json
import re
import resource
import sys
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.utils._pytree import tree_flatten_with_path

from model.decoder.chameleon import build_config, build_model, init_weights, reset_rotary_buffers
from model.training import async_checkpoint
from model.training.async_checkpoint import CheckpointSaver, HostStager, SaveError
from model.training.checkpoint import CheckpointOptions, Position, TrainerState, load_checkpoint, publish, read_state
from model.training.distributed import detect_launch, end_process, process_group
from model.training.optim import OptimOptions, build_optimizer
from model.training.parallelize import ParallelOptions, build_mesh, parallelize
from model.weights.load import load_pretrained
from tests.helpers import forked
from tests.helpers.small_run import call_main, environment, losses, solver_args

# Bytes; every file of weights is larger.
SMALL_FILE = 1000


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`sync/epoch0` and `async/epoch0` of one moment of a training on 2 ranks, `async/epoch1` of a later one."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(2, "save", folder)
    return folder


def run_ranks(num_ranks: int, scenario: str, folder: Path, data_parallel: str = "fsdp") -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    command = [sys.executable, *launcher, __file__, scenario, folder, data_parallel]
    forked.run(command, environment(), timeout=240, check=True)


def read_training_state(checkpoint: Path, tmp_path: Path) -> dict[object, torch.Tensor]:
    """All full tensors of the training state by their keys."""
    dcp_to_torch_save(checkpoint / "training_state", tmp_path / "state.pt")
    leaves, _ = tree_flatten_with_path(torch.load(tmp_path / "state.pt", weights_only=False))
    return {keys: leaf for keys, leaf in leaves if isinstance(leaf, torch.Tensor)}


def assert_same_state(first: Path, second: Path, tmp_path: Path) -> None:
    """Weights, both moments and step counts of two checkpoints, and their weight files, are equal to the bit."""
    states = [read_training_state(folder, tmp_path) for folder in (first, second)]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 40
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_steps_taken_while_it_is_written_do_not_leak_into_a_checkpoint(saved, tmp_path):
    files = sorted(str(path.relative_to(saved / "sync")) for path in (saved / "sync").rglob("*") if path.is_file())
    assert "epoch0/training_state/__1_0.distcp" in files and "epoch0/model.safetensors" in files
    for name in files:
        # The metadata has an id of its own.
        if not name.endswith((".metadata", "trainer_state.json")):
            assert (saved / "async" / name).read_bytes() == (saved / "sync" / name).read_bytes(), name
    assert read_state(saved / "async" / "epoch0").position == read_state(saved / "sync" / "epoch0").position
    later = read_training_state(saved / "async" / "epoch1", tmp_path)
    earlier = read_training_state(saved / "async" / "epoch0", tmp_path)
    # The steps in between changed every tensor.
    assert not [name for name in later if torch.equal(later[name], earlier[name])]


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "data_parallel"), [(3, "fsdp"), (4, "hsdp")])
def test_what_two_ranks_saved_goes_through_another_number_of_ranks_unchanged(saved, tmp_path, num_ranks, data_parallel):
    """Loaded and saved again; rows do not divide by 3, and some ranks hold nothing of some tensors."""
    (tmp_path / "start").symlink_to(saved / "async" / "epoch0")
    run_ranks(num_ranks, "again", tmp_path, data_parallel)
    assert_same_state(tmp_path / "out" / "epoch0", saved / "sync" / "epoch0", tmp_path)
    assert load_pretrained(tmp_path / "out" / "epoch0").config.vocab_size == 203


@pytest.mark.slow
def test_all_ranks_raise_the_error_of_one_and_earlier_checkpoints_stay(tmp_path):
    run_ranks(2, "fail", tmp_path)
    for file, culprit in (("weights", "rank 0: SafetensorError"), ("shards", "rank 1: OSError")):
        first, second = [json.loads((tmp_path / f"{file}{rank}.json").read_text()) for rank in range(2)]
        assert first == second and culprit in first[0], first
        assert "could not be written" in first[0] and "\n" not in first[0]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["epoch0"]
    assert read_state(tmp_path / "epoch0").position.global_step == 1


def test_a_run_on_a_full_disk_ends_with_one_message_and_resumes_later(small_task, trained, tmp_path):
    args = solver_args(small_task, tmp_path / "out", max_steps=4, save_iteration_interval=3)
    try:
        limit_files(40 << 10)
        code, message = call_main(args)
    finally:
        limit_files(resource.RLIM_INFINITY)
    assert code == 1 and message.count("\n") == 1, message
    assert message.startswith(f"finetune_solver.py: checkpoint {tmp_path}/out/epoch0-iter1 could not be written (")
    assert "File too large" in message
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    assert call_main(args) == (0, "")
    assert losses(tmp_path / "out").items() <= losses(trained).items()


def test_a_save_needs_as_much_space_as_a_checkpoint_takes(small_task, trained, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("model.training.async_checkpoint.shutil.disk_usage", lambda path: usage(10**6, 0, 10**5))
    code, message = call_main(solver_args(small_task, tmp_path / "out", max_steps=1))
    needed = float(re.search(r"rank 0: .*it needs ([\d.e-]+) GB, and the disk has 0.0001 GB free", message)[1]) * 1e9
    assert code == 1 and message.count("\n") == 1 and "--ckpt_max_keep is 2" in message
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    files = read_state(trained / "epoch1").files
    weights = files["model.safetensors"] + files["training_state/__0_0.distcp"]
    assert needed < weights and needed == pytest.approx(weights, rel=0.5), "headers are a third of so small a model"


def test_no_async_save_writes_the_same(small_task, tmp_path, monkeypatch):
    def publish_if_sealed(saving: Path, final: Path) -> None:
        assert read_state(saving).files, "a folder gets its name once all of it is on disk"
        publish(saving, final)

    monkeypatch.setattr("model.training.async_checkpoint.publish", publish_if_sealed)
    for name, changes in (("async", {}), ("sync", {"no_async_save": True})):
        flags = {"max_steps": 3, "save_iteration_interval": 1, "ckpt_max_keep": 0}
        assert call_main(solver_args(small_task, tmp_path / name, **flags, **changes)) == (0, "")
    assert len(list((tmp_path / "sync").glob("epoch*"))) == 3
    for folder in (tmp_path / "sync").glob("epoch*"):
        assert_same_state(folder, tmp_path / "async" / folder.name, tmp_path)


def test_host_memory_is_of_exact_size_and_its_pages_are_locked_after_the_first_save(monkeypatch):
    """A second save goes to the same memory."""
    locked = threading.Event()
    monkeypatch.setattr(async_checkpoint, "lock_pages", lambda tensors, device, say: locked.set())
    for name, value in {"is_initialized": True, "synchronize": None, "current_device": 0}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    state = {"model": {str(n): torch.full((100 * n, 1), float(n)) for n in range(1, 5)}, "optimizer": {"step": 3}}
    state["model"]["odd"] = torch.arange(5, dtype=torch.int8)
    stager, copies = HostStager({}), []
    for change in range(2):
        for tensor in state["model"].values():
            tensor += change
        staged = stager.stage(state)
        assert staged["optimizer"] == {"step": 3} and locked.wait(10)
        assert all(torch.equal(staged["model"][name], tensor) for name, tensor in state["model"].items())
        assert not any(staged["model"][name] is tensor for name, tensor in state["model"].items())
        copies.append([tensor.data_ptr() for tensor in staged["model"].values()])
    assert copies[0] == copies[1]
    assert sum(copy.untyped_storage().nbytes() for copy in stager.copies.values()) == 4000 + 5


# What the ranks do


class Ranks:
    """A small decoder in training, on the ranks that run this file; vocabulary and widths do not divide evenly."""

    def __init__(self, folder: Path, data_parallel: str, launch) -> None:
        self.folder, self.launch, self.num_steps = folder, launch, 0
        vocabulary = {f"word{n}": n for n in range(203)}
        shape = {"hidden_size": 32, "intermediate_size": 65, "num_hidden_layers": 2, "max_position_embeddings": 64}
        self.config = build_config("tiny", vocabulary, **shape)
        shard_size = 2 if data_parallel == "hsdp" else 0
        options = ParallelOptions(data_parallel=data_parallel, hsdp_shard_size=shard_size, precision="fp32")
        mesh = build_mesh(options, "cpu", launch.local_world_size)
        self.model = parallelize(build_model(self.config, device="meta"), mesh, options)
        self.model.to_empty(device="cpu")
        reset_rotary_buffers(self.model)
        init_weights(self.model, 0)
        self.optimizer = build_optimizer(self.model, OptimOptions(lr=1e-2))

    def step(self) -> None:
        generator = torch.Generator().manual_seed(self.num_steps)
        input_ids = torch.randint(0, 203, (1, 32), generator=generator)
        places = {"position_ids": torch.arange(32)[None], "cu_seqlens": torch.tensor([0, 32]), "max_seqlen": 32}
        self.model(input_ids=input_ids, labels=input_ids, loss_scale=1 / 32, **places).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_steps += 1

    def saver(self, folder: Path, write_extras=lambda folder: None, **changes) -> CheckpointSaver:
        if self.launch.is_main:
            folder.mkdir(exist_ok=True)
        options = CheckpointOptions(folder, **changes)
        return CheckpointSaver(options, self.model, self.optimizer, self.config, write_extras, lambda line: None)

    @property
    def state(self) -> TrainerState:
        return TrainerState(Position(0, self.num_steps, self.num_steps), 2, self.launch.world_size, {})

    def save(self) -> None:
        """One moment by both ways; steps follow at once."""
        self.step()
        self.saver(self.folder / "sync", async_save=False).save("epoch0", self.state)
        saver = self.saver(self.folder / "async")
        saver.save("epoch0", self.state)
        for _ in range(4):
            self.step()
        saver.save("epoch1", self.state)
        self.step()
        saver.wait()

    def again(self) -> None:
        load_checkpoint(self.folder / "start", self.model, self.optimizer)
        saver = self.saver(self.folder / "out")
        saver.save("epoch0", self.state)
        saver.wait()

    def fail(self) -> None:
        """Rank 0 cannot write the weights, then rank 1 cannot write its shards."""
        self.step()
        self.saver(self.folder, async_save=False).save("epoch0", self.state)
        self.step()
        self.report_failure(self.saver(self.folder, write_extras=lambda folder: limit_files(SMALL_FILE)), "weights")
        saver = self.saver(self.folder)
        limit_files(SMALL_FILE if self.launch.rank == 1 else resource.RLIM_INFINITY)
        self.report_failure(saver, "shards")

    def report_failure(self, saver: CheckpointSaver, file: str) -> None:
        saver.save("epoch1", self.state)
        messages = []
        for _ in range(2):
            try:
                saver.wait()
            except SaveError as error:
                messages.append(str(error))
        limit_files(resource.RLIM_INFINITY)
        assert saver.has_failed and len(messages) == 2
        (self.folder / f"{file}{self.launch.rank}.json").write_text(json.dumps(messages))


def limit_files(num_bytes: int) -> None:
    """No file of this process can grow beyond this, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


if __name__ == "__main__":
    scenario, folder, data_parallel = sys.argv[1:]
    launch = detect_launch()
    with process_group(launch, "cpu", 60):
        getattr(Ranks(Path(folder), data_parallel, launch), scenario)()
    end_process(0)
