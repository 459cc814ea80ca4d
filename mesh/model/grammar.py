"""Grammars of answers: what a request asks for becomes one text, and that text says which tokens may come next.

    grammar_of(wanted)            the text, from a schema, a regular expression, choices or a grammar
    Vocabulary.load(directory)    the tokens of a model, as the library needs them: some 0.5 s for 49,152
    vocabulary.require(grammar)   BadRequest, which says why, unless it is a grammar that some text satisfies
    vocabulary.matcher(grammar)   follows one answer: which tokens may come next, token by token

The library is llguidance (docs/adr/0017-structured-output.md). All work is bounded by counts, not by time, so a coordinator and every shard
come to the same verdict: see LIMITS. What a schema asks for and the library does not do is an error that names the keyword.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import orjson
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from mesh.errors import BadRequest, short
from mesh.model.manifest import Manifest
from mesh.model.tokenizer import TOKENIZER_FILE
from mesh.protocol.structured import MAX_GRAMMAR_BYTES, MAX_SCHEMA_BYTES, StructuredOutputs

__all__ = ["FIELD", "LIMITS", "Matcher", "Vocabulary", "exact_formats", "grammar_of", "json_options", "require_schema", "require_types"]

FIELD: Final = "structured_outputs"
MAX_DEPTH: Final = 64
"""Of a schema's own nesting. What references nest is not bounded: an answer may be as deep as it likes."""
MAX_NODES: Final = 4000
"""Objects and lists in a schema."""
MAX_PROPERTIES: Final = 400
"""Of one object; the work grows with their square."""
MAX_ENUM: Final = 2000
_SHOWN: Final = 600
_KEPT: Final = 64
"""Compiled grammars, so that requests of one form share the work."""

LIMITS: Final = {
    "initial_lexer_fuel": 400_000,  # some 10 ms
    "step_lexer_fuel": 200_000,  # some 15 ms, for one token at most
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}


def json_options() -> dict[str, Any]:
    """How JSON is written: spaces and lines as a model likes, but no more than 24 in a row, or a weak model would write nothing else."""
    return {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,24}", "lenient": False}


def grammar_of(wanted: StructuredOutputs) -> str:
    """The grammar's text. BadRequest: what is wanted is too large or malformed; the rest is found by Vocabulary.require."""
    if wanted.json_schema is not None:
        return _from_schema(wanted.json_schema)
    if wanted.regex is not None:
        return _require_size(LLMatcher.grammar_from_regex(wanted.regex))
    if wanted.choice is not None:
        texts = " | ".join(orjson.dumps(text).decode() for text in dict.fromkeys(wanted.choice))
        return _require_size(LLMatcher.grammar_from_lark(f"start: {texts}"))
    if wanted.grammar is not None:
        return _require_size(LLMatcher.grammar_from_lark(_lark(wanted.grammar)))
    return _from_schema({"type": "object"})


def _from_schema(schema: Mapping[str, Any]) -> str:
    require_schema(schema)
    return _require_size(LLMatcher.grammar_from_json_schema(exact_formats(dict(schema)), overrides=json_options()))  # type: ignore[arg-type]


def _lark(grammar: str) -> str:
    try:
        return any_to_lark(grammar)
    except Exception as error:  # the library raises plain Exception
        raise _bad(f"the grammar is no GBNF: {short(str(error), _SHOWN)}") from None


def _require_size(grammar: str) -> str:
    if len(grammar) > MAX_GRAMMAR_BYTES:
        raise _bad(f"the form of the answer takes {len(grammar):,} characters as a grammar: at most {MAX_GRAMMAR_BYTES:,} are taken")
    return grammar


def _bad(message: str, field: str = FIELD) -> BadRequest:
    return BadRequest(message, field=field)


# -- schemas -----------------------------------------------------------------------------------------------------------


def require_schema(schema: Mapping[str, Any], what: str = "the schema") -> None:
    """BadRequest: `schema` is too large, nested too deeply, or has no end. `what` it is called."""
    try:
        size = len(orjson.dumps(schema))
    except TypeError:
        raise _bad(f"{what} nests too deeply: at most {MAX_DEPTH} levels are taken") from None
    if size > MAX_SCHEMA_BYTES:
        raise _bad(f"{what} has {size:,} bytes: at most {MAX_SCHEMA_BYTES:,} are taken")
    nodes = 0
    for node, depth in _nodes(schema):
        nodes += 1
        if depth > MAX_DEPTH:
            raise _bad(f"{what} nests too deeply: at most {MAX_DEPTH} levels are taken")
        if isinstance(node, list) and len(node) > MAX_ENUM:
            raise _bad(f"{what} has a list of {len(node):,} entries, such as an enum: at most {MAX_ENUM:,} are taken")
        if isinstance(node, dict) and len(node) > MAX_PROPERTIES:
            raise _bad(f"{what} has an object with {len(node):,} keys, such as properties: at most {MAX_PROPERTIES:,} are taken")
    if nodes > MAX_NODES:
        raise _bad(f"{what} has {nodes:,} objects and lists: at most {MAX_NODES:,} are taken")
    _require_end(schema, what)


