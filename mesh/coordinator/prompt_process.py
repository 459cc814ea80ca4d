"""The process that applies chat templates and tokenizes prompts for a coordinator.

A chat template is a program, and a tokenizer.json can ask for any amount of work: both come with the model. In a process of its own
such work has limits of time and memory, and the coordinator's event loop, which carries everyone's tokens, never waits for it.

    mesh.coordinator.prompt_pool starts it as   python -m mesh.coordinator.prompt_process MODEL_DIR DIGEST MEMORY_BYTES NICE

DIGEST is that of the manifest that must be in MODEL_DIR, or empty. On stdin and stdout, each message is a little-endian uint32 length
and that many bytes. The first answer says whether the tokenizer was read. Then each request (JSON: prompt, messages, raw, options) has one
answer: one byte, TOKENS followed by int32 ids, or ERROR followed by the JSON of a protocol ErrorReply.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, TypedDict

import numpy as np
import orjson

from mesh.errors import BadRequest, CorruptModel, MeshError
from mesh.host.process import die_with_parent
from mesh.model.chat_prompt import ChatPrompts
from mesh.model.manifest import Manifest
from mesh.model.tokenizer import Tokenizer
from mesh.protocol.failures import ErrorReply
from mesh.protocol.message import MAX_TOKENS

__all__ = ["ERROR", "LENGTH", "MOST_ANSWER_BYTES", "TEMPLATE_AS_USUAL", "TOKENS", "ChatOptions", "tokenize"]


class ChatOptions(TypedDict):
    """How messages become a prompt (mesh.model.chat_prompt)."""

    add_generation_prompt: bool
    continue_final_message: bool
    parse_special: bool


TOKENS: Final = b"T"
ERROR: Final = b"E"
LENGTH: Final = struct.Struct("<I")
MOST_ANSWER_BYTES: Final = 1 + 4 * MAX_TOKENS
"""No answer is longer; the coordinator's process would have to hold it."""


TEMPLATE_AS_USUAL: Final = ChatOptions(add_generation_prompt=True, continue_final_message=False, parse_special=False)


def tokenize(
    chat: ChatPrompts,
    *,
    prompt: str | None,
    messages: list[Mapping[str, Any]] | None,
    raw: bool,
    options: ChatOptions = TEMPLATE_AS_USUAL,
) -> list[int]:
    """The token ids of a prompt, or of chat messages through the model's template; BadRequest names the field that is wrong.

    A chat model gets its template around a plain prompt, too, unless `raw`. A raw prompt may spell control tokens.
    """
    if messages is not None:
        if not messages:
            raise BadRequest("messages is empty: give at least one", field="messages")
        return chat.encode(messages, **options)
    assert prompt is not None
    if chat.tokenizer.has_chat_template and not raw:
        return chat.encode([{"role": "user", "content": prompt}], **options)
    return chat.tokenizer.encode(prompt)


def _answer(chat: ChatPrompts, data: bytes) -> bytes:
    request = orjson.loads(data)
    field = "prompt" if request["messages"] is None else "messages"
    try:
        ids = tokenize(chat, **request)
        if len(ids) > MAX_TOKENS:
            raise BadRequest(f"the prompt has {len(ids):,} tokens, where {MAX_TOKENS:,} are the most: shorten it", field=field)
        return TOKENS + np.asarray(ids, np.int32).tobytes()
    except MeshError as error:
        return ERROR + ErrorReply.of(error).to_bytes()
    except Exception as error:  # the tokenizers library raises plain Exception, a template whatever its filters raise
        why = f"{type(error).__name__}: {error}"[:300]
        return ERROR + ErrorReply.of(BadRequest(f"the model's tokenizer refuses this text ({why})", field=field)).to_bytes()


def _read(stream: BinaryIO) -> bytes | None:
    """The next message; None when the other end has closed."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (size,) = LENGTH.unpack(head)
    data = stream.read(size)
    return data if len(data) == size else None


def _write(stream: BinaryIO, data: bytes) -> None:
    stream.write(LENGTH.pack(len(data)) + data)
    stream.flush()


def _limit_memory(limit_bytes: int) -> None:
    try:
        import resource
    except ImportError:  # not on this system
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> int:
    """Answer until stdin ends."""
    die_with_parent()
    directory, digest, limit_bytes, nice = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    if hasattr(os, "nice"):
        os.nice(nice)
    _limit_memory(limit_bytes)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    try:
        manifest = Manifest.load(directory)
        if digest and manifest.digest != digest:
            raise CorruptModel(f"{directory} has changed since the coordinator started: start it again")
        chat = ChatPrompts(Tokenizer.load(directory, manifest))
    except MeshError as error:
        _write(sink, ERROR + ErrorReply.of(error).to_bytes())
        return 1
    _write(sink, TOKENS)
    while (data := _read(source)) is not None:
        _write(sink, _answer(chat, data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
