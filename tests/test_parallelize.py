"""Gradients and their norm do not depend on how the model is spread over ranks, nor on layers being compiled."""

import functools
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.decoder.chameleon import build_config, build_model, init_weights
from model.optim import OptimOptions, build_optimizer
from model.options import build_parser
from model.parallelize import (
    DTYPES,
    ParallelOptions,
    allocate,
    begin_micro_step,
    build_mesh,
    clip_grad_norm,
    parallelize,
)
from model.trainable import TrainableOptions, choose_trainable
from tests import forked

ROOT = Path(__file__).parents[1]
NUM_ROWS, ROW_LEN, NUM_LAYERS = 8, 24, 2
IMAGE_TOKENS = {f"IMGIMG{chr(65 + n)}Z": 40 + n for n in range(16)}
NUM_SHARDED_PARTS = NUM_LAYERS + 2  # the layers, the embedding, norm and head: one reduce-scatter each


def make_model(device: str, dtype: torch.dtype = torch.float32, train_only: list[str] | None = None):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": NUM_LAYERS, "num_key_value_heads": 2}
    config = build_config("tiny", IMAGE_TOKENS, vocab_size=96, z_loss_weight=1e-3, **shape)
    return choose_trainable(build_model(config, device, dtype), TrainableOptions(train_only=train_only), dtype)


def make_rows(blank: tuple[int, ...] = ()) -> list[dict[str, torch.Tensor]]:
    """The step's rows [1, ROW_LEN]: one to four documents, very uneven numbers of targets, none in `blank` rows."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for row in range(NUM_ROWS):
        input_ids = torch.randint(0, 96, (1, ROW_LEN), generator=generator)
        labels = input_ids.clone()
        labels[:, : 3 * row] = -100
        bounds = [0, *range(4 + row, ROW_LEN - 1, 5)][: 1 + row % 4] + [ROW_LEN]
        rows.append({"input_ids": input_ids, "labels": labels, "cu_seqlens": torch.tensor(bounds, dtype=torch.int32)})
    for row in blank:
        rows[row]["labels"] = torch.full_like(rows[row]["labels"], -100)
    return rows


def count_targets(rows: list[dict[str, torch.Tensor]]) -> int:
    """Valid targets: labels but those of a document's first token."""
    return sum(
        int((row["labels"] != -100).sum() - (row["labels"][0, row["cu_seqlens"][:-1].long()] != -100).sum())
        for row in rows
    )


