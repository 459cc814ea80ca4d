"""Tools for models whose chat template knows none: described in words, in the form that Hermes models write (docs/http.md).

tools              a system message at the beginning describes them, with the form of a call
calls              become the text of the assistant's message, as the model should write them
results            become messages of the user, each between <tool_response> and </tool_response>
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["in_words"]

_WORDS = """\
You may call functions to answer. Each line is one, with the JSON schema of its arguments:
<tools>
{tools}
</tools>
To call a function, write a line of JSON with its name and its arguments between marks, and nothing after it:
<tool_call>
{{"name": "the function's name", "arguments": {{}}}}
</tool_call>
The result comes in the next message, between <tool_response> and </tool_response>."""


def in_words(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """`messages`, with no part of them that a template would have to know about tools."""
    plain = [_plain(message) for message in messages]
    if not tools:
        return plain
    words = _WORDS.format(tools="\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools))
    if plain and plain[0]["role"] == "system":
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{words}"}, *plain[1:]]
    return [{"role": "system", "content": words}, *plain]


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    role, content = message["role"], message["content"]
    if role == "tool" and "tool_call_id" in message:
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    calls = [f"<tool_call>\n{_call(call)}\n</tool_call>" for call in message.get("tool_calls") or ()]
    return {"role": role, "content": "\n".join([*filter(None, [content]), *calls]) if calls else content}


def _call(call: Mapping[str, Any]) -> str:
    function = call["function"]
    return json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)
