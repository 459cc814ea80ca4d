"""The import direction: a room of mesh/ imports only rooms below it, files do not import each other in a circle, and heavy or optional
packages are imported only where they belong. An import inside a function counts like any other."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from places import PACKAGE

# From the bottom up. A room may import itself and the rooms in sets before its own; rooms of one set do not know each other.
LAYERS = [
    {"errors"},
    {"types"},
    {"dtypes"},
    {"settings"},
    {"host"},
    {"http", "protocol"},
    {"telemetry", "pki"},
    {"model", "kernels"},
    {"lowering", "planner", "bus"},
    {"runtime", "client"},
    {"importer", "shard", "coordinator"},
    {"gateway", "local"},
    {"doctor"},
    {"commands"},
    {"cli"},
    {"entry"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}

# Imports that go up or sideways: (file, room it imports) -> the reason. Nothing here now; a new entry needs a reason that lasts.
ALLOWED: dict[tuple[str, str], str] = {}

# What is known of a mesh from outside is known through mesh.client.
FORBIDDEN = {("gateway", "shard"), ("gateway", "coordinator"), ("client", "model")}

ONLY_IN = {"nats": "bus/", "torch": "importer/trace/", "transformers": "importer/trace/", "llama_cpp": "nowhere"}
NO_ASYNCIO = {"model", "importer", "lowering", "runtime", "planner", "protocol", "settings"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


MODULES = {module_name(path): path for path in modules()}


def imported(path: Path) -> set[str]:
    """The full names of the modules that a file imports, at its top or inside a function, type checking only included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            names |= submodules
            if len(submodules) < len(node.names):
                names.add(node.module)
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_downward(path: Path) -> None:
    here = room(path)
    if here == "__init__":
        return
    assert here in LEVEL, f"mesh/{here} has no place in the layout: add it to LAYERS"
    for name in imported(path):
        top = name.split(".")[0]
        if top == "mesh" and "." in name:
            there = name.split(".")[1]
            if there == here or (str(path.relative_to(PACKAGE)), there) in ALLOWED:
                continue
            assert (here, there) not in FORBIDDEN, f"{here} must not know {there}"
            assert LEVEL[there] < LEVEL[here], f"{here} imports {name}, which is not below it"
        elif top == "asyncio":
            assert here not in NO_ASYNCIO, f"{here} is synchronous"
        elif top in ONLY_IN:
            assert str(path.relative_to(PACKAGE)).startswith(ONLY_IN[top]), f"{top} is imported in {here}"


def test_no_files_import_each_other_in_a_circle() -> None:
    """A package's __init__ may import its own files; that a file imports its package is then no circle of files."""
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    graph = {
        name: {other for other in imported(path) if other in MODULES and other not in packages}
        for name, path in MODULES.items()
        if name not in packages
    }
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_every_exception_to_the_direction_is_still_needed() -> None:
    for (file, there), reason in ALLOWED.items():
        assert reason
        assert any(name.startswith(f"mesh.{there}") for name in imported(PACKAGE / file)), f"{file} no longer imports {there}"


def test_the_command_line_starts_without_heavy_packages() -> None:
    code = "import sys, mesh.cli; print([name for name in ('jax', 'onnx', 'onnxruntime', 'tokenizers') if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
