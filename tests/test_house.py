"""The rules of the house: which way imports go, and how long scripts, rooms and functions may be."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from conftest import ROOT

SCRIPTS = {path.stem: path for path in ROOT.glob("*.py")}
ROOMS = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.glob("quick/**/*.py")}
FLOORS = [{"errors", "choices"}, {"values"}, {"cli"}, {"asking"}, {"processes"}, {"archives"}, {"checkpoints"}]
FLOORS += [{"downloads"}, {"answers", "data", "nets"}, {"sorting"}, {"views"}, {"run"}]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imports_of(path: Path) -> set[str]:
    """The scripts and rooms that a file imports, also those that it imports in functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports from a place relative to itself"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & {*SCRIPTS, *ROOMS}


def test_there_are_five_scripts():
    assert set(SCRIPTS) == {"datasets", "device", "model", "predict", "train"}


def test_imports_go_one_way():
    assert {name.split(".")[1] for name in ROOMS} == {"__init__", *FLOOR_OF}
    for name, path in ROOMS.items():
        imports = imports_of(path)
        assert not imports & set(SCRIPTS), f"{name} imports a script"
        room = name.split(".")[1]
        for other in imports:
            other_room = other.split(".")[1]
            assert room == other_room or FLOOR_OF[other_room] < FLOOR_OF[room], f"{name} imports {other}"


def test_no_imports_go_in_a_circle():
    files = SCRIPTS | ROOMS
    list(TopologicalSorter({name: imports_of(path) for name, path in files.items()}).static_order())


def test_scripts_rooms_and_functions_are_short():
    lines = {name: path.read_text(encoding="utf-8").count("\n") for name, path in (SCRIPTS | ROOMS).items()}
    assert {name: count for name, count in lines.items() if count > (320 if name in SCRIPTS else 300)} == {}
    assert sum(lines[name] for name in SCRIPTS) <= 1300
    for name, path in (SCRIPTS | ROOMS).items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 100, f"{node.name} in {name}"
