"""Validation: against a plain computation, on several ranks, beside a training that must not change, and alone."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule

from data.epoch.dataset import TokenDataset
from data.epoch.packing import OrderOptions
from data.formats.data_config import load_data_config
from model.run.validation import validate, validation_rows
from model.training.distributed import Launch, process_group
from model.training.parallelize import ParallelOptions, build_mesh, parallelize
from model.weights.load import load_pretrained
from tests.helpers.small_run import call_main, losses, read_lines, solver_args


def evaluate(args, capsys):
    """The last line that `--eval_only` prints."""
    capsys.readouterr()
    assert call_main(args) == (0, "")
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def plain_losses(task, checkpoint):
    """Cross-entropy item by item, from the logits: of all targets, of text, of images, and by type."""
    model = load_pretrained(checkpoint).eval()
    image_ids = model.image_token_ids(torch.device("cpu"))
    found = {"loss": [], "text_loss": [], "image_loss": [], "text": [], "images": []}
    for source in load_data_config(task / "data.yaml"):
        dataset = TokenDataset([source], 64)
        for number in range(len(dataset)):
            token, label = (
                torch.from_numpy(part.copy()).long()
                for part in (dataset.read(number).token, dataset.read(number).label)
            )
            with torch.no_grad():
                logits = model(token[None]).logits[0, :-1].double()
            ce = F.cross_entropy(logits, label[1:], reduction="none", ignore_index=-100)
            is_target, is_image = label[1:] != -100, torch.isin(label[1:], image_ids)
            for name, chosen in (("loss", is_target), ("text_loss", is_target & ~is_image), ("image_loss", is_image)):
                found[name].append(ce[chosen & is_target])
            found[source.type].append(ce[is_target])
    return {name: torch.cat(parts).mean().item() for name, parts in found.items() if parts}


def test_eval_only_gives_the_plain_loss_and_writes_nothing(two_types, tmp_path, capsys):
    out = tmp_path / "out"
    changes = {"eval_only": True, "val_data_config": two_types / "data.yaml", "z_loss_weight": 0}
    found = evaluate(solver_args(two_types, out, dropout=0.5, **changes), capsys)
    expected = plain_losses(two_types, two_types / "init")
    for name in ("loss", "text_loss", "image_loss"):
        assert found[f"val_{name}"] == pytest.approx(expected[name], rel=1e-5)
    by_type = {name: pytest.approx(expected[name], rel=1e-5) for name in ("text", "images")}
    assert found["val_loss_by_type"] == by_type
    assert found["checkpoint"] == str(two_types / "init") and found["step"] == 0 and found["val_bad_items"] == 0
    assert not out.exists()


@pytest.mark.parametrize("world_size", [1, 3, 7])
def test_rows_are_the_same_on_any_number_of_ranks(two_types, world_size):
    dataset = TokenDataset(load_data_config(two_types / "data.yaml"), 64)

    def rows_of(options, ranks):
        dealt = [validation_rows(dataset, options, rank, ranks, pad_id=0) for rank in range(ranks)]
        units = [rows[index]["item_indices"] for index in range(len(dealt[0])) for rows in dealt]
        return [items for items in units if items]

    options = OrderOptions(batch_size=5, max_seq_len=64, units_per_step=4, seed=3, context_dropout=0.5)
    expected = rows_of(OrderOptions(batch_size=5, max_seq_len=64, units_per_step=1), 1)
    assert rows_of(options, world_size) == expected
    assert sorted(item for items in expected for item in items) == list(range(24))


def test_training_does_not_change(small_task, undisturbed, tmp_path, capsys):
    """The last line is that of the checkpoint, and a resumed run has the same lines."""
    changes = {"dropout": 0.1, "val_data_config": small_task / "data.yaml", "val_interval": 3, "num_workers": 1}
    out = tmp_path / "out"
    for max_steps in (5, 8):
        assert call_main(solver_args(small_task, out, max_steps=max_steps, **changes)) == (0, "")
    assert "validation after step 5: loss " in capsys.readouterr().out
    assert losses(out) == {step: loss for step, loss in losses(undisturbed).items() if step <= 8}
    lines = {line["step"]: line for line in read_lines(out) if "val_loss" in line}
    assert list(lines) == [3, 5, 6, 8]
    assert lines[8].keys() == {
        *("step", "epoch", "val_loss", "val_text_loss", "val_image_loss", "val_num_valid_tokens", "val_s")
    }
    assert lines[3]["val_loss"] > lines[8]["val_loss"] and lines[8]["epoch"] == pytest.approx(8 / 12, abs=1e-6)
    for step, more in ((8, {}), (5, {"resume_path": out / "epoch0-iter5"})):
        found = evaluate(solver_args(small_task, out, **changes, eval_only=True, **more), capsys)
        assert found["step"] == step and found["checkpoint"].endswith(f"epoch0-iter{step}")
        assert found["val_loss"] == pytest.approx(lines[step]["val_loss"], rel=1e-6)


def test_gathered_weights_are_freed(two_types):
    dataset = TokenDataset(load_data_config(two_types / "data.yaml"), 64)
    options = ParallelOptions(precision="fp32", compile=False, data_parallel="sdp")
    with process_group(Launch(), "cpu", timeout_s=60) as device:
        model = load_pretrained(two_types / "init").train()
        model = parallelize(model, build_mesh(options, "cpu", 1), options)
        order_options = OrderOptions(batch_size=5, max_seq_len=64, units_per_step=1)
        rows = validation_rows(dataset, order_options, 0, 1, pad_id=0)
        validate(model, rows, device, z_loss_weight=0.0)
        groups = [part._get_fsdp_state()._fsdp_param_group for part in model.modules() if isinstance(part, FSDPModule)]
    is_gathered = [group.is_unsharded for group in groups if group is not None]
    assert model.training and len(is_gathered) >= 3 and not any(is_gathered)


@pytest.mark.slow
def test_an_item_that_cannot_be_read_is_counted(small_task, tmp_path, capsys):
    task = shutil.copytree(small_task, tmp_path / "task")
    (task / "files" / "5.pkl").write_bytes(b"torn")
    bad = {"val_data_config": task / "data.yaml"}
    assert call_main(solver_args(small_task, tmp_path / "out", eval_only=True, **bad))[0] == 3
    printed = capsys.readouterr().out
    assert "skipped item: token file" in printed and json.loads(printed.splitlines()[-1])["val_bad_items"] == 1
    code, message = call_main(solver_args(small_task, tmp_path / "run", **bad, max_steps=1))
    assert code == 3 and "1 items cannot be read (--max_bad_items 0)" in message
