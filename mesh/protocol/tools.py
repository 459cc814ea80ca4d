"""Tools that a request offers, the calls that an answer makes, and the forms in which families of models write them.

    Tool, ToolChoice            as OpenAI's API has them
    ToolCall                    one call of an answer, or of an earlier message
    FORMATS, format_of(...)     how a family writes a call; chosen from a chat template
    ToolParser                  an answer's text, as it comes, becomes text and calls

The text of an answer stays what the model wrote. Calls are read from it, by the coordinator for its last document and by clients for the
parts of a stream, with the same ToolParser: so they are the same after any failure, ids included.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from mesh.protocol.documents import BRANCH
from mesh.protocol.structured import SchemaObject

__all__ = [
    "FORMATS",
    "MAX_TOOLS",
    "CallPart",
    "Part",
    "Tool",
    "ToolCall",
    "ToolChoice",
    "ToolFormat",
    "ToolFormatName",
    "ToolParser",
    "calls_of",
    "choice_kind",
    "format_of",
    "must_call",
]

MAX_TOOLS: Final = 128
MAX_CALLS: Final = 256
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
CallId = Annotated[str, Field(min_length=1, max_length=128)]
ToolFormatName = Literal["hermes", "llama", "mistral", "phi"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class Function(_Part):
    """`parameters`: the JSON schema of its arguments. `strict`: a call always has arguments that follow it."""

    name: Name
    description: Annotated[str, Field(max_length=65536)] | None = None
    parameters: SchemaObject | None = None
    strict: bool | None = None


class Tool(_Part):
    type: Literal["function"]
    function: Function


class FunctionName(_Part):
    name: Name


class NamedChoice(_Part):
    type: Literal["function"]
    function: FunctionName


def choice_kind(choice: Any) -> str:
    """Which branch a tool_choice is of: a text, or an object that names a function."""
    return BRANCH.format("text" if isinstance(choice, str) else "object")


ToolChoice = Annotated[
    Annotated[Literal["auto", "none", "required"], Tag(BRANCH.format("text"))] | Annotated[NamedChoice, Tag(BRANCH.format("object"))],
    Discriminator(choice_kind),
]


def must_call(choice: Any) -> bool:
    """Whether the answer is calls and nothing else, as OpenAI's APIs say it in tool_choice: required, or one function."""
    return choice not in (None, "auto", "none")


class CalledFunction(_Part):
    """`arguments`: a JSON object, as text."""

    name: Name
    arguments: Annotated[str, Field(max_length=1024 * 1024)] = "{}"


