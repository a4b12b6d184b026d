"""The bench of the training step runs, its figures belong together, and both its ways learn the same."""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from transformers import ChameleonForConditionalGeneration

from exps.bench.train import default_model_size, main
from exps.bench.train_measure import covered, parse_training, read_kernels, sum_by_kind
from exps.bench.train_ways import Ours, Recipe, Work, bench_config, fill_rows, make_items, pad_items, spread_lengths
from model.decoder import loss as loss_module
from model.training.distributed import Launch, process_group
from tests.exps.test_bench_all import run_bench

NUM_STEPS = 50


@pytest.mark.slow
def test_the_bench_compares_both_ways_on_the_tiny_model():
    items = ("--num_items=3", "--item_len", 20, 90, "--accum_iter=2", "--repeats=2")
    summary = run_bench("train", "--model_size=tiny", "--baseline", *items)
    ours, baseline = summary["ours"], summary["baseline"]
    for way in (ours, baseline):
        assert way["num_items"] == 6 and way["num_tokens"] == 2 * (20 + 55 + 90)
        ms = way["ms_per_step"]
        assert 0 < ms["min"] <= ms["median"] <= ms["max"]
        assert way["tokens_per_s"] == pytest.approx(way["num_tokens"] / ms["median"] * 1e3)
        assert way["tflops"] == pytest.approx(way["tokens_per_s"] * way["flops_per_token"] / 1e12)
        assert way["mfu"]["matrix_rate"] == pytest.approx(way["tflops"] * 1e12 / summary["matrix_rate"]["flops_per_s"])
        assert way["mfu"].keys() == {"matrix_rate"}, "a CPU has no datasheet here"
        assert 0 <= way["peak_gib"] < 2
        assert way["phases_ms"].keys() == {"forward", "loss", "backward", "optimizer"}
        assert min(way["phases_ms"].values()) > 0 and way["host_ms"] > 0
        assert 0 < way["kinds_ms"]["attention"] < sum(way["phases_ms"].values())
        assert 0 < way["kinds_ms"]["matrix products"] < sum(way["phases_ms"].values())
    assert summary["ratio"]["tokens_per_s"] == pytest.approx(ours["tokens_per_s"] / baseline["tokens_per_s"])
    assert ours["losses"][0] == pytest.approx(baseline["losses"][0], abs=1e-4), "the same items and weights"
    assert len(ours["losses"]) == 1 + 2, "warm-up and measured steps"


@pytest.mark.slow
@pytest.mark.parametrize(("flag", "num_steps"), [("--checkpointing_selective", NUM_STEPS), ("--compile", 10)])
def test_the_loss_over_50_steps_stays_that_of_the_plain_path(flag, num_steps, monkeypatch):
    """Packed rows, chunked loss and fused AdamW against items one by one, all logits at once and plain AdamW."""
    # The smallest chunks, so that there are several.
    monkeypatch.setattr(loss_module, "_CHUNK_LOGITS", 1)
    work = Work((37, 90, 64), 200)
    with process_group(Launch(), "cpu", timeout_s=60) as device:
        options, config = tiny_training(flag, "--lr", "1e-3")
        # aot_eager needs no C++ compiler; all layers are one graph.
        ours = Ours(work, options, config, device, compile_backend="aot_eager")
        losses = torch.stack([ours.step() for _ in range(num_steps)])
    plain = plain_losses(work)
    assert plain[-1] < plain[0] - 1, "it learns"
    assert (losses - plain[:num_steps]).abs().max() < 1e-3


@functools.cache
def plain_losses(work: Work) -> torch.Tensor:
    """Losses of all steps without any module of training: stock decoder, one item at a time, torch's own loss."""
    options, config = tiny_training("--lr", "1e-3")
    with process_group(Launch(), "cpu", timeout_s=60) as device:
        model = Recipe(work, options, config, device).model
        weights = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
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
    """Options and shape of a small tiny decoder with the q/k-norms of stock: one weight for each head."""
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


def test_items_fill_the_rows_and_only_their_tokens_count():
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


def test_kinds_of_work_and_time_with_a_kernel_running():
    names = {
        "void pytorch_flash::flash_bwd_dq_dk_dv": 1,
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT": 2,
        "Memcpy DtoD (Device -> Device)": 3,
        "triton_poi_fused_mul_silu_0": 4,
        "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>": 5,
        # A compiled kernel may contain casts; the optimizer's kernels copy lists, too.
        "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_1": 10,
        "void at::native::multi_tensor_apply_kernel<TensorListMetadata<2>, CopyFunctor<float, 2, 1, 1>, Copy>": 20,
    }
    kinds = {"attention": 1, "matrix products": 2, "optimizer": 5, "copies": 23, "other": 14}
    assert sum_by_kind(names) == kinds
    assert covered([(0, 2), (1, 3), (5, 6), (5, 5.5)]) == 4


def test_a_profile_counts_kernels_of_the_device_without_annotations():
    def event(name, device, start, end, is_mark=False):
        time_range = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        return SimpleNamespace(name=name, device_type=device, time_range=time_range, is_user_annotation=is_mark)

    cuda, cpu = DeviceType.CUDA, DeviceType.CPU
    events = [event("gemm", cuda, 0, 3000), event("gemm", cuda, 2000, 4000), event("FSDP::x", cuda, 0, 9000, True)]
    assert read_kernels([*events, event("aten::mm", cpu, 0, 9000)]) == ({"gemm": 5.0}, 4.0)
    assert read_kernels([]) == ({}, 0.0)


@pytest.mark.parametrize(("gib", "size"), [(139.8, "7B"), (79.1, "1B")])
def test_the_default_size_fits_the_gpu(monkeypatch, gib, size):
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
        (["--rows", "0"], "argument --rows: must be at least 1, got 0"),
        (["--device", "cpu", "--float8"], "--float8 needs a GPU"),
        (["--device", "cpu", "--float8", "--num_items", "1", "--item_len", "20"], "of 16 tokens, got 20"),
        (["--dropout", "2"], "--dropout must be at most 0.99, got 2"),
        (["--checkpontin"], "--checkpointing"),
    ],
)
def test_wrong_options_end_with_a_message(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code == 2 and message in capsys.readouterr().err
