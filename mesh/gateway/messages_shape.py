"""Makes Anthropic's documents from a generation: a message, or the events of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from mesh.client import Chunk, Completion
from mesh.client.shapes import parts_of, text_of
from mesh.protocol.tools import CallPart, ToolCall, ToolParser

__all__ = ["MessageShape"]


class MessageShape:
    """See mesh.client.shapes.Shape. A message has one choice. In a stream the usage of the prompt comes with the last but one event: it is
    not known before."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._id = ""
        self._begun = False
        self._parser: ToolParser | None = None
        self._block: str | None = None  # the type of the block that is open
        self._blocks = 0  # that were opened

    def name(self, request: str) -> None:
        self._id = f"msg_{request}"

    def read_calls(self, index: int, parser: ToolParser | None) -> None:
        self._parser = self._parser or parser

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        (completion,) = completions
        text = text_of(completion)
        blocks = [{"type": "text", "text": text}] if text else []
        blocks += [block for call in completion.tool_calls if (block := _tool_use(call)) is not None]
        return self._message(blocks) | _end(completion, called=bool(completion.tool_calls)) | {"usage": _usage(completion)}

    def part(self, index: int, chunk: Chunk, completion: Completion | None) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        if not self._begun:
            self._begun = True
            empty = {"stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 0, "output_tokens": 0}}
            events.append({"type": "message_start", "message": self._message([]) | empty})
        for part in parts_of(self._parser, chunk.text, end=completion is not None):
            events += self._text(part) if isinstance(part, str) else self._call(part)
        if completion is not None:
            called = self._parser is not None and self._parser.calls > 0
            events += self._close()
            events.append({"type": "message_delta", "delta": _end(completion, called=called), "usage": _usage(completion)})
            events.append({"type": "message_stop"})
        return events

    def end(self, completions: Sequence[Completion]) -> list[dict[str, Any]]:
        return []

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "type": "message", "role": "assistant", "model": self._model, "content": content}

    def _text(self, text: str) -> list[dict[str, Any]]:
        opened = [] if self._block == "text" else [*self._close(), self._open("text", {"type": "text", "text": ""})]
        return [*opened, self._delta({"type": "text_delta", "text": text})]

    def _call(self, part: CallPart) -> list[dict[str, Any]]:
        opened = []
        if part.id is not None:
            opened = [*self._close(), self._open("tool_use", {"type": "tool_use", "id": part.id, "name": part.name, "input": {}})]
        return [*opened, self._delta({"type": "input_json_delta", "partial_json": part.arguments})]

    def _open(self, kind: str, block: dict[str, Any]) -> dict[str, Any]:
        self._block = kind
        self._blocks += 1
        return {"type": "content_block_start", "index": self._blocks - 1, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._blocks - 1, "delta": delta}

    def _close(self) -> list[dict[str, Any]]:
        if self._block is None:
            return []
        self._block = None
        return [{"type": "content_block_stop", "index": self._blocks - 1}]


def _tool_use(call: ToolCall) -> dict[str, Any] | None:
    """None: max_tokens ended the call before its arguments were complete."""
    try:
        given = orjson.loads(call.function.arguments)
    except orjson.JSONDecodeError:
        return None
    return {"type": "tool_use", "id": call.id, "name": call.function.name, "input": given}


def _end(completion: Completion, *, called: bool) -> dict[str, Any]:
    if completion.finish_reason == "length":
        reason = "max_tokens"
    elif called:
        reason = "tool_use"
    else:
        reason = "end_turn" if completion.stop_text is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": completion.stop_text if reason == "stop_sequence" else None}


def _usage(completion: Completion) -> dict[str, int]:
    """As Anthropic counts: what was read from a cache is not part of the input."""
    usage = completion.usage
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