@functools.cache
def plain_gradients(dtype: torch.dtype = torch.float32, blank: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """Of the whole step in one process, without sharding."""
    model = make_model("cpu", dtype)
    init_weights(model, seed=1)
    rows = make_rows(blank)
    for row in rows:
        model(**row, loss_scale=1.0 / count_targets(rows)).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


class RecordCollectives(TorchDispatchMode):
    """Notes (name, type) of every collective called under it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensor = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
            self.calls.append((func.overloadpacket.__name__, str(tensor.dtype)))
        return func(*args, **(kwargs or {}))

    def types_of(self, name: str) -> list[str]:
        return [dtype for called, dtype in self.calls if called == name]


# What every rank does; rank 0 keeps the result


def build_sharded(
    launch, options: ParallelOptions, device: str = "cpu", backend: Any = "aot_eager", train_only: Any = None
):
    mesh = build_mesh(options, device, launch.local_world_size)
    dtype = torch.promote_types(DTYPES[options.precision], torch.float32)
    model = parallelize(make_model("meta", dtype, train_only), mesh, options, backend)
    allocate(model, device, options)
    init_weights(model, seed=1)
    return model, mesh


def run_step(launch, model, options: ParallelOptions, blank: tuple[int, ...] = (), device: str = "cpu"):
    """Forward and backward of this rank's rows; yields after each, so that the caller can look at what it left."""
    rows = make_rows(blank)
    mine = rows[launch.rank :: launch.world_size]
    for micro_step, row in enumerate(mine):
        begin_micro_step(model, options, is_last=micro_step == len(mine) - 1)
        row = {name: tensor.to(device) for name, tensor in row.items()}
        model(**row, max_seqlen=ROW_LEN, loss_scale=1.0 / count_targets(rows)).loss.backward()
        yield


def sharded_gradients(launch, blank: tuple[int, ...] = (), backend: Any = "aot_eager", device: str = "cpu", **options):
    """The whole gradients of one step, their norm, and the norm after clipping to 0.01."""
    parallel = ParallelOptions(**{"precision": "fp32", **options})
    model, mesh = build_sharded(launch, parallel, device, backend)
    for _ in run_step(launch, model, parallel, blank, device):
        pass
    gradients = {
        name.replace("_checkpoint_wrapped_module.", ""): parameter.grad.full_tensor().clone()
        for name, parameter in model.named_parameters()
    }
    norm = clip_grad_norm(model, mesh, max_norm=0.01)
    return gradients, norm, clip_grad_norm(model, mesh, max_norm=0.0)


def micro_step_traces(launch, train_only: list[str] | None = None, **options) -> list[dict[str, Any]]:
    """Per micro-step: collectives of the sums, and the share of all values that the gradients hold on this rank."""
    parallel = ParallelOptions(precision="fp32", **options)
    model, _ = build_sharded(launch, parallel, train_only=train_only)
    total = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    traces, steps = [], run_step(launch, model, parallel)
    for _ in range(NUM_ROWS // launch.world_size):
        with RecordCollectives() as record:
            next(steps)
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        trace = {name: len(record.types_of(name)) for name in ("_reduce_scatter_base_", "allreduce_")}
        held = sum(gradient.to_local().numel() for gradient in gradients)
        traces.append(trace | {"held": held / total, "sharded": all(isinstance(g, DTensor) for g in gradients)})
    return traces


def types_in_bf16(launch, **options) -> dict[str, Any]:
    """The types met in one step under bf16, and whether the optimizer is fused."""
    parallel = ParallelOptions(precision="bf16", **options)
    model, _ = build_sharded(launch, parallel)
    optimizer = build_optimizer(model, OptimOptions())
    found = {"computation": set()}

    def see(module, args) -> None:
        found["computation"] |= {str(module.weight.dtype), str(args[0].dtype)}

    model.model.layers[-1].self_attn.q_proj.register_forward_pre_hook(see)
    model.model.layers[-1].mlp.down_proj.register_forward_pre_hook(see)
    with RecordCollectives() as record:
        for _ in run_step(launch, model, parallel):
            pass
    parameters = list(model.parameters())
    found["gradients"] = {str(parameter.grad.dtype) for parameter in parameters}
    optimizer.step()
    found["masters"] = {str(parameter.dtype) for parameter in parameters}
    moments = [optimizer.state[parameter][name] for parameter in parameters for name in ("exp_avg", "exp_avg_sq")]
    found["moments"] = {str(moment.dtype) for moment in moments}
    found["reduction"] = set(record.types_of("_reduce_scatter_base_"))
    return {name: sorted(types) for name, types in found.items()} | {"fused": optimizer.defaults["fused"]}


FP64 = {"precision": "fp64", "grad_precision": "fp64"}
HSDP = {"data_parallel": "hsdp", "hsdp_shard_size": 2}
# name: (ranks, what each does, its arguments). Two ranks take four micro-steps, four take two.
JOBS: dict[str, tuple[int, Any, dict[str, Any]]] = {
    "fsdp": (2, sharded_gradients, {}),
    "sdp": (2, sharded_gradients, {"data_parallel": "sdp", "checkpointing": True}),
    "hsdp_1": (2, sharded_gradients, {"data_parallel": "hsdp", "hsdp_shard_size": 1}),
    "compiled": (2, sharded_gradients, {"checkpointing": True, "compile": True}),
    "offloaded": (2, sharded_gradients, {"cpu_offload": True, "checkpointing_selective": True}),
    "hsdp": (4, sharded_gradients, HSDP),
    "fsdp_fp64": (2, sharded_gradients, FP64),
    "hsdp_fp64": (4, sharded_gradients, HSDP | FP64),
    "no_targets": (2, sharded_gradients, {"blank": (1, 3, 5, 7)}),
    "fsdp_traces": (2, micro_step_traces, {}),
    "image_head_traces": (2, micro_step_traces, {"train_only": ["image_head"]}),
    "hsdp_traces": (4, micro_step_traces, HSDP),
    "types_fp32": (2, types_in_bf16, {}),
    "types_bf16": (2, types_in_bf16, {"grad_precision": "bf16"}),
}


def run_jobs(num_ranks: int, out_dir: Path) -> None:
    """Run on every rank: all jobs of so many ranks, one after the other; rank 0 writes what they return."""
    from model.distributed import detect_launch, process_group

    launch = detect_launch()
    with process_group(launch, "cpu", timeout_s=60):
        for name, (ranks, job, arguments) in JOBS.items():
            if ranks == num_ranks:
                result = job(launch, **arguments)
                if launch.is_main:
                    torch.save(result, out_dir / f"{name}.pt")


@pytest.fixture(scope="module")
def result_of(tmp_path_factory):
    """A function from the name of a job to what it returned; jobs of as many ranks share their processes."""
    out_dir, said = tmp_path_factory.mktemp("jobs"), {}

    def load(name: str) -> Any:
        ranks = JOBS[name][0]
        if ranks not in said:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            command = [*launcher, __file__, str(ranks), str(out_dir)]
            done = forked.run(command, environment)
            said[ranks] = done.stderr
        path = out_dir / f"{name}.pt"
        assert path.exists(), f"{name} of {ranks} ranks was not done:\n{said[ranks][-4000:]}"
        return torch.load(path)

    return load


# Gradients


def assert_equal_to_plain(result, dtype=torch.float32, bound: float = 2e-5, blank: tuple[int, ...] = ()) -> None:
    gradients, norm, clipped = result
    expected = plain_gradients(dtype, blank)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        assert (gradient.cpu() - expected[name]).norm() <= bound * expected[name].norm(), name
    plain_norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    torch.testing.assert_close(norm.cpu(), plain_norm, rtol=bound, atol=0)
    torch.testing.assert_close(clipped.cpu(), torch.tensor(0.01, dtype=dtype), rtol=1e-3, atol=0)


def gradients_alone(device: str = "cpu", **arguments):
    from model.distributed import Launch, process_group

    with process_group(Launch(), device, timeout_s=60):
        return sharded_gradients(Launch(), device=device, **arguments)


@pytest.mark.parametrize(("precision", "checkpointing"), [("fp32", False), ("fp32", True), ("fp64", False)])
def test_gradients_of_a_single_rank(precision, checkpointing):
    arguments = {"precision": precision, "grad_precision": precision, "checkpointing": checkpointing}
    bound = {"fp32": 2e-5, "fp64": 1e-12}[precision]
    assert_equal_to_plain(gradients_alone(**arguments), DTYPES[precision], bound)


def test_a_rank_alone_does_not_divide_its_gradients():
    """A division by 1.0 would cost another copy of each part's gradients in fp32 in every micro-step."""
    from model.distributed import Launch, process_group

    options, divided = ParallelOptions(precision="bf16"), []

    class RecordDivisions(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_):
                divided.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    with process_group(Launch(), "cpu", timeout_s=60):
        model, _ = build_sharded(Launch(), options)
        with RecordDivisions():
            next(run_step(Launch(), model, options))
        num_values = sum(parameter.grad.numel() for parameter in model.model.layers[0].parameters())
    assert num_values not in divided


@pytest.mark.slow
@pytest.mark.parametrize("job", ["fsdp", "sdp", "hsdp_1", "hsdp", "compiled", "offloaded"])
def test_gradients_of_several_ranks(result_of, job):
    """The sum over all micro-steps of all ranks is that of one process."""
    assert_equal_to_plain(result_of(job))


@pytest.mark.slow
@pytest.mark.parametrize("job", ["fsdp_fp64", "hsdp_fp64"])
def test_gradients_in_fp64_are_those_of_one_rank(result_of, job):
    assert_equal_to_plain(result_of(job), torch.float64, bound=1e-12)


@pytest.mark.slow
def test_a_rank_without_targets_gives_zero_gradients(result_of):
    """The second of two ranks has none; the sum is that of the first, without NaN."""
    assert_equal_to_plain(result_of("no_targets"), blank=(1, 3, 5, 7))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fsdp", "hsdp"])
def test_gradients_stay_sharded_between_micro_steps(result_of, mode):
    """Each micro-step ends in reduce-scatters; under hsdp the sum over the replicas waits for the last one."""
    traces = result_of(f"{mode}_traces")
    assert len(traces) == {"fsdp": 4, "hsdp": 2}[mode]
    assert [trace["_reduce_scatter_base_"] for trace in traces] == [NUM_SHARDED_PARTS] * len(traces)
    all_reduces = [trace["allreduce_"] for trace in traces]
    assert all_reduces == ([0, NUM_SHARDED_PARTS] if mode == "hsdp" else [0] * len(traces))
    assert all(trace["sharded"] for trace in traces)
    # Under hsdp the parts wait inside FSDP until they are summed.
    held = [trace["held"] for trace in traces]
    assert held == pytest.approx([0.0, 0.5] if mode == "hsdp" else [0.5] * len(traces), abs=0.01)


@pytest.mark.slow
def test_frozen_parts_send_no_gradients(result_of):
    """Of the layers, embedding, and norm and head only the last two hold rows that are trained."""
    traces = result_of("image_head_traces")
    assert [trace["_reduce_scatter_base_"] for trace in traces] == [2] * 4
    assert [trace["held"] for trace in traces] == pytest.approx([0.5] * 4, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("grad_precision", ["fp32", "bf16"])
def test_masters_and_reduction_types(result_of, grad_precision):
    found = result_of(f"types_{grad_precision}")
    assert found["computation"] == ["torch.bfloat16"]
    assert found["masters"] == found["gradients"] == found["moments"] == ["torch.float32"]
    assert found["reduction"] == [str(DTYPES[grad_precision])]
    assert found["fused"] is True


# Compiled layers


def count_graphs(backend: str):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    return CompileCounterWithBackend(backend)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_give_the_same_gradients(checkpointing):
    """One graph for all layers and for rows of one length, whatever their documents."""
    counter = count_graphs("aot_eager")
    result = gradients_alone(backend=counter, compile=True, checkpointing=checkpointing)
    assert len({tuple(row["cu_seqlens"].tolist()) for row in make_rows()}) == 7
    assert counter.frame_count == 1
    assert_equal_to_plain(result, bound=1e-6)


def test_layers_are_not_compiled_on_a_cpu_unless_asked():
    counter = count_graphs("aot_eager")
    gradients_alone(backend=counter)
    assert counter.frame_count == 0


@pytest.mark.gpu
def test_compiled_layers_on_cuda(monkeypatch):
    """Compiled is the default on CUDA: in bf16 with the kernel for packed rows. No other GPU test compiles."""
    # Inductor's pool of compiling processes takes longer to start than this graph takes to compile.
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    counter = count_graphs("inductor")
    arguments = {"device": "cuda", "precision": "bf16", "checkpointing": True}
    gradients, _, _ = gradients_alone(backend=counter, **arguments)
    assert counter.frame_count == 1
    eager, _, _ = gradients_alone(compile=False, **arguments)
    for name, gradient in gradients.items():
        assert (gradient - eager[name]).norm() <= 3e-2 * eager[name].norm(), name


@pytest.mark.gpu
def test_gradients_on_cuda():
    """In fp32, one call per document: those of the plain model on a CPU."""
    assert_equal_to_plain(gradients_alone(device="cuda", compile=False), bound=1e-4)


def test_every_part_is_offloaded_where_asked(monkeypatch):
    """On a CPU nothing else tells: weights are on the host anyway."""
    from model.distributed import Launch, process_group

    policies, shard = [], fully_shard

    def shard_and_note(module, **arguments):
        policies.append(type(arguments.get("offload_policy")))
        return shard(module, **arguments)

    monkeypatch.setattr("model.parallelize.fully_shard", shard_and_note)
    with process_group(Launch(), "cpu", timeout_s=60):
        build_sharded(Launch(), ParallelOptions(cpu_offload=True))
    assert policies == [CPUOffloadPolicy] * (NUM_SHARDED_PARTS + 1)  # the root holds no parameters of its own


def test_compile_is_a_switch():
    parse = build_parser().parse_args
    given = [parse(["--data_config", "data.yaml", *flag]).compile for flag in ([], ["--compile"], ["--no_compile"])]
    assert given == [None, True, False]


def test_problems():
    assert not ParallelOptions().problems(8, 8)
    assert not ParallelOptions(data_parallel="hsdp").problems(16, 8)
    assert "must divide" in ParallelOptions(data_parallel="hsdp", hsdp_shard_size=3).problems(8, 8)[0]
    assert "only with" in ParallelOptions(hsdp_shard_size=2).problems(8, 8)[0]
    assert "bf16" in ParallelOptions(precision="fp16").problems(1, 1)[0]
    assert "fp32 or bf16" in ParallelOptions(grad_precision="fp16").problems(1, 1)[0]


if __name__ == "__main__":
    from model.distributed import end_process

    run_jobs(int(sys.argv[1]), Path(sys.argv[2]))
    end_process(0)
