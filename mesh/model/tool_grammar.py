"""The grammar of an answer that calls tools: the family's form around each call, the function's schema inside it.

required, or one function   the answer is calls and nothing else
auto, with a form of JSON   calls and nothing else, or JSON of the form and nothing else
auto, with a strict tool    text, and calls wherever the family's mark begins one
auto otherwise              no grammar
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from mesh.errors import BadRequest
from mesh.model.grammar import Vocabulary, exact_formats, json_options, require_schema, require_types
from mesh.model.tokenizer import Tokenizer
from mesh.protocol.structured import MAX_GRAMMAR_BYTES, StructuredOutputs
from mesh.protocol.tools import NamedChoice, Tool, ToolChoice, ToolFormat, must_call

__all__ = ["tool_grammar"]

_LINE: Final = r'("\n")?'
_ANY: Final[dict[str, Any]] = {"type": "object"}


def tool_grammar(
    tools: Sequence[Tool],
    choice: ToolChoice | None,
    *,
    parallel: bool,
    form: ToolFormat,
    tokenizer: Tokenizer,
    vocabulary: Vocabulary,
    answer: StructuredOutputs | None = None,
) -> str | None:
    """The grammar; None where the answer needs none. `answer`: the form of JSON of an answer that calls nothing. BadRequest: that, or a
    strict tool's schema, is not supported, or a tool's is none. A tool that is not strict, and whose schema is not supported, may have
    any object as arguments."""
    forced = must_call(choice)
    if not forced and answer is None and not any(tool.function.strict for tool in tools):
        return None
    if isinstance(choice, NamedChoice):
        tools, parallel = [tool for tool in tools if tool.function.name == choice.function.name], False
    schemas = [_schema(tool, vocabulary) for tool in tools]
    writer = _Writer(form, tokenizer, parallel)
    begins = writer.forced() if forced else writer.anywhere() if answer is None else writer.either(_answer_schema(answer, vocabulary))
    grammar = "\n".join([*begins, *writer.calls(tools, schemas)])
    if len(grammar) > MAX_GRAMMAR_BYTES:
        raise BadRequest(
            f"the tools take {len(grammar):,} characters as a grammar: at most {MAX_GRAMMAR_BYTES:,} are taken; offer fewer", field="tools"
        )
    try:
        vocabulary.require(grammar)
    except BadRequest as error:
        raise BadRequest(f"the tools together are not supported: {error}", field="tools") from None
    return grammar


def _schema(tool: Tool, vocabulary: Vocabulary) -> dict[str, Any]:
    """The schema of a tool's arguments, which is supported."""
    function = tool.function
    require_types(function.parameters or {}, f"the parameters of {function.name}")
    schema = {**_ANY, **exact_formats(function.parameters or {}), "x-guidance": json_options()}
    try:
        require_schema(schema, f"the parameters of {function.name}")
        vocabulary.require(f"start: %json {json.dumps(schema)}")
    except BadRequest as error:
        if function.strict:
            raise BadRequest(f"the tool {function.name} is strict, and its parameters are not supported: {error}", field="tools") from None
        return {**_ANY, "x-guidance": json_options()}
    return schema


def _answer_schema(answer: StructuredOutputs, vocabulary: Vocabulary) -> dict[str, Any]:
    """The schema of an answer that calls nothing, which is supported."""
    given = _ANY if answer.json_schema is None else answer.json_schema
    require_schema(given)
    schema: dict[str, Any] = {**exact_formats(given), "x-guidance": json_options()}
    vocabulary.require(f"start: %json {json.dumps(schema)}")
    return schema


class _Writer:
    """Writes one grammar in Lark's form, as llguidance reads it."""

    def __init__(self, form: ToolFormat, tokenizer: Tokenizer, parallel: bool) -> None:
        self._form = form
        self._tokenizer = tokenizer
        self._parallel = parallel

    def calls(self, tools: Sequence[Tool], schemas: Sequence[dict[str, Any]]) -> list[str]:
        """A call of any of the tools."""
        lines = [f'call_{index}: {self._call(tool)} arguments_{index} "}}"' for index, tool in enumerate(tools)]
        lines += [f"arguments_{index}: %json {json.dumps(schema)}" for index, schema in enumerate(schemas)]
        return [*lines, f"call: {' | '.join(f'call_{index}' for index in range(len(tools)))}"]

    def _call(self, tool: Tool) -> str:
        return json.dumps(f'{{"name": {json.dumps(tool.function.name)}, "{self._form.key}": ')

    def either(self, schema: dict[str, Any]) -> list[str]:
        """Calls, or JSON of the schema."""
        return ["start: calls | answer", f"answer: %json {json.dumps(schema)}", *self.forced("calls")]

    def forced(self, name: str = "start") -> list[str]:
        """Calls, and nothing else."""
        form = self._form
        if form.listed:
            more = ' (", " call)*' if self._parallel else ""
            return [f'{name}: {self._mark(form.begin)} "[" call{more} "]" {self._mark(form.end)}']
        if form.bare:
            return [f'{name}: call ("; " call)*' if self._parallel else f"{name}: call"]
        return [f"{name}: marked ({_LINE} marked)*" if self._parallel else f"{name}: marked", self._marked()]

    def _marked(self) -> str:
        return f"marked: {self._mark(self._form.begin)} {_LINE} call {_LINE} {self._mark(self._form.end)}"

    def anywhere(self) -> list[str]:
        """Text, and after each mark a call."""
        form, times = self._form, "*" if self._parallel else "?"
        if form.bare:
            more = ' ("; " call)*' if self._parallel else ""
            return [f'start: call{more} | TEXT | ""', r"TEXT: /[^{](.|\n)*/"]
        more = ' (", " call)*' if self._parallel else ""
        inside = f'"[" call{more} "]"' if form.listed else f"{_LINE} call {_LINE}"
        body = f"{inside} {self._mark(form.end)}"
        lines = [f"start: called{times} TEXT", r"TEXT: /(.|\n)*/"]
        token = self._token(form.begin)
        if token is not None:
            return [*lines, f"called: TEXT {token} {body}"]
        return [*lines, f"called: begun {body}", f"begun[lazy]: TEXT {json.dumps(form.begin)}"]

    def _mark(self, mark: str) -> str:
        return "" if not mark else self._token(mark) or json.dumps(mark)

    def _token(self, mark: str) -> str | None:
        """A mark that is one token is that token, and not the letters that spell it."""
        id = self._tokenizer.id_of(mark)
        return None if id is None else f"<[{id}]>"
