"""Write docs/licences.md: the licence of every package that `pip install "stagemesh[import,otlp]"` brings, from the installed metadata.

make licences
"""

from __future__ import annotations

import re
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements.lock"
PAGE = ROOT / "docs" / "licences.md"
_LOCKED = re.compile(r"^([A-Za-z0-9._-]+)==", re.MULTILINE)
_KNOWN = {
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache License v2.0": "Apache-2.0",
    "BSD 3-Clause License": "BSD-3-Clause",
    "3-Clause BSD License": "BSD-3-Clause",
}
_HEAD = """# Licences

The packages that a mesh runs with: those of `requirements.lock` that are for the Python and the system that wrote this page. The licence
is the one that a package's metadata states. `make licences` writes this page. stagemesh itself is under Apache-2.0.

| package | licence |
|---|---|
"""


def main() -> None:
    PAGE.write_text(render())


def render() -> str:
    return _HEAD + "".join(f"| {name} | {licence_of(distribution(name))} |\n" for name in packages())


def packages() -> list[str]:
    """The packages of the lock file that are for this Python and system, by name."""
    wanted = []
    for line in LOCK.read_text().splitlines():
        if _LOCKED.match(line):
            requirement = Requirement(line.rstrip(" \\"))
            if requirement.marker is None or requirement.marker.evaluate():
                wanted.append(requirement.name.lower())
    return sorted(wanted)


def licence_of(package: Distribution) -> str:
    """Its licence expression, else its classifiers, else the first line of its licence field."""
    metadata = package.metadata
    if expressions := metadata.get_all("License-Expression"):
        return str(expressions[0])
    classifiers = [
        each.rpartition(" :: ")[2] for each in metadata.get_all("Classifier") or () if each.startswith("License :: OSI Approved ::")
    ]
    stated = classifiers or [(metadata.get_all("License") or ["not stated"])[0].strip().splitlines()[0][:60]]
    return ", ".join(_KNOWN.get(each, each) for each in stated)


if __name__ == "__main__":
    main()
