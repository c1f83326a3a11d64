"""The floors of docs/architecture.md: a room imports only from lower ones, inside functions too."""

import ast
from pathlib import Path

import pytest

from runs import REPOSITORY

FLOORS = [
    {"errors", "metrics"},
    {"files"},
    {"labels", "lobes", "fetch"},
    {"dataio", "checkpoints"},
    {"inference", "plots", "prepare"},
    {"aggregation", "demo", "hear"},
    {"experiment"},
    {"cli"},
]
# what psla_sb/__init__.py has, which imports nothing
OF_ALL = {"__version__", "add_version"}
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
PACKAGE = REPOSITORY / "psla_sb"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(name):
    """`psla_sb.lobes.chain` -> `lobes`; None for what is not of the toolkit."""
    package, _, rest = name.partition(".")
    return rest.partition(".")[0] if package == "psla_sb" and rest else None


def imported(path):
    """The rooms that a file imports from, wherever in it; relative imports are not used."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (room_of(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (
                [room_of(f"psla_sb.{alias.name}") for alias in node.names if alias.name not in OF_ALL]
                if node.module == "psla_sb"
                else [room_of(node.module)]
            )


def test_every_room_has_a_floor():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert rooms == set(FLOOR)
    assert len(rooms) + 1 <= 17


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_from_lower_floors(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for other in set(imported(path)) - {None, room}:
        assert FLOOR[other] < FLOOR[room], f"{room} (floor {FLOOR[room]}) imports {other} (floor {FLOOR[other]})"


def test_an_import_from_a_higher_floor_is_found(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("def f():\n    if True:\n        from psla_sb.experiment.train import main\n    import psla_sb.cli.tag\n")
    assert set(imported(file)) == {"experiment", "cli"}
    file.write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from psla_sb import plots\n")
    assert set(imported(file)) == {None, "plots"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_longer_than_400_lines(path):
    assert len(Path(path).read_text(encoding="utf-8").splitlines()) <= 400
