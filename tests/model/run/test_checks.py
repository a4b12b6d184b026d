"""What is rejected before a training starts: options, files, data, and what does not fit together."""

import json
import shutil

import pytest

from data.formats.record import RecordEntry, write_merged
from data.formats.token_file import save_token_file
from data.items.item_processor import hash_tokenizer, load_text_tokenizer
from model.run.options import MANUAL, Options, build_parser, flag_table, resolve_model
from tests.helpers.small_run import call_main, find_problems, solver_args


def parse(*args: str) -> Options:
    return Options.from_namespace(build_parser().parse_args(args))


def test_recipe_spellings_and_defaults():
    switches = (
        "--unmask_image_logits --no_auto_resume --no_pin_mem --disable_length_clustering --no_packing --no-compile"
    )
    chosen = parse("--data_config", "c", *switches.split(), "--train_only", "image_head", "*norm*")
    assert not chosen.model.mask_image_logits and not chosen.checkpoint.auto_resume and not chosen.data.pin_mem
    assert not chosen.data.length_clustering and chosen.parallel.compile is False
    assert chosen.trainable.train_only == ["image_head", "*norm*"]
    chosen = parse("--data_config", "c")
    assert chosen.checkpoint.auto_resume and chosen.data.pin_mem and chosen.data.length_clustering
    assert (chosen.data.batch_size, chosen.data.accum_iter, chosen.optim.clip_grad) == (4, 4, 4.0)


def test_the_manual_has_the_table_of_flags():
    assert flag_table() in MANUAL.read_text(), "run python -m model.run.options"


def test_resolve_model(small_task):
    def resolve(*flags):
        return resolve_model(parse(*flags).model)

    assert resolve() == ("Alpha-VLLM/Chameleon_7B_mGPT", "Alpha-VLLM/Lumina-mGPT-7B-768")
    assert resolve("--model_size", "tiny") == (None, None)
    assert resolve("--model_size", "tiny", "--tokenizer", "t") == (None, "t")
    init = str(small_task / "init")
    assert resolve("--init_from", init) == (init, init)
    assert resolve("--init_from", init, "--tokenizer", "t") == (init, "t")


def test_all_problems_are_listed_once_and_nothing_is_written(small_task, tmp_path):
    changes = {
        "data_config": "missing.yaml",
        "val_data_config": "absent.yaml",
        "lr": -1,
        "accum_iter": 0,
        "batch_size": 0,
        "val_interval": -1,
        "dropout": 2,
        "precision": "fp16",
        "model_parallel_size": 2,
        "data_parallel": "hsdp",
        "hsdp_shard_size": 3,
    }
    code, message = call_main(solver_args(small_task, tmp_path / "out", **changes))
    assert code == 2 and message.startswith("finetune_solver.py: training cannot start:")
    assert "Traceback" not in message and not (tmp_path / "out").exists()
    for problem in (
        "--data_config: data config missing.yaml does not exist",
        "--val_data_config: data config absent.yaml does not exist",
        "--lr must be above 0",
        "--accum_iter must be at least 1, got 0",
        "--batch_size must be at least 1, got 0",
        "--val_interval must be at least 0, got -1",
        "--dropout must be at most 0.99, got 2",
        "--precision fp16 is not supported: it overflows",
        "--model_parallel_size must be at most 1, got 2",
        "must divide the number of ranks (1), got 3",
    ):
        assert message.count(problem) == 1, (problem, message)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"epochs": "two"}, "argument --epochs: invalid int value: 'two'"),
        ({"batch_sise": 2}, "unrecognized arguments: --batch_sise 2; did you mean --batch_size?"),
        ({"optim": "adamw_bf16_states"}, "adamw_bf16_states is gone: use adamw, which resumes its checkpoints"),
        ({"data_config": None}, "--data_config: give the YAML"),
    ],
)
def test_errors_of_the_command_line_are_one_message(small_task, tmp_path, changes, problem):
    code, message = call_main(solver_args(small_task, tmp_path / "out", **changes))
    assert code == 2 and problem in message and message.startswith("finetune_solver.py: ")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"max_seq_len": 10}, "--max_seq_len 10"),
        ({"resume_path": "nowhere"}, "there is no checkpoint folder nowhere"),
        ({"init_from": "no/such/folder"}, "the checkpoint no/such/folder is not a folder"),
        ({"init_from": None, "model_size": "tiny"}, "needs --tokenizer DIR"),
        ({"tokenizer": "no/such/tokenizer/here"}, "--tokenizer no/such/tokenizer/here is not a folder"),
        ({"eval_only": True, "val_data_config": None}, "--val_data_config: give the YAML"),
        ({"eval_only": True, "init_from": None}, "--eval_only needs weights: --init_from, --resume_path, or a"),
        ({"eval_only": True, "resume_path": "nowhere"}, "there is no checkpoint folder nowhere"),
        ({"mask_image_logits": True}, "--mask_image_logits: the records have items that end in an image"),
        ({"mask_image_logits": True, "train_only": "image_head"}, "its rows would learn nothing"),
    ],
)
def test_what_does_not_fit_is_rejected(small_task, tmp_path, changes, problem):
    changes = {"tokenizer": small_task / "tokenizer"} | changes
    if changes.get("model_size") == "tiny":
        changes["tokenizer"] = None
    if "eval_only" in changes:
        changes = {"val_data_config": small_task / "data.yaml"} | changes
    assert find_problems(small_task, tmp_path / "out", **changes).count(problem) == 1
    assert not (tmp_path / "out").exists()


