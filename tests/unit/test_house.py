"""What holds for the repository as a whole: exported names exist, names and paths in prose are real, files stay small, and tests keep
the rules of tests/README.md."""

from __future__ import annotations

import ast
import importlib
import io
import pkgutil
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from places import PACKAGE, ROOT

import mesh
from mesh.client import AsyncMeshClient, MeshClient
from mesh.telemetry import conventions, metrics

MOST_LINES = 700
"""Of a file in mesh."""

FRESH_INTERPRETERS = {
    "tests/unit/importer/test_refused.py",
    "tests/unit/test_imports.py",
    "tests/unit/commands/test_cli.py",
    "tests/unit/commands/test_entry.py",
    "tests/unit/runtime/test_kernels_in_a_stage.py",
}
"""Unit tests that ask a new Python process what it imports, or what it computes in another environment."""

HTTP_DOCUMENTS = {"mesh/gateway/bodies.py", "mesh/gateway/schema.py", "mesh/gateway/openai_schema.py"}
ONE_THING = {"BatchResult", "ChatMessage", "Timing", "TokenLogprob", "Usage"}
"""Classes whose document in the HTTP APIs has the same name, because the name stands in the OpenAPI description."""

FOLDERS = ("mesh", "tests", "bench", "docs", "nats", "deploy")
PATH = re.compile(rf"(?<![\w./:*-])(?:{'|'.join(FOLDERS)})/[\w./*{{}}<>-]*(?:\.[a-z]+\b|/)(?![\w*])")
BELOW_TESTS = re.compile(r"`((?:unit|component|system)/[\w./*]+)`")
DOTTED = re.compile(r"(?<![\w./$:@-])mesh(?:\.\w+)+(?![\w/*-]|\.\*)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
SUBJECT = re.compile(r"mesh\.v\d")
CLIENT = re.compile(r"\bas mesh\b")  # an example that calls its client `mesh`
PLACEHOLDER = re.compile(r"[*{}<>]|\b[A-Z]{2,}\b|\b[a-z]\b")  # a pattern, a word in capitals, a single letter

MODULES = sorted(found.name for found in pkgutil.walk_packages(mesh.__path__, "mesh.") if not found.name.endswith("__main__"))
PROSE = sorted(path for path in (*ROOT.glob("*.md"), *(found for name in FOLDERS for found in (ROOT / name).rglob("*.md"))))
SOURCES = sorted(path for name in ("mesh", "tests", "bench", "deploy") for path in (ROOT / name).rglob("*.py"))


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def loaded(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "mesh":
            raise
        pytest.skip(f"{name} needs {error.name}, which is not installed")


def said(path: Path) -> Iterator[tuple[int, str]]:
    """Prose with the number of its first line: a page line by line, a program's comments and its strings that stand alone."""
    text = path.read_text()
    if path.suffix == ".md":
        yield from enumerate(text.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


ATTRIBUTES = {attribute.name for attribute in conventions.ATTRIBUTES} | {metric.otel_name for metric in metrics.METRICS}
"""Of spans."""


@cache
def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or something in one. Fields of a class count by its annotations."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        if module != "mesh" and module not in MODULES:
            continue
        thing: object = loaded(module)
        for part in parts[length:]:
            if not hasattr(thing, part):
                return part in getattr(thing, "__annotations__", {})
            thing = getattr(thing, part)
        return True
    return False


@cache
def _tests() -> frozenset[str]:
    """The names of all test modules and test functions."""
    files = [path for path in SOURCES if path.name.startswith("test_")]
    functions = {name for path in files for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}
    return frozenset(functions | {path.stem for path in files})


def of_a_client(name: str) -> bool:
    """Whether `mesh.x` is an attribute of the client that an example calls `mesh`."""
    attribute = name.split(".")[1]
    return hasattr(AsyncMeshClient, attribute) or hasattr(MeshClient, attribute)


@pytest.mark.parametrize("name", MODULES)
def test_every_exported_name_exists(name: str) -> None:
    module = loaded(name)
    exported = getattr(module, "__all__", ())
    assert not [each for each in exported if not hasattr(module, each)]
    assert len(set(exported)) == len(exported)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=label)
def test_a_package_exports_what_it_imports(path: Path) -> None:
    tree = ast.parse(path.read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mesh")]
    names = {alias.asname or alias.name for node in imports for alias in node.names}
    public = {name for name in names if not name.startswith("_")}
    if public:
        module = loaded(".".join(path.parent.relative_to(ROOT).parts))
        offered = {name for name in public if not isinstance(getattr(module, name), ModuleType)}
        assert offered <= set(getattr(module, "__all__", ()))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=label)
def test_a_package_names_its_files(path: Path) -> None:
    says = ast.get_docstring(ast.parse(path.read_text())) or ""
    files = [each for each in path.parent.iterdir() if each.suffix == ".py" or (each / "__init__.py").exists()]
    assert not [each.stem for each in files if not each.stem.startswith("__") and not re.search(rf"\b{each.stem}\b", says)]


@pytest.mark.parametrize("path", [*PROSE, *SOURCES], ids=label)
def test_every_path_in_prose_exists(path: Path) -> None:
    missing = [
        f"{label(path)}:{line}: {found}"
        for line, text in said(path)
        for found in PATH.findall(text)
        if not PLACEHOLDER.search(found) and not (ROOT / found).exists()
    ]
    assert not missing


@pytest.mark.parametrize("path", PROSE, ids=label)
def test_every_path_below_tests_exists(path: Path) -> None:
    """A page that names many tests leaves out the folder `tests`."""
    named = [(line, found) for line, text in said(path) for found in BELOW_TESTS.findall(text)]
    assert not [f"{label(path)}:{line}: {found}" for line, found in named if not list((ROOT / "tests").glob(found))]


@pytest.mark.parametrize("path", PROSE, ids=label)
def test_every_link_to_a_file_leads_somewhere(path: Path) -> None:
    links = [(line, link) for line, text in said(path) for link in LINK.findall(text) if "://" not in link and not link.startswith("#")]
    assert not [f"{label(path)}:{line}: {link}" for line, link in links if not (path.parent / link.partition("#")[0]).exists()]


@pytest.mark.parametrize("path", [*PROSE, *SOURCES], ids=label)
def test_every_dotted_name_in_prose_is_a_module_or_in_one(path: Path) -> None:
    client = CLIENT.search(path.read_text()) is not None
    assert not [
        f"{label(path)}:{line}: {found}"
        for line, text in said(path)
        for found in DOTTED.findall(text)
        if not (
            found in ATTRIBUTES or SUBJECT.match(found) or PLACEHOLDER.search(found) or resolves(found) or (client and of_a_client(found))
        )
    ]


@pytest.mark.parametrize("path", PROSE, ids=label)
def test_every_test_named_in_prose_exists(path: Path) -> None:
    """A name that ends with an underscore is the beginning of several."""
    known = _tests()
    names = {name for _, text in said(path) for name in re.findall(r"\btest_\w+", text)}
    assert not [name for name in names if name not in known and not (name.endswith("_") and any(each.startswith(name) for each in known))]


def test_files_stay_small() -> None:
    lines = {label(path): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert not {path: count for path, count in lines.items() if count > MOST_LINES}


def test_unit_tests_start_no_process() -> None:
    starting = re.compile(r"^\s*(?:import|from) (?:subprocess|multiprocessing)\b|\bNatsServer\b|\bcreate_subprocess", re.MULTILINE)
    found = {label(path) for path in (ROOT / "tests" / "unit").rglob("test_*.py") if starting.search(path.read_text())}
    assert found - {label(Path(__file__))} == FRESH_INTERPRETERS


def test_a_sleep_in_a_test_says_why() -> None:
    sleep = re.compile(r"\b(?:asyncio|time)\.sleep\((?!0\))[^#]*$")
    lines = [
        (path, number, line) for path in (ROOT / "tests").rglob("*.py") for number, line in enumerate(path.read_text().splitlines(), 1)
    ]
    assert not [f"{label(path)}:{number}" for path, number, line in lines if sleep.search(line) and path != Path(__file__)]


def test_a_class_name_means_one_thing() -> None:
    homes: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(label(path))
    twice = {name: set(files) for name, files in homes.items() if len(files) > 1}
    assert {name: files for name, files in twice.items() if not (name in ONE_THING and len(files - HTTP_DOCUMENTS) <= 1)} == {}
    assert twice.keys() == ONE_THING