class ToolCall(_Part):
    """A call of an answer. Its id is the answer's own: a message of the role tool names it."""

    id: CallId
    type: Literal["function"] = "function"
    function: CalledFunction

    def document(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": self.function.arguments}}


# -- forms -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family writes calls. begin, end: around one call, or around the list of all, if `listed`. key: of the arguments. bare: a call
    may stand without `begin` where the answer begins with it. joint: between calls that are not listed."""

    name: ToolFormatName
    begin: str
    end: str
    key: str = "arguments"
    listed: bool = False
    bare: bool = False
    joint: str = "\n"
    id_characters: int = 24
    id_prefix: str = "call_"

    @property
    def markers(self) -> tuple[str, ...]:
        return tuple(marker for marker in (self.begin, self.end) if marker)


FORMATS: Final[dict[str, ToolFormat]] = {
    each.name: each
    for each in (
        ToolFormat("hermes", "<tool_call>", "</tool_call>"),  # Hermes, Qwen, SmolLM; and templates that know no tools
        ToolFormat("llama", "<|python_tag|>", "", key="parameters", bare=True, joint=";"),
        ToolFormat("mistral", "[TOOL_CALLS]", "", listed=True, id_characters=9, id_prefix=""),  # its template takes ids of 9 characters
        ToolFormat("phi", "<|tool_call|>", "<|/tool_call|>", listed=True),
    )
}


def format_of(template: str | None) -> ToolFormat:
    """The form that a chat template teaches; Hermes's where it teaches none."""
    text = template or ""
    for name, mark in (("mistral", "[TOOL_CALLS]"), ("phi", "<|tool_call|>"), ("hermes", "<tool_call>"), ("llama", "<|python_tag|>")):
        if mark in text:
            return FORMATS[name]
    if "<|start_header_id|>" in text and "parameters" in text:  # Llama 3.2 has no mark of its own
        return FORMATS["llama"]
    return FORMATS["hermes"]


# -- reading -----------------------------------------------------------------------------------------------------------


class CallPart(NamedTuple):
    """A part of a call. `id` and `name` come with its first part; `arguments` of all parts, joined, are its arguments."""

    call: int
    arguments: str
    id: str | None = None
    name: str | None = None


Part = str | CallPart


def calls_of(text: str, form: ToolFormat, names: Iterable[str], request: str) -> tuple[str, tuple[ToolCall, ...]]:
    """(the text beside the calls, the calls) of a whole answer."""
    parser = ToolParser(form, names, request)
    return joined([*parser.push(text), *parser.finish()])


def joined(parts: Iterable[Part]) -> tuple[str, tuple[ToolCall, ...]]:
    """(text, calls) of the parts of an answer."""
    text, calls = [], dict[int, list[str]]()
    for part in parts:
        if isinstance(part, str):
            text.append(part)
        else:
            known = calls.setdefault(part.call, [part.id or "", part.name or "", ""])
            known[2] += part.arguments
    made = [ToolCall(id=id, function=CalledFunction(name=name, arguments=arguments)) for id, name, arguments in calls.values()]
    return "".join(text), tuple(made)


@dataclass(slots=True)
class _Object:
    """A call that is being read: JSON, character by character. `raw`: all of it so far."""

    raw: str = ""
    depth: int = 0
    quoted: bool = False
    escaped: bool = False
    key: str = ""
    string: str = ""  # the string of depth 1 that is being read, or was read last
    value_at: int | None = None  # where in `raw` the value of `key` begins
    name: str | None = None
    begun: bool = False  # its first part was given out
    given: int = 0  # characters of the arguments that were given out
    arguments: tuple[int, int | None] | None = None  # where they begin and end in `raw`
    ended: bool = False

    def push(self, character: str, keys: tuple[str, ...]) -> None:
        at = len(self.raw)
        self.raw += character
        if self.quoted:
            self._in_string(character)
            return
        if self.value_at is None and self.key and self.depth == 1 and not character.isspace():
            self.value_at = at
            if self.key in keys and self.arguments is None:
                self.arguments = (at, None)
        if character == '"':
            self.quoted = True
            self.string = ""
        elif character in "{[":
            self.depth += 1
        elif character in "}]":
            self.depth -= 1
            if self.depth == 1:
                self._value_ends(at + 1)
            elif self.depth == 0:
                self._value_ends(at)
                self.ended = True
        elif self.depth == 1 and character == ":":
            self.key, self.value_at = self.string, None
        elif self.depth == 1 and character == ",":
            self._value_ends(at)
            self.key, self.value_at = "", None

    def _in_string(self, character: str) -> None:
        if self.escaped:
            self.escaped = False
        elif character == "\\":
            self.escaped = True
        elif character == '"':
            self.quoted = False
            if self.depth == 1 and self.value_at is not None:
                if self.key == "name" and self.name is None:
                    self.name = self.string
                self._value_ends(len(self.raw))
            return
        if len(self.string) < 256:
            self.string += character

    def _value_ends(self, at: int) -> None:
        if self.arguments is not None and self.arguments[1] is None and self.value_at == self.arguments[0]:
            begin = self.arguments[0]
            self.arguments = (begin, begin + len(self.raw[begin:at].rstrip()))


@dataclass(slots=True)
class ToolParser:
    """Reads calls of the tools `names` in a text that comes in pieces. What `push` and `finish` return is the same however it is cut.
    `request` makes the calls' ids: the same answer has the same ids."""

    form: ToolFormat
    names: Iterable[str]
    request: str
    calls: int = 0
    _held: str = ""
    _began: bool = False  # something of the text was read
    _inside: bool = False
    _bare: bool = False
    _object: _Object | None = None
    _raw: str = ""  # of the section so far: what is given back as text if it holds no call
    _before: int = 0  # calls before the section
    _names: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        self._names = frozenset(self.names)

    def read(self, piece: str, *, end: bool) -> list[Part]:
        """What `push` returns; with `end`, also what `finish` does."""
        return [*self.push(piece), *(self.finish() if end else ())]

    def push(self, piece: str) -> list[Part]:
        self._held += piece
        return self._merge(self._read(end=False))

    def finish(self) -> list[Part]:
        parts = self._read(end=True)
        if self._inside:
            parts += self._leave()
        return self._merge(parts)

    def _read(self, *, end: bool) -> list[Part]:
        parts: list[Part] = []
        while self._held:
            before = self._held
            parts += self._inside_of(end=end) if self._inside else self._text(end=end)
            if self._held == before:
                break
        return parts

    def _text(self, *, end: bool) -> list[Part]:
        form, held = self.form, self._held
        if form.bare and not self._began:
            stripped = held.lstrip()
            if not stripped:
                if end:
                    self._held = ""
                    return [held]
                return []
            if stripped.startswith("{"):
                self._enter(bare=True, raw=held[: len(held) - len(stripped)])
                self._held = stripped
                return []
        at = held.find(form.begin)
        if at >= 0:
            self._held = held[at + len(form.begin) :]
            self._began = True
            self._enter(bare=False, raw=form.begin)
            return [held[:at]] if held[:at].strip() or (held[:at] and self.calls == 0) else []
        keep = 0 if end else _beginning(held, form.begin)
        text, self._held = held[: len(held) - keep], held[len(held) - keep :]
        if text:
            self._began = True
            if self.calls and not text.strip():  # spaces between calls
                return []
        return [text] if text else []

    def _enter(self, *, bare: bool, raw: str) -> None:
        self._inside, self._bare, self._raw, self._before, self._began = True, bare, raw, self.calls, True

    def _inside_of(self, *, end: bool) -> list[Part]:
        """What follows a mark: calls, until something else comes."""
        parts: list[Part] = []
        form = self.form
        while self._held:
            if self._object is not None:
                character, self._held = self._held[0], self._held[1:]
                self._raw += character
                self._object.push(character, (form.key, "arguments", "parameters"))
                parts += self._given(self._object)
                if self._object.ended:
                    parts += self._end_call(self._object)
                    self._object = None
                    if self._bare and self.calls == self._before:
                        return parts + self._leave()
                continue
            if form.end and self._held.startswith(form.end):
                self._held = self._held[len(form.end) :]
                return parts + self._leave(ended=True)
            if form.end and form.end.startswith(self._held) and not end:
                return parts
            character = self._held[0]
            if character == "{":
                self._object = _Object()
                continue
            if character.isspace() or character in ",;[]":
                self._raw += character
                self._held = self._held[1:]
                continue
            return parts + self._leave()
        return parts

    def _given(self, call: _Object) -> list[Part]:
        """What is known of a call's arguments now. They wait until the name is known to be a tool's."""
        if call.name is None or call.name not in self._names or call.arguments is None:
            return []
        begin, stop = call.arguments
        if call.raw[begin] != "{":  # a model may write its arguments as a text of JSON: that is read when the call ends
            return []
        text = call.raw[begin + call.given : stop]
        if not text:
            return []
        call.given += len(text)
        return [self._part(call, text)]

    def _part(self, call: _Object, text: str) -> CallPart:
        if call.begun:
            return CallPart(self.calls, text)
        call.begun = True
        return CallPart(self.calls, text, self._id(self.calls), call.name)

    def _end_call(self, call: _Object) -> list[Part]:
        if call.begun:
            self.calls += 1
            return []
        arguments = _read_whole(call.raw, (self.form.key, "arguments", "parameters"))
        if call.name is None or call.name not in self._names or arguments is None:
            return []
        part = self._part(call, arguments)
        self.calls += 1
        return [part]

    def _leave(self, *, ended: bool = False) -> list[Part]:
        """The section is over. One without a call was text after all."""
        call, raw = self._object, self._raw
        broken = call is not None and call.begun
        if broken:  # max_tokens ended it: what there is of it stays
            self.calls += 1
        nothing = self.calls == self._before
        self._inside, self._object, self._raw = False, None, ""
        return [raw + (self.form.end if ended else "")] if nothing else []

    def _id(self, index: int) -> str:
        digest = hashlib.sha256(f"{self.request}.{index}".encode()).hexdigest()
        return self.form.id_prefix + digest[: self.form.id_characters]

    @staticmethod
    def _merge(parts: Sequence[Part]) -> list[Part]:
        """Neighbouring parts of the same kind as one."""
        merged: list[Part] = []
        for part in parts:
            last = merged[-1] if merged else None
            if isinstance(part, str) and isinstance(last, str):
                merged[-1] = last + part
            elif isinstance(part, CallPart) and isinstance(last, CallPart) and part.call == last.call:
                merged[-1] = last._replace(arguments=last.arguments + part.arguments)
            elif part != "":
                merged.append(part)
        return merged


def _beginning(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`."""
    return next((length for length in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:length])), 0)


def _read_whole(raw: str, keys: tuple[str, ...]) -> str | None:
    """The arguments of a call that gave none out while it was read: those of a text of JSON, or none at all. None: they are no object."""
    try:
        call = json.loads(raw)
        value: Any = next((call[key] for key in keys if key in call), {})
        value = json.loads(value) if isinstance(value, str) else value
    except (ValueError, TypeError, RecursionError):
        return None
    if value is None:
        value = {}
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else None
