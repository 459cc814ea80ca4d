"""What an installed package brings besides its Python files."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import mesh

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_has_one_home() -> None:
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "mesh.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", mesh.__version__)


def test_every_file_that_is_not_python_is_shipped() -> None:
    """The mark of typed packages and the dashboard's pages among them."""
    data = PYPROJECT["tool"]["setuptools"]["package-data"]
    shipped = {
        file for package, patterns in data.items() for pattern in patterns for file in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    there = {file for file in (ROOT / "mesh").rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc", ".so")}
    assert ROOT / "mesh/py.typed" in shipped and shipped == there