def _nodes(root: Any) -> Iterator[tuple[Any, int]]:
    """(object or list, its depth) of a JSON value."""
    left = [(root, 1)]
    while left:
        node, depth = left.pop()
        if not isinstance(node, dict | list):
            continue
        yield node, depth
        left += [(each, depth + 1) for each in (node.values() if isinstance(node, dict) else node)]


def _require_end(schema: Mapping[str, Any], what: str) -> None:
    """BadRequest: a reference requires itself, so that no finite answer satisfies the schema."""
    targets = {node["$ref"]: _target(schema, node["$ref"]) for node, _ in _nodes(schema) if isinstance(node, dict) and _refers(node)}
    ending: set[str] = set()
    grew = bool(targets)
    while grew:
        new = {name for name, target in targets.items() if name not in ending and _ends(target, ending)}
        ending |= new
        grew = bool(new)
    if not _ends(schema, ending):
        endless = sorted(set(targets) - ending)
        raise _bad(f"{what} has no end: {short(', '.join(endless))} requires itself, so no answer would ever be complete")


_DATE: Final = (
    r"(\d{4}-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8]))"
    r"|(\d\d(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)-02-29)"
)
_TIME: Final = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,9})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
_EMAIL: Final = r"^[A-Za-z0-9_+-]{1,20}(\.[A-Za-z0-9_+-]{1,20}){0,2}@([A-Za-z0-9]{1,15}(-[A-Za-z0-9]{1,15}){0,2}\.){1,4}[A-Za-z]{2,20}$"
_EXACT: Final = {"email": _EMAIL, "date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}
"""Formats that the library takes too widely: it allows the 29th of February in any year, a leap second in any minute, and
more than 64 characters before an @."""
_VALUES: Final = frozenset({"const", "enum", "default", "examples"})
_TYPES: Final = frozenset({"array", "boolean", "integer", "null", "number", "object", "string"})


def require_types(schema: Mapping[str, Any], what: str) -> None:
    """BadRequest: some part of the schema has a type that JSON does not have, so it is no schema at all."""
    left: list[Any] = [schema]
    while left:
        node = left.pop()
        if isinstance(node, list):
            left += node
        elif isinstance(node, dict):
            given = node.get("type")
            wrong = next(
                (name for name in (given if isinstance(given, list) else [given]) if isinstance(name, str) and name not in _TYPES), None
            )
            if wrong is not None:
                raise _bad(
                    f"{what} has the type {short(wrong)!r}, which JSON does not have: there are {', '.join(sorted(_TYPES))}", "tools"
                )
            left += [each for key, each in node.items() if key not in _VALUES]


def exact_formats(schema: Any) -> Any:
    """`schema`, with patterns in place of the formats in _EXACT."""
    if isinstance(schema, list):
        return [exact_formats(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: each if key in _VALUES else exact_formats(each) for key, each in schema.items()}
    name = made.get("format")
    pattern = _EXACT.get(name) if isinstance(name, str) else None
    if pattern is None:
        return made
    del made["format"]
    if "pattern" not in made:
        return made | {"pattern": pattern}
    return made | {"allOf": [*made.get("allOf", ()), {"pattern": pattern}]}


def _refers(node: Mapping[str, Any]) -> bool:
    return isinstance(node.get("$ref"), str)


def _target(root: Mapping[str, Any], reference: str) -> Any:
    """What a reference within the schema means; True (anything) where it means nothing here: the library says what is wrong with it."""
    if not reference.startswith("#"):
        return True
    node: Any = root
    for part in filter(None, reference[1:].split("/")):
        key = part.replace("~1", "/").replace("~0", "~")
        node = node.get(key, True) if isinstance(node, dict) else True
    return node


def _ends(node: Any, ending: set[str]) -> bool:
    """Whether some finite value satisfies `node`, as far as its required parts say, where the references `ending` have one."""
    if not isinstance(node, dict):
        return True
    if _refers(node) and node["$ref"] not in ending:
        return False
    either = [each for key in ("anyOf", "oneOf") for each in [node.get(key)] if isinstance(each, list) and each]
    if not all(any(_ends(branch, ending) for branch in branches) for branches in either):
        return False
    parts = list(node["allOf"]) if isinstance(node.get("allOf"), list) else []
    properties, required = node.get("properties"), node.get("required")
    if isinstance(properties, dict) and isinstance(required, list):
        parts += [properties[name] for name in required if isinstance(name, str) and name in properties]
    least = node.get("minItems")
    if isinstance(least, int | float) and least >= 1 and "items" in node:
        parts.append(node["items"])
    return all(_ends(part, ending) for part in parts)


# -- tokens ------------------------------------------------------------------------------------------------------------


class Vocabulary:
    """The tokens of one model. Thread-safe."""

    def __init__(self, tokenizer: LLTokenizer, size: int) -> None:
        self.size = size
        self._tokenizer = tokenizer
        self._limits = LLParserLimits(**LIMITS)  # type: ignore[arg-type]
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def load(cls, directory: Path, manifest: Manifest) -> Vocabulary:
        """BadRequest: the model has no tokenizer, or none of which the library can take the bytes of each token."""
        if manifest.tokenizer is None:
            raise _bad(f"{manifest.name} has no tokenizer, so the form of an answer cannot be forced: leave it out")
        return cls.of(manifest.read_extra(directory, TOKENIZER_FILE).decode(), sorted(manifest.tokenizer.eos_ids), manifest)

    @classmethod
    def of(cls, tokenizer: str, ends: list[int], manifest: Manifest) -> Vocabulary:
        if not ends:
            raise _bad(f"{manifest.name} has no end token, so the form of an answer cannot be forced: leave it out")
        try:
            return cls(LLTokenizer(tokenizer, n_vocab=manifest.vocab_size, eos_token=ends), manifest.vocab_size)
        except (ValueError, RuntimeError) as error:
            why = short(str(error), _SHOWN)
            raise _bad(
                f"the tokenizer of {manifest.name} does not tell the bytes of its tokens, so the form is not forced: {why}"
            ) from None

    def require(self, grammar: str) -> None:
        """BadRequest: it is no grammar, needs too much work, or no text satisfies it."""
        matcher = self._compile(grammar)
        if matcher.is_error():
            raise _bad(f"the form of the answer is not supported: {_plain(matcher.get_error())}")
        first = Matcher(matcher, self.size)
        if first.allowed() is None or (first.stopped and not first.accepting):
            raise _bad("no answer has this form: it contradicts itself, refers to itself without end, or needs too much work")

    def matcher(self, grammar: str) -> Matcher:
        """A matcher at the beginning of an answer."""
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None:
                self._compiled.move_to_end(grammar)
        compiled = found or self._compile(grammar)
        with self._lock:
            self._compiled[grammar] = compiled
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return Matcher(compiled, self.size)

    def _compile(self, grammar: str) -> LLMatcher:
        return LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)


class Matcher:
    """Follows one answer. Its state is a function of the tokens that it was given. `beginning`: of an answer; it stays as it is."""

    def __init__(self, beginning: LLMatcher, size: int) -> None:
        self._beginning = beginning
        self._matcher = beginning.deep_copy()
        self._mask = allocate_token_bitmask(1, size)
        self._computed = False  # whether the mask is that of `tokens`
        self.tokens: list[int] = []

    @property
    def stopped(self) -> bool:
        """Whether nothing but the end may follow."""
        return bool(self._matcher.is_stopped())

    @property
    def accepting(self) -> bool:
        """Whether the answer may end here."""
        return bool(self._matcher.is_accepting())

    def go_to(self, tokens: list[int]) -> None:
        """Be where an answer of these tokens is: what they have in common with those before is kept."""
        had = len(self.tokens)
        common = had
        if tokens[:had] != self.tokens:  # seldom: most answers go on where they were
            both = zip(self.tokens, tokens, strict=False)
            common = next((at for at, (a, b) in enumerate(both) if a != b), min(had, len(tokens)))
        back = had - common
        # a matcher never leaves an error, and cannot go back from its end
        if self._matcher.is_error() or (back and (self._matcher.is_stopped() or not self._matcher.rollback(back))):
            self._matcher, self.tokens, self._computed, common = self._beginning.deep_copy(), [], False, 0
        new = tokens[common:]
        for token in new:
            self._matcher.consume_token(token)
        self._computed = self._computed and not back and not new
        self.tokens[common:] = new

    def allowed(self) -> Any:
        """Which tokens may come next, a bit each: int32 [ceil(vocabulary / 32)]. None: the answer so far does not have the form, or the
        next token needs more work than LIMITS allow. The array is used again for the next answer."""
        if not self._computed and not self._matcher.is_error():
            fill_next_token_bitmask(self._matcher, self._mask)
            self._computed = True
        return None if self._matcher.is_error() else self._mask[0]


def _plain(error: str) -> str:
    """The library's error in one line, without what is meant for its authors."""
    lines = [line.strip() for line in error.split("<backtrace>")[0].splitlines()]
    return short(" ".join(line for line in lines if line and set(line) - set("^|~ ")), _SHOWN)
