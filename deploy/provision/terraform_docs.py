"""Writes the tables of variables and outputs into terraform/README.md. A test compares them."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parents[2] / "terraform"
MARK = "<!-- below: written by deploy/provision/terraform_docs.py -->\n"
FOLDERS = (
    "environments/local",
    "environments/aws",
    "environments/aws-state",
    *sorted(f"modules/{path.name}" for path in (HERE / "modules").iterdir()),
)


def blocks(folder: Path, kind: str) -> list[tuple[str, str]]:
    """(name, body) of each block of a kind, in the order of the files."""
    found = []
    for file in sorted(folder.glob("*.tf")):
        found += re.findall(rf'^{kind} "(\w+)" \{{\n(.*?)^\}}', file.read_text(), re.M | re.S)
    return found


def value(body: str, key: str) -> str | None:
    """A key's text on one line; a longer one is cut to what it begins with."""
    line = re.search(rf"^  {key} += (.*)$", body, re.M)
    if line is None:
        return None
    text = line.group(1).strip()
    opened = {"object({": "object", "list(object({": "list of objects", "map(object({": "map of objects", "[": "a list, see variables.tf"}
    return opened.get(text, text)


def table(folder: str) -> str:
    lines = [f"\n## {folder}\n"]
    variables = blocks(HERE / folder, "variable")
    if variables:
        lines += ["| variable | type | default | what |", "|---|---|---|---|"]
    for name, body in variables:
        default = value(body, "default")
        shown = "" if default is None else f"`{default}`"
        lines.append(
            f"| `{name}` | {(value(body, 'type') or '').replace('|', ' ')} | {shown} | {(value(body, 'description') or '')[1:-1]} |"
        )
    outputs = blocks(HERE / folder, "output")
    if outputs:
        lines += ["", "| output | what |", "|---|---|"]
    lines += [f"| `{name}` | {(value(body, 'description') or '')[1:-1]} |" for name, body in outputs]
    return "\n".join(lines) + "\n"


def page(before: str) -> str:
    return before.partition(MARK)[0] + MARK + "".join(table(folder) for folder in FOLDERS)


if __name__ == "__main__":
    readme = HERE / "README.md"
    readme.write_text(page(readme.read_text()))
