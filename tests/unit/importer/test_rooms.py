"""The import direction inside the importer, as mesh/importer/__init__.py states it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mesh.importer

ROOT = Path(mesh.importer.__file__).parent

# From the top down, in the order of the docstring.
ROOMS = ["run", "survey", "verify", "sources", "families", "trace", "write", "analysis", "passes", "graph", "options", "precision"]


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_the_docstring_names_the_rooms_in_this_order() -> None:
    lines = [line.split()[0] for line in (mesh.importer.__doc__ or "").splitlines() if line.startswith("    ")]
    assert [line.removesuffix("/").removesuffix(".py") for line in lines] == ROOMS
    assert {room(path) for path in ROOT.rglob("*.py")} - {"__init__"} == set(ROOMS)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*/*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_rooms_below_it(path: Path) -> None:
    here = room(path)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mesh.importer."):
            there = str(node.module).split(".")[2]
            assert there == here or ROOMS.index(there) > ROOMS.index(here), f"{here} imports {node.module}, which is not below it"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mesh.runtime"):
            assert here == "verify", f"{here} imports {node.module}: only verify may"
