"""The rule of the house: a module imports only from rooms to its left. Late and TYPE_CHECKING imports count too."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.small_run import ROOT

# Column of each room. Rooms of one column do not know each other; a module that is in no room is a script.
ROOMS = {
    "data": 0,
    "model.vqgan": 1,
    "model.decoder": 1,
    "model.weights": 2,
    "model.training": 3,
    "model.generation": 3,
    "model.run": 4,
    "model.plan": 5,
    "model.pages": 5,
}
SCRIPTS = 6
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in ("data", "model", "pre_tokenize", "exps", ".")
    for path in (ROOT / folder).glob("*.py" if folder == "." else "**/*.py")
}


def room_of(module: str) -> tuple[int, str]:
    return next(
        ((column, room) for room, column in ROOMS.items() if f"{module}.".startswith(f"{room}.")), (SCRIPTS, "")
    )


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
                wrong.append(f"{module} imports {imported}")
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: set(imports_of(path)) - {module} for module, path in MODULES.items()}
    while free := [module for module, imported in graph.items() if not imported]:
        graph = {module: imported - set(free) for module, imported in graph.items() if module not in free}
    if graph:
        pytest.fail(f"circles among {', '.join(sorted(graph))}")
