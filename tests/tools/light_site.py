"""A folder with the packages that the base of this project asks for, and no others: what a client has that was installed without extras."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from places import PACKAGE

__all__ = ["base_packages", "make_site"]

_OWN = re.compile(r"^(?!\.\.)[^/]+")


def base_packages() -> set[str]:
    """The names of the base dependencies, and of all that they ask for."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    found: set[str] = set()
    waiting = [Requirement(line) for line in project["dependencies"]]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})) or name in found:
            continue
        try:
            wanted = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        found.add(name)
        waiting += [Requirement(line) for line in wanted]
    return found


def make_site(folder: Path) -> Path:
    """Link those packages, and this one, into `folder`."""
    folder.mkdir()
    for name in base_packages():
        package = distribution(name)
        for top in {found[0] for file in package.files or [] if (found := _OWN.match(str(file)))}:
            link = folder / top
            if top != "__pycache__" and not link.exists():
                link.symlink_to(Path(str(package.locate_file(top))))
    (folder / "mesh").symlink_to(PACKAGE)
    return folder


def command(site: Path, *arguments: str) -> list[str]:
    """A Python that sees the standard library and `site` alone."""
    program = (
        "import sys; sys.path.append(sys.argv.pop(1)); import runpy; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
    )
    return [sys.executable, "-I", "-S", "-c", program, str(site), *arguments]
