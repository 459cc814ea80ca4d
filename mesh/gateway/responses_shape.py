"""Makes the documents of OpenAI's responses API from a generation: a response, or the events of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mesh.client import Chunk, Completion
from mesh.client.openai_shapes import logprob_entries
from mesh.client.shapes import parts_of, text_of
from mesh.errors import MeshError
from mesh.gateway.errors import openai_document
from mesh.protocol.tools import CallPart, ToolParser

__all__ = ["ResponseShape"]


class ResponseShape:
    """See mesh.client.shapes.Shape. `echoed`: the keys of a response that repeat its request. `document` is the response, once it is
    complete. Log-probabilities are those of the message's text; a token that completes no character waits for the next piece of text."""

    def __init__(self, model: str, created: int, echoed: dict[str, Any]) -> None:
        self.model = model
        self.document: dict[str, Any] = {}
        self._created = created
        self._echoed = echoed
        self._request = ""
        self._parser: ToolParser | None = None
        self._items: list[dict[str, Any]] = []
        self._open = False  # the last item goes on
        self._logprobs: list[dict[str, Any]] = []  # of tokens whose text is not out yet
        self._sequence = 0  # of the next event

    @property
    def id(self) -> str:
        return f"resp_{self._request}"

    def name(self, request: str) -> None:
        self._request = request

    def not_kept(self) -> None:
        """The response could not be kept after all."""
        self._echoed = {**self._echoed, "store": False}
        if self.document:
            self.document["store"] = False

    def read_calls(self, index: int, parser: ToolParser | None) -> None:
        self._parser = self._parser or parser

    def turn(self) -> dict[str, Any]:
        """The answer as a message of mesh.protocol.generation.ChatMessage."""
        texts = [part["text"] for item in self._items for part in item.get("content", ())]
        calls = [
            {"id": item["call_id"], "type": "function", "function": {"name": item["name"], "arguments": item["arguments"]}}
            for item in self._items
            if item["type"] == "function_call" and item["status"] == "completed"
        ]
        return {"role": "assistant", "content": "".join(texts), **({"tool_calls": calls} if calls else {})}

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        (completion,) = completions
        text = text_of(completion)
        self._logprobs = logprob_entries(completion.logprobs or ())
        if text:
            self._text(text)
        for index, call in enumerate(completion.tool_calls):
            self._call(CallPart(index, call.function.arguments, call.id, call.function.name))
        self._finish(completion)
        return self.document

    def part(self, index: int, chunk: Chunk, completion: Completion | None) -> list[dict[str, Any]]:
        events = []
        if self._sequence == 0:
            begun = self._response("in_progress")
            events += [self._event("response.created", response=begun), self._event("response.in_progress", response=begun)]
        if chunk.token is not None and chunk.token.logprob is not None:
            self._logprobs += logprob_entries((chunk.token,))
        for part in parts_of(self._parser, chunk.text, end=completion is not None):
            events += self._text(part) if isinstance(part, str) else self._call(part)
        if completion is not None:
            events += self._finish(completion)
        return events

    def end(self, completions: Sequence[Completion]) -> list[dict[str, Any]]:
        """The last event, after the response was kept."""
        return [self._event(f"response.{self.document['status']}", response=self.document)]

    def failed(self, error: MeshError) -> dict[str, Any]:
        said = openai_document(error)["error"]
        return self._event("error", code=said["code"], message=said["message"], param=said["param"])

    def _finish(self, completion: Completion) -> list[dict[str, Any]]:
        cut = completion.finish_reason == "length"
        events = self._close("incomplete" if cut else "completed")
        usage = completion.usage
        self.document = self._response(
            "incomplete" if cut else "completed",
            {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.total_tokens,
            },
        )
        return events

    def _response(self, status: str, usage: dict[str, Any] | None = None) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self.model,
            "output": list(self._items),
            "usage": usage,
            **self._echoed,
        }

    # -- items ---------------------------------------------------------------------------------------------------------

    def _text(self, text: str) -> list[dict[str, Any]]:
        opened = []
        if not self._open or self._items[-1]["type"] != "message":
            opened = [*self._close("completed"), self._begin("message", "msg", role="assistant", content=[])]
            self._items[-1]["content"].append(_part(""))
            opened.append(self._of_item("response.content_part.added", content_index=0, part=_part("")))
        part, logprobs, self._logprobs = self._items[-1]["content"][0], self._logprobs, []
        part["text"] += text
        part["logprobs"] += logprobs
        return [*opened, self._of_item("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)]

    def _call(self, part: CallPart) -> list[dict[str, Any]]:
        opened = []
        if part.id is not None:
            opened = [*self._close("completed"), self._begin("function_call", "fc", call_id=part.id, name=part.name, arguments="")]
        self._items[-1]["arguments"] += part.arguments
        return [*opened, self._of_item("response.function_call_arguments.delta", delta=part.arguments)]

    def _begin(self, kind: str, prefix: str, **keys: Any) -> dict[str, Any]:
        item = {"type": kind, "id": f"{prefix}_{self._request}_{len(self._items)}", "status": "in_progress", **keys}
        self._items.append(item)
        self._open = True
        return self._event("response.output_item.added", output_index=len(self._items) - 1, item=dict(item))

    def _close(self, status: str) -> list[dict[str, Any]]:
        if not self._open:
            return []
        self._open = False
        item = self._items[-1]
        item["status"] = status
        if item["type"] == "message":
            (part,) = item["content"]
            part["logprobs"] += self._logprobs
            self._logprobs = []
            events = [
                self._of_item("response.output_text.done", content_index=0, text=part["text"], logprobs=part["logprobs"]),
                self._of_item("response.content_part.done", content_index=0, part=part),
            ]
        else:
            events = [self._of_item("response.function_call_arguments.done", arguments=item["arguments"], name=item["name"])]
        return [*events, self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)]

    def _of_item(self, kind: str, **keys: Any) -> dict[str, Any]:
        return self._event(kind, item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **keys)

    def _event(self, kind: str, **keys: Any) -> dict[str, Any]:
        self._sequence += 1
        return {"type": kind, "sequence_number": self._sequence - 1, **keys}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
