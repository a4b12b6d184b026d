"""The bench of the training step runs, and what it reports is what happened; both its ways learn the same."""

import functools
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from exps.bench.sweep import format_variant
from exps.bench.train import default_model_size, format_way, main, measure_alone
from exps.bench.train_measure import Task, covered, out_of_memory, parse_training, read_kernels, sum_by_kind
from exps.bench.train_ways import Ours, Recipe, Work, bench_config, fill_rows, make_items, pad_items, spread_lengths
from model import loss as loss_module
from model.distributed import Launch, process_group
from model.flops import flops_per_token
from tests.tokenize_helpers import ROOT, environment, run_script

NUM_STEPS = 50


@pytest.mark.slow
def test_the_bench_compares_both_ways_on_the_tiny_model():
    done = run_script(
        "exps/bench/train.py", "--model_size=tiny", "--baseline", "--num_items=3", "--item_len", 20, 90, "--repeats=2",
        "--device=cpu", "--accum_iter=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    assert sum(line.startswith(("| fp32 | ours |", "| fp32 | baseline |", "| fp32 | ratio |")) for line in table) == 3
    summary = json.loads(last)
    assert {"bench", "device", "versions", "ours", "baseline", "ratio", "load"} <= summary.keys()
    ours, baseline = summary["ours"], summary["baseline"]
    for way in (ours, baseline):
        assert way["num_items"] == 6 and way["num_tokens"] == 2 * (20 + 55 + 90)
        ms = way["ms_per_step"]
        assert 0 < ms["min"] <= ms["median"] <= ms["max"]
        assert way["tokens_per_s"] == pytest.approx(way["num_tokens"] / ms["median"] * 1e3)
        assert way["tflops"] == pytest.approx(way["tokens_per_s"] * way["flops_per_token"] / 1e12)
        assert way["mfu"]["matrix_rate"] == pytest.approx(way["tflops"] * 1e12 / summary["matrix_rate"]["flops_per_s"])
        assert way["mfu"]["datasheet"] is None, "a CPU has none here"
        assert 0 < way["peak_gib"] < 2
        assert way["phases_ms"].keys() == {"forward", "loss", "backward", "optimizer"}
        assert min(way["phases_ms"].values()) > 0
        assert 0 < way["kinds_ms"]["attention"] < sum(way["phases_ms"].values())
        assert 0 < way["kinds_ms"]["matrix products"] < sum(way["phases_ms"].values())
    assert summary["ratio"]["tokens_per_s"] == pytest.approx(ours["tokens_per_s"] / baseline["tokens_per_s"])
    assert summary["ratio"]["peak_memory"] == pytest.approx(ours["peak_gib"] / baseline["peak_gib"])
    assert ours["losses"][0] == pytest.approx(baseline["losses"][0], abs=1e-4), "the same items and weights"
    assert len(ours["losses"]) == 1 + 2, "warm-up and measured steps"


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--checkpointing_selective"],
        ["--compile"],  # by aot_eager, which needs no C++ compiler: one graph for all layers
    ],
    ids=lambda flags: flags[0] if flags else "as_it_is",
)
def test_the_loss_over_50_steps_stays_that_of_the_plain_path(flags, monkeypatch):
    """Packed rows, chunked loss and fused AdamW against items one by one, all logits at once and plain AdamW."""
    monkeypatch.setattr(loss_module, "_CHUNK_LOGITS", 1)  # the smallest chunks, so that there are several
    work = Work((37, 90, 64), 200)
    with process_group(Launch(), "cpu", timeout_s=60) as device:
        options, config = tiny_training(*flags, "--lr", "1e-3")
        ours = Ours(work, options, config, device, compile_backend="aot_eager")
        losses = torch.stack([ours.step() for _ in range(NUM_STEPS)])
    plain = plain_losses(work)
    assert plain[-1] < plain[0] - 1, "it learns"
    assert (losses - plain).abs().max() < 1e-3


