"""What makes an API's documents from generations: openai_shapes.py, and those of mesh/gateway."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from mesh.client.results import Chunk, Completion
from mesh.protocol.tools import Part, ToolParser

__all__ = ["Shape", "parts_of", "text_of"]


class Shape(Protocol):
    """The documents of one request. `name`: its first generation has this name in the mesh. `read_calls`: what reads calls in the text of
    the choice `index`. `whole`: one document for all choices. `part`: the documents of a stream for one chunk of a choice; `completion` is
    set with the last chunk. `end`: those at the end of the stream."""

    def name(self, request: str) -> None: ...
    def read_calls(self, index: int, parser: ToolParser | None) -> None: ...
    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]: ...
    def part(self, index: int, chunk: Chunk, completion: Completion | None) -> list[dict[str, Any]]: ...
    def end(self, completions: Sequence[Completion]) -> list[dict[str, Any]]: ...


def parts_of(parser: ToolParser | None, text: str, *, end: bool) -> list[Part]:
    """The texts and calls in the next piece of an answer; `end`: it is the last one. `parser` None: there are no calls."""
    if parser is None:
        return [text] if text else []
    return parser.read(text, end=end)


def text_of(completion: Completion) -> str | None:
    """The text of an answer beside what it calls."""
    return completion.text if completion.tool_format is None else completion.content
