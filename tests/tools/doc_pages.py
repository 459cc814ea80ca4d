"""The commands of the pages: what stands in their blocks of shell, as the blocks have it.

A block may be preceded by a comment that the reader does not see:

    <!-- on A -->                            where it runs, on a page of several machines
    <!-- on A, goes on: READY -->            it does not end; it works once it says READY
    <!-- ..., in place of NAME -->           the one that runs as NAME (the second word of its command) is ended before
    <!-- not run: REASON -->                 only its words are checked
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from places import ROOT

__all__ = ["PAGES", "Block", "blocks_of", "commands_of", "label", "mesh_lines", "mesh_spans"]

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "nats" / "README.md")
_BLOCK = re.compile(r"(?:<!-- (?P<note>[^\n]*) -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)`(?:\.venv/bin/)?mesh ([^`\n]+)`(?!`)")
_HERE = re.compile(r"<<'?(\w+)'?")
_ENVIRONMENT = re.compile(r"^\w+=\S*$")
_COMMANDS = re.compile(
    r"^(# \w.*\n)?(\w+=\S+ )*(make|\.venv/bin/\w+|mesh|nats|nats-server|curl|export|free|jq|nc|journalctl)( |$)", re.MULTILINE
)


def label(page: Path) -> str:
    """Its path in the repository."""
    return str(page.relative_to(ROOT))


@dataclass(frozen=True)
class Block:
    """One block of shell. `line`: where it begins on its page."""

    page: Path
    line: int
    text: str
    where: str = ""
    ready: str = ""
    replaces: str = ""
    not_run: str = ""

    @property
    def place(self) -> str:
        return f"{label(self.page)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """The blocks of shell of a page. One without a language is shell if its lines begin with commands."""
    text, found = page.read_text(), []
    for match in _BLOCK.finditer(text):
        kind, body, note = match["kind"], match["text"], match["note"] or ""
        if kind == "sh" or (kind == "" and _COMMANDS.match(body)):
            line = text.count("\n", 0, match.start("text"))
            reason = note.partition("not run: ")[2]
            on, _, ready = note.partition(", goes on: ")
            ready, _, replaces = ready.partition(", in place of ")
            where = on.removeprefix("on ") if on.startswith("on ") else ""
            found.append(Block(page, line + 1, body, where, ready, replaces, reason))
    return found


def commands_of(text: str) -> list[str]:
    """The commands of a block, one after the other: lines that go on, and texts that stand behind them, belong to them."""
    commands: list[str] = []
    waiting, until = "", ""
    for line in text.splitlines():
        waiting = f"{waiting}\n{line}" if waiting else line
        if until:
            until = "" if line == until else until
        elif (here := _HERE.search(line)) is not None:
            until = here[1]
        if until or line.endswith("\\"):
            continue
        if waiting.strip() and not waiting.lstrip().startswith("#"):
            commands.append(waiting)
        waiting = ""
    return commands


def mesh_lines(text: str) -> Iterator[list[str]]:
    """The words of every `mesh` command of a block, without `mesh` itself."""
    for command in commands_of(text):
        if "<<" in command:
            continue
        for part in re.split(r"&&|\||;|\$\(", command.replace("\\\n", " ")):
            try:
                words = shlex.split(part.rstrip(')"'), comments=True)
            except ValueError:
                continue
            while words and _ENVIRONMENT.match(words[0]):
                words = words[1:]
            if words and words[0].rpartition("/")[2] == "mesh":
                redirected = {place + 1 for place, word in enumerate(words) if word in (">", "<")}
                yield [word for place, word in enumerate(words[1:], 1) if word not in ("&", ">", "<") and place not in redirected]


def mesh_spans(text: str) -> Iterator[list[str]]:
    """The words of every `mesh ...` in the prose of a page."""
    for match in _SPAN.finditer(_BLOCK.sub("", text)):
        try:
            yield shlex.split(match[1])
        except ValueError:
            yield match[1].split()
