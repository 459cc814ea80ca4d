"""The process that applies chat templates, tokenizes prompts and checks grammars for a coordinator.

A chat template is a program, and a tokenizer.json can ask for any amount of work: both come with the model. In a process of its own
such work has limits of time and memory, and the coordinator's event loop, which carries everyone's tokens, never waits for it.

    mesh.coordinator.prompt_pool starts it as   python -m mesh.coordinator.prompt_process MODEL_DIR DIGEST MEMORY_BYTES NICE

DIGEST is that of the manifest that must be in MODEL_DIR, or empty. On stdin and stdout, each message is a little-endian uint32 length
and that many bytes. The first answer says whether the tokenizer was read. Then each request has one answer. The request is JSON: prompt,
messages, raw, options, special; or form, what StructuredOutputs has; or calls, the fields of a request about tools; or decode, token ids.
The answer is one byte, TOKENS followed by int32 ids, GRAMMAR followed by the grammar's text (none where calls need none), TEXT followed by
JSON (the text of the ids, or the list of their names), or ERROR followed by the JSON of a protocol ErrorReply.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TypedDict

import numpy as np
import orjson

from mesh.errors import BadRequest, CorruptModel, MeshError
from mesh.host.process import die_with_parent
from mesh.model.chat_prompt import ChatPrompts
from mesh.model.manifest import Manifest
from mesh.model.tokenizer import Tokenizer
from mesh.protocol.failures import ErrorReply
from mesh.protocol.generation import Generate
from mesh.protocol.message import MAX_TOKENS
from mesh.protocol.structured import StructuredOutputs
from mesh.protocol.tools import FORMATS

if TYPE_CHECKING:
    from mesh.model.grammar import Vocabulary

__all__ = ["ERROR", "GRAMMAR", "LENGTH", "MOST_ANSWER_BYTES", "TEMPLATE_AS_USUAL", "TEXT", "TOKENS", "ChatOptions", "tokenize"]


class ChatOptions(TypedDict):
    """How messages become a prompt (mesh.model.chat_prompt)."""

    add_generation_prompt: bool
    continue_final_message: bool
    parse_special: bool
    tools: list[dict[str, Any]] | None
    variables: dict[str, Any]


TOKENS: Final = b"T"
GRAMMAR: Final = b"G"
TEXT: Final = b"D"
ERROR: Final = b"E"
LENGTH: Final = struct.Struct("<I")
MOST_ANSWER_BYTES: Final = 1 + 4 * MAX_TOKENS
"""No answer is longer; the coordinator's process would have to hold it."""


FORM_FIELD: Final = "structured_outputs"


TEMPLATE_AS_USUAL: Final = ChatOptions(
    add_generation_prompt=True, continue_final_message=False, parse_special=False, tools=None, variables={}
)


def tokenize(
    chat: ChatPrompts,
    *,
    prompt: str | None,
    messages: list[Mapping[str, Any]] | None,
    raw: bool,
    options: ChatOptions = TEMPLATE_AS_USUAL,
    special: bool = True,
    trailing: bool = False,
) -> list[int]:
    """The token ids of a prompt, or of chat messages through the model's template; BadRequest names the field that is wrong.

    A chat model gets its template around a plain prompt, too, unless `raw`. A raw prompt may spell control tokens; with `special` it begins
    with those that the model wants there, and with `trailing` it ends with those that the tokenizer adds after a text.
    """
    if messages is not None:
        if not messages:
            raise BadRequest("messages is empty: give at least one", field="messages")
        return chat.encode(messages, **options)
    assert prompt is not None
    if chat.tokenizer.has_chat_template and not raw:
        return chat.encode([{"role": "user", "content": prompt}], **options)
    return chat.tokenizer.encode(prompt, add_special=special, trailing=trailing)


class _Grammars:
    """Checks grammars. The vocabulary is read when the first one comes: most processes of this kind see none."""

    def __init__(self, tokenizer: Tokenizer, directory: Path, manifest: Manifest) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = cache(partial(_vocabulary, directory, manifest))

    def answer(self, request: Mapping[str, Any]) -> bytes:
        field = FORM_FIELD if "form" in request else "tools"
        try:
            grammar = self._form(request["form"]) if "form" in request else self._calls(request["calls"])
        except MeshError as error:
            return ERROR + ErrorReply.of(error).to_bytes()
        except Exception as error:  # the library may raise anything where it panics
            why = f"{type(error).__name__}: {error}"[:300]
            return ERROR + ErrorReply.of(BadRequest(f"the form of the answer is not supported ({why})", field=field)).to_bytes()
        return GRAMMAR + grammar.encode()

    def _form(self, form: Mapping[str, Any]) -> str:
        from mesh.model.grammar import grammar_of

        grammar = grammar_of(StructuredOutputs.model_validate_json(orjson.dumps(form)))
        self._vocabulary().require(grammar)
        return grammar

    def _calls(self, calls: Mapping[str, Any]) -> str:
        """Empty: no grammar is needed."""
        from mesh.model.tool_grammar import tool_grammar

        message = Generate.model_validate_json(orjson.dumps({"tokens": [0], **calls}))
        form = FORMATS[message.tool_format] if message.tool_format is not None else self._tokenizer.tool_format
        grammar = tool_grammar(
            message.tools,
            message.tool_choice,
            parallel=message.parallel_tool_calls,
            form=form,
            tokenizer=self._tokenizer,
            vocabulary=self._vocabulary(),
            answer=message.structured_outputs,
        )
        return grammar or ""


def _vocabulary(directory: Path, manifest: Manifest) -> Vocabulary:
    from mesh.model.grammar import Vocabulary

    return Vocabulary.load(directory, manifest)


def _answer(chat: ChatPrompts, grammars: _Grammars, data: bytes) -> bytes:
    request = orjson.loads(data)
    if "form" in request or "calls" in request:
        return grammars.answer(request)
    if "decode" in request:
        return _decoded(chat.tokenizer, request["decode"], names=request["names"])
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


def _decoded(tokenizer: Tokenizer, ids: list[int], *, names: bool) -> bytes:
    """The text of ids, control tokens included; or the name of each in the vocabulary."""
    try:
        found = [tokenizer.token(id) or "" for id in ids] if names else tokenizer.decode(ids, skip_special=False)
    except Exception as error:  # the tokenizers library raises plain Exception
        why = f"{type(error).__name__}: {error}"[:300]
        return ERROR + ErrorReply.of(BadRequest(f"the model's tokenizer refuses these tokens ({why})", field="tokens")).to_bytes()
    answer = TEXT + orjson.dumps(found)
    if len(answer) > MOST_ANSWER_BYTES:
        return ERROR + ErrorReply.of(BadRequest("the text of these tokens is too long: send fewer at a time", field="tokens")).to_bytes()
    return answer


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
    grammars = _Grammars(chat.tokenizer, directory, manifest)
    while (data := _read(source)) is not None:
        _write(sink, _answer(chat, grammars, data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
