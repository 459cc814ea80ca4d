"""Outside core/, only the methods of Core are used, and never its parts."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3] / "mesh"


def is_core(node: ast.expr) -> bool:
    """`core`, `self.core`, `self._core`, `coordinator.core`."""
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return name in ("core", "_core")


def reaching_in(tree: ast.AST) -> list[str]:
    """`core.X` that is not called, and `core._x`."""
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and is_core(node.value) and (id(node) not in called or node.attr.startswith("_"))
    ]


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(ROOT.rglob("*.py")) if path.parent != ROOT / "coordinator" / "core"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_nothing_outside_the_core_reaches_into_its_parts(path: Path) -> None:
    assert reaching_in(ast.parse(path.read_text())) == []


@pytest.mark.parametrize("code", ["self.core.replicas.longest()", "len(core.admission)", "self._core._state.by_id", "self.core._go()"])
def test_reaching_in_is_found(code: str) -> None:
    assert reaching_in(ast.parse(code))


def test_calling_a_method_is_not_reaching_in() -> None:
    assert reaching_in(ast.parse("self.core.load(now).context; from mesh.coordinator.core.machine import Core")) == []
