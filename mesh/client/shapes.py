"""What makes an API's documents from generations: openai_shapes.py, and those of mesh/gateway."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from mesh.client.results import Chunk, Completion
from mesh.protocol.tools import ToolParser

__all__ = ["Shape"]


class Shape(Protocol):
    """The documents of one request. `name`: its first generation has this name in the mesh. `read_calls`: what reads calls in the text of
    the choice `index`. `whole`: one document for all choices. `part`: the documents of a stream for one chunk of a choice; `completion` is
    set with the last chunk. `end`: those at the end of the stream."""

    def name(self, request: str) -> None: ...
    def read_calls(self, index: int, parser: ToolParser | None) -> None: ...
    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]: ...
    def part(self, index: int, chunk: Chunk, completion: Completion | None) -> list[dict[str, Any]]: ...
    def end(self, completions: Sequence[Completion]) -> list[dict[str, Any]]: ...