def test_masked_image_logits_fit_text_alone(small_task, two_types, tmp_path):
    (tmp_path / "text.yaml").write_text(f"META:\n  - path: {two_types / 'text.json'}\n")
    changes = {"data_config": tmp_path / "text.yaml", "mask_image_logits": True}
    assert find_problems(small_task, tmp_path / "out", **changes) == ""
    problems = find_problems(small_task, tmp_path / "out", **changes, val_data_config=small_task / "data.yaml")
    assert problems.count("end in an image to learn") == 1
    dropout = find_problems(small_task, tmp_path / "out", data_config=tmp_path / "text.yaml", context_dropout=0.1)
    assert "--context_dropout: no item of the records ends in a generated image" in dropout


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("model.safetensors", b"torn", "model.safetensors is damaged"),
        ("model.safetensors", None, "has no weights"),
        ("model.safetensors.index.json", b"{}", "model.safetensors.index.json is damaged"),
        ("config.json", b"{", "config.json"),
        ("tokenizer.json", b"{", "cannot be read"),
    ],
)
def test_a_damaged_start_is_rejected(small_task, tmp_path, name, content, problem):
    shutil.copytree(small_task / "init", tmp_path / "init")
    (tmp_path / "init" / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / "init" / name).write_bytes(content)
    assert problem in find_problems(small_task, tmp_path / "out", init_from=tmp_path / "init")


def test_records_without_items_with_wrong_tokens_or_of_another_tokenizer_are_rejected(small_task, tmp_path):
    (tmp_path / "data.yaml").write_text("META:\n  - path: record.json\n")
    config = {"data_config": tmp_path / "data.yaml"}
    save_token_file(tmp_path / "0.pkl", [1, 99999], [1, 99999], 0)
    for entries, problem in (
        ([], "has no items"),
        ([RecordEntry("0.pkl", 2, 0)], "holds ids from 1 to 99999"),
        ([RecordEntry("gone.pkl", 2, 0)], "gone.pkl does not exist"),
    ):
        write_merged(entries, tmp_path / "record.json")
        assert problem in find_problems(small_task, tmp_path / "out", **config)
    save_token_file(tmp_path / "0.pkl", [1, 90], [1, 90], 0)
    write_merged([RecordEntry("0.pkl", 2, 0)], tmp_path / "record.json")
    ours = hash_tokenizer(load_text_tokenizer(small_task / "tokenizer"))
    for tokenizer, is_rejected in ((ours, False), ("0" * 64, True)):
        (tmp_path / "manifest.json").write_text(json.dumps({"tokenizer_sha256": tokenizer}))
        problems = find_problems(small_task, tmp_path / "out", **config)
        assert ("record.json was tokenized with another tokenizer than" in problems) == is_rejected


def test_a_folder_of_checkpoints_is_reported_with_a_checkpoint_in_it(small_task, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(small_task / "init", folder / "epoch1")
    (folder / "epoch1" / "trainer_state.json").write_text("{}")
    for flag in ("init_from", "resume_path"):
        assert f"give {folder / 'epoch1'}" in find_problems(small_task, tmp_path / "out", **{flag: folder})


def test_changes_of_a_resumed_run_are_rejected(trained, small_task, tmp_path):
    changes = {"resume_path": trained / "epoch0", "seed": 1}
    problems = find_problems(small_task, tmp_path / "out", **changes)
    assert "the run to resume has changed: --seed was 0 and is 1" in problems and "--resume_anyway" in problems
    assert find_problems(small_task, tmp_path / "out", **changes, resume_anyway=True) == ""
    problems = find_problems(small_task, tmp_path / "out", **changes, train_only="image_head", resume_anyway=True)
    assert "cannot be resumed: --train_only was None and is ['image_head']" in problems
