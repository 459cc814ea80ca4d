"""The import direction of DESIGN's layout: every module imports downward only, and heavy or optional packages stay where they belong."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "mesh"

# From the bottom up; a room may import those before it and itself.
LAYERS = [
    {"errors", "types", "units", "wire", "process", "paths", "scratch"},
    {"configfile"},
    {"config", "subjects", "messages", "frame", "frames", "telemetry", "security"},
    {"lowering", "model", "memory"},
    {"runtime"},
    {"planner"},
    {"bus", "server", "listener", "supervisor"},
    {"shard", "coordinator"},
    {"client"},
    {"gateway"},
    {"local"},
    {"commands"},
    {"cli"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}

# What may reach sideways or up, and why.
ALLOWED = {
    ("model", "runtime"): "an import verifies its blocks in the runtime that will run them",
    ("memory", "model"): "memory is predicted from the manifest",
}
FORBIDDEN = {("client", "shard"), ("client", "coordinator"), ("gateway", "shard"), ("gateway", "coordinator")}
ONLY_IN = {"nats": {"bus"}, "torch": set(), "transformers": set(), "llama_cpp": set(), "asyncio": None}
NO_ASYNCIO = {"model", "lowering", "runtime", "planner", "memory", "config", "frames"}


def modules():
    return sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "mesh":
                yield from (f"mesh.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_downward(path):
    here = room(path)
    if here == "__init__":
        return
    assert here in LEVEL, f"mesh/{here} has no place in the layout: add it to LAYERS"
    for name in imported(path):
        top = name.split(".")[0]
        if top == "mesh" and "." in name:
            there = name.split(".")[1]
            if there == here or (here, there) in ALLOWED:
                continue
            assert (here, there) not in FORBIDDEN, f"{here} must not know {there}"
            assert LEVEL[there] <= LEVEL[here], f"{here} imports {name}, which is above it"
        if top == "asyncio":
            assert here not in NO_ASYNCIO, f"{here} is synchronous"
        elif top in ONLY_IN:
            assert here in ONLY_IN[top], f"{top} is imported in {here}"


def test_the_command_line_starts_without_jax():
    import subprocess
    import sys

    code = "import sys, mesh.cli; print([name for name in ('jax', 'onnx', 'onnxruntime', 'tokenizers') if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