@functools.cache
def plain_losses(work: Work) -> torch.Tensor:
    """Of each of the steps, without any module of training: stock decoder, one item at a time, torch's own loss."""
    options, config = tiny_training("--lr", "1e-3")
    with process_group(Launch(), "cpu", timeout_s=60) as device:
        model = Recipe(work, options, config, device).model
        weights = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
    from transformers import ChameleonForConditionalGeneration

    stock = ChameleonForConditionalGeneration(config).train()
    stock.load_state_dict(weights, strict=False)
    optimizer = torch.optim.AdamW(stock.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, foreach=False)
    items = make_items(work.item_lens, config.vocab_size, 0)
    num_valid = sum(int((item.label[1:] != -100).sum()) for item in items)
    losses = []
    for _ in range(NUM_STEPS):
        total = 0.0
        for item in items:
            token, label = torch.from_numpy(item.token).long(), torch.from_numpy(item.label).long()
            logits = stock.lm_head(stock.model(input_ids=token[None], use_cache=False).last_hidden_state)[0, :-1]
            log_z, is_target = logits.logsumexp(-1), label[1:] != -100
            ce = log_z[is_target] - logits[is_target].gather(1, label[1:][is_target, None])[:, 0]
            loss = (ce + config.z_loss_weight * log_z[is_target].square()).sum() / num_valid
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(stock.parameters(), options.optim.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return torch.tensor(losses)


def tiny_training(*flags: str):
    """Options and shape of the tiny decoder, small, with the q/k-norms of stock: one weight for each head."""
    options = parse_training(["--model_size=tiny", "--precision=fp32", "--z_loss_weight=1e-4", *flags])
    config = bench_config(options)
    config.update({"hidden_size": 64, "intermediate_size": 160, "vocab_size": 512, "tie_head_norm": False})
    return options, config


def test_both_ways_of_the_bench_learn_the_same():
    work, losses = Work((40, 23), 63, micro_steps=2), []
    with process_group(Launch(), "cpu", timeout_s=60) as device:
        for way in (Ours, Recipe):
            options, config = tiny_training("--lr", "1e-3")
            built = way(work, options, config, device)
            losses.append(torch.stack([built.step() for _ in range(5)]))
    assert (losses[0] - losses[1]).abs().max() < 1e-4


def test_items_fill_the_rows_and_tokens_are_those_of_items():
    lengths = fill_rows(8192, 300, 1100)
    assert sum(lengths) == 8192 and max(lengths) == 1100 and min(lengths[:-1]) == 300 and lengths[-1] > 1
    assert fill_rows(8192, 4096, 4096) == (4096, 4096)
    assert sum(fill_rows(4097, 4096, 4096)) == 4096, "an item of one token has no target"
    assert spread_lengths(4, 300, 1100) == (300, 567, 833, 1100)
    work = Work((300, 500), 1024, micro_steps=3)
    assert work.num_tokens == 2400 and work.mean_context == pytest.approx((300**2 + 500**2) / 800)
    input_ids, labels = pad_items(make_items(work.item_lens, 512, seed=0))
    assert input_ids.shape == labels.shape == (2, 500)
    assert (labels[0, 300:] == -100).all() and (labels[0, :30] == -100).all() and (labels[0, 30:300] > 1).all()


def test_flops_of_7b_are_those_of_the_formula():
    assert flops_per_token(bench_config(parse_training(["--model_size=7B"])), 4096) == pytest.approx(43.7e9, rel=1e-3)


def test_kinds_of_work_and_time_with_a_kernel_running():
    names = {
        "void pytorch_flash::flash_bwd_dq_dk_dv": 1,
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT": 2,
        "Memcpy DtoD (Device -> Device)": 3,
        "triton_poi_fused_mul_silu_0": 4,
        "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>": 5,
        # Casts are among what is compiled, lists are copied by what the optimizer uses too.
        "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_1": 10,
        "void at::native::multi_tensor_apply_kernel<TensorListMetadata<2>, CopyFunctor<float, 2, 1, 1>, Copy>": 20,
    }
    kinds = {"attention": 1, "matrix products": 2, "optimizer": 5, "copies": 23, "other": 14}
    assert sum_by_kind(names) == kinds
    assert covered([(0, 2), (1, 3), (5, 6), (5, 5.5)]) == 4


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, which keeps to the limit of a process's memory")
def test_a_baseline_that_does_not_fit_is_measured_with_recomputation_and_then_with_fewer_items():
    """In processes that may have 600 MiB beside what their imports take: two items padded to 5,000 tokens need more."""
    code = """
import json, re, resource
from exps.bench.train import build_parser, build_task, build_work, measure_baseline
data = int(re.search(r"^VmData:\\s+(\\d+) kB$", open("/proc/self/status").read(), re.M)[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (data + (600 << 20),) * 2)
args = build_parser().parse_args("--model_size=tiny --num_items=2 --row_len=5000 --item_len 20 5000".split())
args.warmup = args.repeats = 1
work = build_work(args)
print(json.dumps(measure_baseline(build_task(args, [], "cpu", work, None), work)))
"""
    env = environment() | {"OMP_NUM_THREADS": "1"}  # stacks of threads count
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["fits"] and result["num_tokens"] == 20, done.stderr
    assert result["reduced"] == "1 of 2 items, recomputed"


@pytest.mark.slow
def test_a_measurement_that_fails_is_a_line_of_the_table():
    broken = Task("no such way", ["--model_size=tiny"], "cpu", {"item_lens": [20], "row_len": 20})
    result = measure_alone(broken)
    assert result == {"fits": False, "failed": True, "reason": "ended with exit code 1"}
    assert "| fp32 | baseline | failed: ended with exit code 1 |" in format_way("fp32", "baseline", result)


def test_what_does_not_fit_is_told_from_what_failed():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(raised.value) == "CPU out of memory"
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried")) == "CUDA out of memory"
    for beside_torch in (
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
        "Triton Error [CUDA]: out of memory",
    ):
        assert out_of_memory(RuntimeError(beside_torch)) == "CUDA out of memory"
    assert out_of_memory(RuntimeError("shapes cannot be multiplied")) is None
    line = format_way("bf16", "baseline", {"fits": False, "reason": "CUDA out of memory", "reduced": ""})
    assert "does not fit: CUDA out of memory" in line and line.count("|") == 14


@pytest.mark.slow
def test_a_measurement_that_does_not_end_is_ended_and_one_without_time_is_not_begun():
    endless = Task("ours", ["--model_size=tiny"], "cpu", {"item_lens": [20], "row_len": 20}, repeats=10**9)
    result = measure_alone(endless, until=time.monotonic() + 2)
    assert result == {"fits": False, "failed": True, "reason": "ended after 2 s, when its time was over"}
    assert measure_alone(endless, until=time.monotonic())["reason"] == "no time left"


@pytest.mark.slow
def test_what_ours_measured_is_told_when_the_baseline_fails(monkeypatch, capsys):
    monkeypatch.setattr("exps.bench.train.measure_baseline", lambda *_: {"fits": False, "failed": True, "reason": "x"})
    flags = ["--device=cpu", "--model_size=tiny", "--item_len=20", "--num_items=1", "--repeats=1", "--minutes=5"]
    assert main([*flags, "--baseline"]) == 1
    *table, last = capsys.readouterr().out.splitlines()
    summary = json.loads(last)
    assert summary["ours"]["tokens_per_s"] > 0 and summary["ratio"] is None
    assert any("| fp32 | baseline | failed: x |" in line for line in table)


def test_the_kernels_of_a_profile_are_those_of_the_device_without_marks_of_the_program():
    def event(name, device, start, end, is_mark=False):
        time_range = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        return SimpleNamespace(name=name, device_type=device, time_range=time_range, is_user_annotation=is_mark)

    cuda, cpu = DeviceType.CUDA, DeviceType.CPU
    events = [event("gemm", cuda, 0, 3000), event("gemm", cuda, 2000, 4000), event("FSDP::x", cuda, 0, 9000, True)]
    assert read_kernels([*events, event("aten::mm", cpu, 0, 9000)]) == ({"gemm": 5.0}, 4.0)
    assert read_kernels([]) == ({}, 0.0)


def test_a_step_that_the_profiler_did_not_see_has_no_kinds():
    ms = {"median": 1.0, "min": 1.0, "max": 1.0}
    result = {"fits": True, "tokens_per_s": 1.0, "ms_per_step": ms, "tflops": 1.0, "peak_gib": 1.0, "kinds_ms": None}
    result |= {"phases_ms": {"loss": 1.0, "optimizer": 1.0}, "mfu": {"datasheet": None, "matrix_rate": 0.5}}
    assert format_way("bf16", "ours", result).endswith("| - |")
    assert format_variant({**result, "variant": "1 row"}).endswith("| 100.0% | - | - | - |")


@pytest.mark.parametrize(("gib", "size"), [(139.8, "7B"), (79.1, "1B")])
def test_the_size_measured_is_one_that_the_gpu_can_train(monkeypatch, gib, size):
    properties = SimpleNamespace(total_memory=int(gib * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert default_model_size("cuda") == size and default_model_size("cpu") == "tiny"


def test_the_options_of_the_lora_script_train_here():
    flags = ["--train_only", "image_head", "--lora_rank", "4", "--lora_alpha", "8"]
    options, config = tiny_training(*flags, "--lr", "1e-2")
    with process_group(Launch(), "cpu", timeout_s=60) as device:
        ours = Ours(Work((40, 23), 63), options, config, device)
        losses = [ours.step().item() for _ in range(5)]
        trained = {name.rpartition(".")[2]: p.shape for name, p in ours.model.named_parameters() if p.requires_grad}
    assert losses[-1] < losses[0]
    assert trained["image_rows"] == (256, 64)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--item_len", "30", "20"], "--item_len must be one or two lengths of 2 to --row_len 4096"),
        (["--item_len", "5000"], "--item_len must be one or two lengths of 2 to --row_len 4096"),
        (["--rows", "0"], "--rows must be at least 1, got 0"),
        (["--minutes", "0"], "--minutes must be above 0, got 0"),
        (["--device", "cpu", "--float8"], "--float8 needs a GPU"),
        (["--dropout", "2"], "--dropout must lie between 0 and 1, got 2"),
        (["--lora_rank", "-1"], "--lora_rank must not be negative, got -1"),
    ],
)
def test_wrong_options_end_with_a_message(flags, message, capsys):
    assert main(flags) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_option_ends_with_the_nearest_one(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--device=cpu", "--checkpontin"])
    assert ended.value.code == 2 and "--checkpointing" in capsys.readouterr().err
