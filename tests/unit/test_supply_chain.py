"""The lock files: every package at one version with hashes, from no particular place; and the page of licences names each of them."""

from __future__ import annotations

import re
import tomllib

import licences
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from places import PACKAGE

ROOT = PACKAGE.parent
LOCKS = {"requirements.lock": ("server", "import", "otlp"), "requirements-dev.lock": ("server", "import", "otlp", "dev")}


def entries(name: str) -> dict[str, list[tuple[Requirement, int]]]:
    """By package: its requirements, one for each environment that needs another version, and how many hashes each has."""
    found: dict[str, list[tuple[Requirement, int]]] = {}
    for entry in re.split(r"^(?=[A-Za-z0-9])", (ROOT / name).read_text(), flags=re.MULTILINE)[1:]:
        requirement = Requirement(entry.splitlines()[0].rstrip(" \\"))
        found.setdefault(canonicalize_name(requirement.name), []).append(
            (requirement, len(re.findall(r"--hash=sha256:[0-9a-f]{64}", entry)))
        )
    return found


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_is_locked_with_hashes_and_names_no_place(name: str) -> None:
    assert "://" not in (ROOT / name).read_text()
    for requirements in entries(name).values():
        for requirement, hashes in requirements:
            assert hashes and [each.operator for each in requirement.specifier] == ["=="] and requirement.url is None


@pytest.mark.parametrize("name", LOCKS)
def test_what_the_project_needs_is_locked_at_a_version_that_it_allows(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(line for extra in LOCKS[name] for line in project["optional-dependencies"][extra])]
    locked = entries(name)
    for requirement in map(Requirement, wanted):
        if requirement.name == "stagemesh":
            continue
        for found, _ in locked[canonicalize_name(requirement.name)]:
            (version,) = found.specifier
            assert requirement.specifier.contains(version.version), f"{name}: {found} where {requirement} is asked for: run `make lock`"


def test_both_locks_agree() -> None:
    dev = entries("requirements-dev.lock")
    for name, requirements in entries("requirements.lock").items():
        assert {str(found.specifier) for found, _ in requirements} <= {str(found.specifier) for found, _ in dev[name]}, (
            f"{name}: run `make lock`"
        )


def test_the_page_of_licences_names_every_package() -> None:
    rows = re.findall(r"^\| ([a-z0-9._-]+) \| (.+) \|$", licences.PAGE.read_text(), flags=re.MULTILINE)
    page = {canonicalize_name(name) for name, licence in rows if licence not in ("---", "licence")}
    assert {canonicalize_name(name) for name in licences.packages()} == page, "run `make licences`"
    assert "not stated" not in licences.PAGE.read_text()
