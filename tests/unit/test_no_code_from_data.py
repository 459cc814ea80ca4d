"""Nothing that comes from elsewhere is run: the package has no pickle, no eval, and no loader that makes objects of any class."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from places import PACKAGE

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle", "torch"}
CALLS = {
    "eval", "exec", "compile", "__import__", "execfile", "torch.load", "np.load", "numpy.load", "yaml.load", "yaml.load_all",
    "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "pd.read_pickle",
}  # fmt: skip
ALLOWED: dict[tuple[str, str], str] = {
    ("settings/files.py", "yaml.load"): "with a loader of ours, which is a SafeLoader",
    ("importer/trace/library.py", "torch"): "for its tensors and its tracer; files are read by safetensors",
    ("runtime/executables.py", "pickle"): "machine code that this user's processes compiled, in files that only this user can write",
}


def found(tree: ast.AST) -> set[str]:
    """What a module imports or calls of the forbidden, and `allow_pickle`, `shell=True`."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {(node.module or "").split(".")[0]} & MODULES
        elif isinstance(node, ast.Call):
            names |= {ast.unparse(node.func)} & CALLS
            for keyword in node.keywords:
                true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                if keyword.arg in ("allow_pickle", "shell", "trust_remote_code") and true:
                    names.add(keyword.arg)
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_of_the_package_runs_no_data(path: Path) -> None:
    name = path.relative_to(PACKAGE).as_posix()
    assert found(ast.parse(path.read_text())) - {what for file, what in ALLOWED if file == name} == set()


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from pickle import loads", "eval('1')", "exec(x)", "np.load(f, allow_pickle=True)", "yaml.load(x)", "torch.load(x)",
     "subprocess.run(x, shell=True)"],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert found(ast.parse(source))
