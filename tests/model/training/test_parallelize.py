"""Gradients and their norm do not depend on how the model is spread over ranks, nor on layers being compiled."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter
from torch.distributed.tensor import DTensor
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.decoder.chameleon import build_config, build_model, init_weights
from model.decoder.trainable import TrainableOptions, choose_trainable
from model.training import parallelize as parallelize_module
from model.training.distributed import Launch, process_group
from model.training.optim import OptimOptions, build_optimizer
from model.training.parallelize import (
    DTYPES,
    ParallelOptions,
    allocate,
    begin_micro_step,
    build_mesh,
    clip_grad_norm,
    parallelize,
)
from tests.helpers import forked
from tests.helpers.decoder_helpers import count_graphs

NUM_RANKS, NUM_ROWS, ROW_LEN, NUM_LAYERS = 4, 8, 24, 2
IMAGE_TOKENS = {f"IMGIMG{chr(65 + n)}Z": 40 + n for n in range(16)}
# The layers, the embedding, norm and head: one reduce-scatter each.
NUM_SHARDED_PARTS = NUM_LAYERS + 2


def make_model(device: str, dtype: torch.dtype = torch.float32, train_only: list[str] | None = None):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": NUM_LAYERS, "num_key_value_heads": 2}
    config = build_config("tiny", IMAGE_TOKENS, vocab_size=96, z_loss_weight=1e-3, **shape)
    return choose_trainable(build_model(config, device, dtype), TrainableOptions(train_only=train_only), dtype)


def make_rows() -> tuple[list[dict[str, torch.Tensor]], int]:
    """(the step's rows [1, ROW_LEN] of one to four documents, their targets); the last of four ranks has no target."""
    generator, rows, num_targets = torch.Generator().manual_seed(3), [], 0
    for row in range(NUM_ROWS):
        input_ids = torch.randint(0, 96, (1, ROW_LEN), generator=generator)
        labels = input_ids.clone()
        labels[:, : ROW_LEN if row % NUM_RANKS == 3 else 3 * row] = -100
        bounds = [0, *range(4 + row, ROW_LEN - 1, 5)][: 1 + row % 4] + [ROW_LEN]
        rows.append({"input_ids": input_ids, "labels": labels, "cu_seqlens": torch.tensor(bounds, dtype=torch.int32)})
        # The first token of a document is no target.
        num_targets += int((labels != -100).sum() - (labels[0, bounds[:-1]] != -100).sum())
    return rows, num_targets


@functools.cache
def plain_gradients(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Of the whole step in one process, without sharding."""
    model = make_model("cpu", dtype)
    init_weights(model, seed=1)
    rows, num_targets = make_rows()
    for row in rows:
        model(**row, loss_scale=1.0 / num_targets).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


class RecordCalls(TorchDispatchMode):
    """Notes every operator called under it, with the type and size of its first tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, torch.dtype, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        for tensor in list(tensors)[:1]:
            self.calls.append((func.overloadpacket.__name__, tensor.dtype, tensor.numel()))
        return func(*args, **(kwargs or {}))

    def of(self, name: str) -> list[tuple[str, torch.dtype, int]]:
        return [call for call in self.calls if call[0] == name]


# What every rank does


def build_sharded(options: ParallelOptions, device: str = "cpu", backend: Any = "none", train_only: Any = None):
    """A filled model and its mesh. The default backend does not exist: nothing may be compiled."""
    mesh = build_mesh(options, device, dist.get_world_size())
    dtype = torch.promote_types(DTYPES[options.precision], torch.float32)
    model = parallelize(make_model("meta", dtype, train_only), mesh, options, backend)
    allocate(model, device, options)
    init_weights(model, seed=1)
    return model, mesh


def run_step(model, options: ParallelOptions, device: str = "cpu") -> Iterator[None]:
    """Forward and backward of this rank's rows; yields after each."""
    rows, num_targets = make_rows()
    mine = rows[dist.get_rank() :: dist.get_world_size()]
    for micro_step, row in enumerate(mine):
        begin_micro_step(model, options, is_last=micro_step == len(mine) - 1)
        row = {name: tensor.to(device) for name, tensor in row.items()}
        model(**row, max_seqlen=ROW_LEN, loss_scale=1.0 / num_targets).loss.backward()
        yield


def sharded_gradients(backend: Any = "none", device: str = "cpu", **options):
    """The whole gradients of one step, their norm, and the norm after clipping to 0.01."""
    parallel = ParallelOptions(**{"precision": "fp32", **options})
    model, mesh = build_sharded(parallel, device, backend)
    for _ in run_step(model, parallel, device):
        pass
    gradients = {
        name.replace("_checkpoint_wrapped_module.", ""): parameter.grad.full_tensor().clone()
        for name, parameter in model.named_parameters()
    }
    # A bound above the norm changes nothing.
    clip_grad_norm(model, mesh, max_norm=1e6)
    norm = clip_grad_norm(model, mesh, max_norm=0.01)
    return gradients, norm, clip_grad_norm(model, mesh, max_norm=0.0)


def micro_step_traces(train_only: list[str] | None = None, **options) -> list[tuple[int, int, float]]:
    """Per micro-step: reduce-scatters, all-reduces, and the share of the gradient's values that this rank holds."""
    parallel = ParallelOptions(precision="fp32", **options)
    model, _ = build_sharded(parallel, train_only=train_only)
    total = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    traces, steps = [], run_step(model, parallel)
    for _ in range(NUM_ROWS // NUM_RANKS):
        with RecordCalls() as record:
            next(steps)
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert all(isinstance(gradient, DTensor) for gradient in gradients)
        held = sum(gradient.to_local().numel() for gradient in gradients) / total
        traces.append((len(record.of("_reduce_scatter_base_")), len(record.of("allreduce_")), round(held, 2)))
    return traces


def types_in_bf16() -> dict[str, set[torch.dtype]]:
    """The types met in one step in bf16, whose gradients are summed in bf16."""
    parallel, computation = ParallelOptions(precision="bf16", grad_precision="bf16"), set()
    model, _ = build_sharded(parallel)
    optimizer = build_optimizer(model, OptimOptions())
    model.model.layers[-1].self_attn.q_proj.register_forward_pre_hook(
        lambda module, args: computation.update({module.weight.dtype, args[0].dtype})
    )
    with RecordCalls() as record:
        for _ in run_step(model, parallel):
            pass
    parameters = list(model.parameters())
    gradients = {parameter.grad.dtype for parameter in parameters}
    optimizer.step()
    return {
        "computation": computation,
        "gradients": gradients,
        "masters": {parameter.dtype for parameter in parameters},
        "moments": {optimizer.state[p][name].dtype for p in parameters for name in ("exp_avg", "exp_avg_sq")},
        "reduction": {dtype for _, dtype, _ in record.of("_reduce_scatter_base_")},
    }


FP64 = {"precision": "fp64", "grad_precision": "fp64"}
HSDP = {"data_parallel": "hsdp", "hsdp_shard_size": 2}
JOBS: dict[str, tuple[Any, dict[str, Any]]] = {
    "fsdp": (sharded_gradients, FP64),
    "sdp": (sharded_gradients, {"data_parallel": "sdp", "checkpointing": True} | FP64),
    "hsdp": (sharded_gradients, HSDP | FP64),
    "offloaded": (sharded_gradients, {"cpu_offload": True, "checkpointing_selective": True} | FP64),
    "fsdp_traces": (micro_step_traces, {}),
    "hsdp_traces": (micro_step_traces, HSDP),
    "image_head_traces": (micro_step_traces, {"train_only": ["image_head"]}),
    "types": (types_in_bf16, {}),
}


def run_jobs(rank: int, out_dir: Path) -> None:
    dist.init_process_group("gloo", f"file://{out_dir}/store", rank=rank, world_size=NUM_RANKS)
    results = {name: job(**arguments) for name, (job, arguments) in JOBS.items()}
    if rank == 0:
        torch.save(results, out_dir / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Any]:
    """What each job returned on rank 0 of four ranks."""
    out_dir = tmp_path_factory.mktemp("jobs")
    forked.spawn(run_jobs, (out_dir,), NUM_RANKS)
    return torch.load(out_dir / "results.pt", weights_only=False)


def assert_equal_to_plain(result, dtype=torch.float32, bound: float = 2e-5) -> None:
    gradients, norm, clipped = result
    expected = plain_gradients(dtype)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        assert (gradient.cpu() - expected[name]).norm() <= bound * expected[name].norm(), name
    plain_norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    torch.testing.assert_close(norm.cpu(), plain_norm, rtol=bound, atol=0)
    torch.testing.assert_close(clipped.cpu(), torch.tensor(0.01, dtype=dtype), rtol=1e-3, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["fsdp", "sdp", "hsdp", "offloaded"])
def test_gradients_of_several_ranks(results, job):
    """The sum over all micro-steps of all ranks is that of one process; a rank without targets adds zeros."""
    assert_equal_to_plain(results[job], torch.float64, bound=1e-12)


@pytest.mark.slow
def test_gradients_stay_sharded_between_micro_steps(results):
    """Each micro-step ends in reduce-scatters; under hsdp the sum over the replicas waits for the last one."""
    assert results["fsdp_traces"] == [(NUM_SHARDED_PARTS, 0, 0.25)] * 2
    # Under hsdp the parts wait inside FSDP until they are summed.
    assert results["hsdp_traces"] == [(NUM_SHARDED_PARTS, 0, 0.0), (NUM_SHARDED_PARTS, NUM_SHARDED_PARTS, 0.5)]
    # Frozen parts send no gradients: only the embedding, and norm and head, hold rows that are trained.
    assert results["image_head_traces"] == [(2, 0, 0.25)] * 2


@pytest.mark.slow
def test_masters_and_reduction_types(results):
    found = results["types"]
    assert found["computation"] == found["reduction"] == {torch.bfloat16}
    assert found["masters"] == found["gradients"] == found["moments"] == {torch.float32}


# One rank


@pytest.fixture
def alone():
    with process_group(Launch(), "cpu", timeout_s=60):
        yield


@pytest.mark.parametrize("options", [{"checkpointing": True}, {"data_parallel": "hsdp"}, {"cpu_offload": True} | FP64])
def test_gradients_of_a_single_rank(alone, options):
    bound = 1e-12 if "precision" in options else 2e-5
    assert_equal_to_plain(sharded_gradients(**options), DTYPES[options.get("precision", "fp32")], bound)


def test_a_rank_alone_does_not_divide_its_gradients(alone):
    """A division by 1.0 would cost another copy of each part's gradients in fp32 in every micro-step."""
    options = ParallelOptions(precision="bf16")
    model, _ = build_sharded(options)
    with RecordCalls() as record:
        next(run_step(model, options))
    num_values = sum(parameter.grad.numel() for parameter in model.model.layers[0].parameters())
    assert num_values not in [size for _, _, size in record.of("div") + record.of("div_")]


def test_a_rank_alone_reduces_gradients_where_they_are(alone, monkeypatch, capsys):
    """In one stream, without a copy; equal to the bit to FSDP's own way, over several micro-steps."""
    ours, norm, _ = sharded_gradients(precision="bf16")
    monkeypatch.setattr(parallelize_module, "_SameBuffer", DefaultReduceScatter)
    # As with a torch of other names.
    monkeypatch.setattr(parallelize_module, "STREAMS", ("no_such_stream",))
    expected, expected_norm, _ = sharded_gradients(precision="bf16")
    assert "has other streams and buffers in FSDP" in capsys.readouterr().err
    assert torch.equal(norm, expected_norm) and all(torch.equal(ours[name], expected[name]) for name in expected)


def test_one_stream_and_one_buffer_in_a_group_of_one(alone):
    model, _ = build_sharded(ParallelOptions(precision="bf16"))
    context = model._get_fsdp_state()._comm_ctx
    assert {getattr(context, name) for name in parallelize_module.STREAMS} == {context.device_handle.current_stream()}
    buffer, place = parallelize_module._SameBuffer(), {"dtype": torch.float32, "device": torch.device("cpu")}
    tensors = [buffer.allocate((4,), **place) for _ in range(4)]
    assert tensors[0] is tensors[1] and tensors[2] is tensors[3] and tensors[0] is not tensors[2]


def test_empty_shards_are_left_out_of_the_norm(alone, monkeypatch):
    seen, norm_of = [], torch._foreach_norm
    monkeypatch.setattr(
        torch, "_foreach_norm", lambda tensors, **more: seen.extend(tensors) or norm_of(tensors, **more)
    )
    mesh, module = build_mesh(ParallelOptions(), "cpu", 1), torch.nn.ParameterList([torch.ones(3, 4), torch.ones(0, 4)])
    for parameter in module:
        parameter.grad = torch.ones_like(parameter)
    assert float(clip_grad_norm(module, mesh, 1.0)) == pytest.approx(12**0.5)
    assert [tensor.shape for tensor in seen] == [(3, 4)] and float(module[0].grad.norm()) == pytest.approx(1.0)
    # A rank with nothing at all.
    assert float(clip_grad_norm(torch.nn.ParameterList(module[1:]), mesh, 1.0)) == 0


def test_every_part_is_offloaded_where_asked(alone, monkeypatch):
    """On a CPU only the policies differ: weights are on the host anyway."""
    policies, shard = [], fully_shard

    def shard_and_note(module, **arguments):
        policies.append(type(arguments.get("offload_policy")))
        return shard(module, **arguments)

    monkeypatch.setattr("model.training.parallelize.fully_shard", shard_and_note)
    build_sharded(ParallelOptions(cpu_offload=True))
    # The root, which holds no parameters of its own, is one more.
    assert policies == [CPUOffloadPolicy] * (NUM_SHARDED_PARTS + 1)


@pytest.mark.slow
def test_compiled_layers_give_the_same_gradients(alone):
    """One graph for all layers and for rows of one length, whatever their documents."""
    counter = count_graphs("aot_eager")
    result = sharded_gradients(backend=counter, compile=True, checkpointing=True)
    assert len({tuple(row["cu_seqlens"].tolist()) for row in make_rows()[0]}) == 7
    assert counter.frame_count == 1
    assert_equal_to_plain(result, bound=1e-6)


@pytest.mark.gpu
def test_compiled_layers_on_cuda(monkeypatch):
    """Compiled is the default on CUDA: in bf16 with the kernel for packed rows. No other GPU test compiles."""
    # Inductor's pool of compiling processes takes longer to start than this graph takes to compile.
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    counter = count_graphs("inductor")
    arguments = {"device": "cuda", "precision": "bf16", "checkpointing": True}
    with process_group(Launch(), "cuda", timeout_s=60):
        gradients, _, _ = sharded_gradients(backend=counter, **arguments)
        assert counter.frame_count == 1
        eager, _, _ = sharded_gradients(compile=False, **arguments)
    for name, gradient in gradients.items():
        assert (gradient - eager[name]).norm() <= 3e-2 * eager[name].norm(), name


@pytest.mark.gpu
def test_gradients_on_cuda():
    """In fp32, one call per document: those of the plain model on a CPU."""
    with process_group(Launch(), "cuda", timeout_s=60):
        assert_equal_to_plain(sharded_gradients(device="cuda", compile=False), bound=1e-4)


def test_problems(monkeypatch):
    assert not ParallelOptions().problems(8, 8)
    assert not ParallelOptions(data_parallel="hsdp").problems(16, 8)
    assert "must divide" in ParallelOptions(data_parallel="hsdp", hsdp_shard_size=3).problems(8, 8)[0]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", TorchVersion("2.11.0+cu130"))
        aliased = ParallelOptions(data_parallel="hsdp", grad_precision="bf16")
        assert "may mix up gradients" in aliased.problems(16, 8)[0]
        assert not dataclasses.replace(aliased, data_parallel="fsdp").problems(16, 8)
        patch.setattr(torch, "__version__", TorchVersion("2.12.0"))
        assert not aliased.problems(16, 8)
    wrong = ParallelOptions(hsdp_shard_size=2, precision="fp16", grad_precision="fp16", checkpointing_every=-1)
    found = "; ".join(wrong.problems(8, 8))
    assert all(part in found for part in ("only with", "bf16 has the range", "use fp32 or bf16", "at least 1"))


def test_short_rows_on_several_nodes_are_warned_of():
    options = ParallelOptions()
    assert "rows of 4,096 tokens are short for 16 ranks" in options.slow_reduction(4096, 16, 8)
    assert "12,000 tokens or more" in options.slow_reduction(4096, 16, 8)
    fewer_bytes, replicas = ParallelOptions(grad_precision="bf16"), ParallelOptions(data_parallel="hsdp")
    assert "8,000 tokens or more" in fewer_bytes.slow_reduction(4096, 16, 8)
    quiet = (
        options.slow_reduction(8 * 4096, 16, 8),
        options.slow_reduction(64, 8, 8),
        replicas.slow_reduction(64, 16, 8),
    )
    assert quiet == (None, None, None)
