"""The rule of the house: a module imports only from rooms to its left. Late and TYPE_CHECKING imports count too."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.small_run import ROOT

# (column, room, its modules). Rooms of one column do not know each other; what is in no room is a script.
ROOMS = [
    (0, "data", "data.*"),
    (1, "decoder", "model.decoder.* model.attention model.loss model.local_shards model.trainable model.trained_rows"),
    (1, "vqgan", "model.vqgan pre_tokenize.image_encoder"),
    (2, "weights", "model.adapter_folder model.hf_folder model.image_head model.stock_folder model.weight_files"),
    (2, "weights", "model.convert"),
    (3, "training", "model.distributed model.parallelize model.recompute model.float8 model.optim"),
    (3, "training", "model.step_guard model.training model.checkpoint model.async_checkpoint model.cpu_memory"),
    (3, "generation", "model.generation model.decode_step model.root_forward model.kv_cache model.sampling"),
    (3, "generation", "model.image_grammar model.requests model.progress model.serve"),
    (4, "run", "model.options model.checks model.metrics model.run_log model.trackers model.watch model.stop_signal"),
    (4, "run", "model.bad_data model.validation model.samples model.sample_prompts model.samples_format model.flops"),
    (4, "run", "model.run_start"),
    (5, "plan", "model.plan model.storage_tracker"),
    (5, "pages", "model.report_page model.charts model.report_assets"),
    (6, "scripts", "*"),
]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in ("data", "model", "pre_tokenize", "exps", ".")
    for path in (ROOT / folder).glob("*.py" if folder == "." else "**/*.py")
}


def room_of(module: str) -> tuple[int, str]:
    return next((column, room) for column, room, names in ROOMS if any(fnmatch(module, n) for n in names.split()))


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)} & MODULES.keys()
        elif isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & MODULES.keys()


def test_modules_import_only_from_rooms_to_the_left():
    wrong = []
    for module, path in MODULES.items():
        column, room = room_of(module)
        for imported in imports_of(path):
            other_column, other = room_of(imported)
            if other != room and other_column >= column:
                wrong.append(f"{module} ({room}) imports {imported} ({other})")
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: set(imports_of(path)) - {module} for module, path in MODULES.items()}
    while free := [module for module, imported in graph.items() if not imported]:
        graph = {module: imported - set(free) for module, imported in graph.items() if module not in free}
    if graph:
        pytest.fail(f"circles among {', '.join(sorted(graph))}")
