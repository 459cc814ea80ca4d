"""Text to token ids and back, as a model directory's tokenizer.json says; chat messages to a prompt, as its template says."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers

from mesh.errors import BadRequest, CorruptModel, ModelNotFound, decoding, short
from mesh.model.manifest import Manifest, TokenizerInfo
from mesh.model.tokenizer_file import read_backend, unreadable
from mesh.protocol.tools import ToolFormat, format_of

__all__ = ["TOKENIZER_FILE", "Piece", "TextStream", "Tokenizer", "check_template"]

TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"

_NORMALIZED = 4
_WINDOW = 8
"""Tokens whose text is waited for. A character takes at most 4 tokens, since it takes at most 4 bytes."""
_CHARACTER_TOKENS = 4
_SHOWN = 500  # characters of an error that quotes a template
REPLACEMENT = "\ufffd"  # what decoding gives for bytes that are no character, or none yet
_PIECES_KEPT = 8192
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_PRINTABLE: Final = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_BYTE_OF: Final = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + index): byte for index, byte in enumerate(byte for byte in range(0x100) if byte not in _PRINTABLE)
}
"""The character that stands for each byte in the vocabulary of a byte-level tokenizer."""


class Piece(NamedTuple):
    """The text that a token adds inside a longer text, leading spaces included; U+FFFD stands for bytes that are no whole character. `raw`:
    what the token adds, where it is something else than that text: such bytes, or nothing for a control token. None: it is the text."""

    text: str
    raw: bytes | None = None


class Tokenizer:
    """A model's tokenizer. Thread-safe: nothing changes after construction. tool_format: how its template has calls of tools written.
    knows_tools: whether the template, where it is compiled, mentions tools."""

    tool_format: ToolFormat

    def __init__(self, backend: tokenizers.Tokenizer, info: TokenizerInfo, chat_template: str | None = None) -> None:
        backend.no_padding()  # prompts are neither padded nor cut: a file that asks for it could ask for any length
        backend.no_truncation()
        self._backend = backend
        self.info = info
        self._template = _compile(chat_template) if chat_template else None
        self.tool_format = format_of(chat_template)
        self.knows_tools = "tools" in (chat_template or "")
        self._longest = max(map(len, backend.get_vocab()), default=1)
        self._anchor = self.encode("a", add_special=False)[-1:]  # some token: a text's first one may be decoded differently
        self._special = frozenset(self.control_tokens())
        self.piece = lru_cache(_PIECES_KEPT)(self._piece)

    @classmethod
    def load(cls, directory: Path, manifest: Manifest | None = None, *, template: bool = True) -> Tokenizer:
        """The tokenizer of a model directory, whose files are those that the manifest lists, by their hashes.

        `manifest`: the model's (None: that of the directory). `template` False: the chat template, which is a program, is not compiled.
        ModelNotFound if there is no tokenizer; CorruptModel if a file does not read, or is not the manifest's.
        """
        directory = Path(directory)
        manifest = manifest or Manifest.load(directory)
        if manifest.tokenizer is None:
            raise ModelNotFound(f"{directory} has no tokenizer: give token ids, or import the model with its tokenizer files")
        text = None
        if manifest.tokenizer.chat_template:
            with decoding(CorruptModel, str(directory / TEMPLATE_FILE)):
                text = manifest.read_extra(directory, TEMPLATE_FILE).decode()
        path = directory / TOKENIZER_FILE
        backend = read_backend(manifest.read_extra(directory, TOKENIZER_FILE), path)
        try:
            made = cls(backend, manifest.tokenizer, text if template else None)
            made.tool_format = format_of(text)
            return made
        except jinja2.TemplateError as error:
            why = short(str(error), _SHOWN)
            raise CorruptModel(f"{directory / TEMPLATE_FILE} is not a template ({why}): import the model again") from None
        except Exception as error:  # tokenizers raises plain Exception
            raise unreadable(path, error) from None

    @property
    def vocab_size(self) -> int:
        return int(self._backend.get_vocab_size())

    @property
    def characters_per_token(self) -> int:
        """The most characters of a text that one token can stand for. What normalizes text may drop or join some of them."""
        return self._longest * (1 if self._backend.normalizer is None else _NORMALIZED)

    def encode(self, text: str, *, add_special: bool = True, trailing: bool = False) -> list[int]:
        """Token ids of `text`. `add_special`: with the leading tokens that the model wants, such as a bos (a chat prompt has them).
        `trailing`: with all that the tokenizer itself adds to a text, such as an end that models of embeddings are read at."""
        # This form lets other threads run meanwhile, and leaves out offsets, which are not used: 2.7 times as fast as `encode`.
        ids = list(self._backend.encode_batch_fast([text], add_special_tokens=trailing)[0].ids)
        leading = list(self.info.leading) if add_special else []
        return ids if ids[: len(leading)] == leading else leading + ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def token(self, id: int) -> str | None:
        """The token as the vocabulary has it, None if there is no such id."""
        text: str | None = self._backend.id_to_token(id)
        return text

    def _piece(self, id: int) -> Piece:
        anchor = self._anchor
        before = self.decode(anchor, skip_special=False)
        whole = self.decode([*anchor, id], skip_special=False)
        text = whole[len(before) :] if anchor and whole.startswith(before) else self.decode([id], skip_special=False)
        if id in self._special:
            return Piece(text, b"")
        return Piece(text, self._bytes_of(id)) if REPLACEMENT in text else Piece(text)

    def _bytes_of(self, id: int) -> bytes | None:
        """The bytes that a token stands for, as the vocabulary spells them. None: it spells none."""
        token = self.token(id) or ""
        byte = _BYTE_TOKEN.fullmatch(token)
        if byte is not None:
            return bytes([int(byte[1], 16)])
        values = [_BYTE_OF.get(character) for character in token]
        return None if None in values else bytes(value for value in values if value is not None)

    def control_tokens(self) -> dict[int, tokenizers.AddedToken]:
        """The tokens that a text does not spell: begins and ends of turns, and the like."""
        return {id: token for id, token in self._backend.get_added_tokens_decoder().items() if token.special}

    def marks(self, form: ToolFormat) -> bool:
        """Whether a mark of `form` is a control token, which a text leaves out."""
        control = {token.content for token in self.control_tokens().values()}
        return not control.isdisjoint(form.markers)

    def id_of(self, token: str) -> int | None:
        """The id of a token of the vocabulary."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def normalize(self, text: str) -> str:
        return text if self._backend.normalizer is None else str(self._backend.normalizer.normalize_str(text))

    def copy(self) -> tokenizers.Tokenizer:
        """The library's tokenizer once more, for a caller that changes it."""
        return tokenizers.Tokenizer.from_str(self._backend.to_str())

    def stream(self, *, skip_special: bool = True) -> TextStream:
        """A decoder for tokens that come one by one."""
        return TextStream(self, skip_special=skip_special)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The prompt for `messages` ({"role": ..., "content": ...}); encode it with add_special=False.

        `variables` are passed to the template (tools, enable_thinking ...). BadRequest if the model has no template or the
        template refuses the messages.
        """
        if self._template is None:
            raise BadRequest("this model has no chat template: send a prompt instead of messages", field="messages")
        special = {"bos_token": self._text_of(self.info.bos_id), "eos_token": self._text_of(next(iter(self.info.eos_ids), None))}
        try:
            return self._template.render(
                **{"tools": None, "documents": None, **special, **variables},
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
            )
        except MemoryError:
            raise BadRequest("the chat template needs too much memory for these messages", field="messages") from None
        except RecursionError:
            raise BadRequest("the chat template nests too deeply for these messages", field="messages") from None
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise BadRequest(f"the chat template refuses these messages: {short(str(error), _SHOWN)}", field="messages") from None

    def _text_of(self, id: int | None) -> str:
        return "" if id is None else self.token(id) or ""


class TextStream:
    """Decodes tokens as they come. What `push` and `finish` return, joined, is the text; no character is ever split.

    Tokens are decoded together with the few before them, because a token's text can depend on these (leading spaces). The work for a
    token is bounded: where _WINDOW tokens have brought no text, all but the last few are taken as they are.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._ids: list[int] = []  # context, then the tokens whose text has not been given out
        self._context = 0

    def push(self, id: int) -> str:
        """The text that `id` completes; empty while a character is incomplete."""
        self._ids.append(id)
        text = self._text(self._ids)
        fresh = "" if text.endswith(REPLACEMENT) else self._emit(text, len(self._ids))
        if len(self._ids) - self._context > _WINDOW:
            fresh = self._shorten(text)
        return fresh

    def finish(self) -> str:
        """The text that is left at the end: incomplete bytes become U+FFFD."""
        return self._emit(self._text(self._ids), len(self._ids))

    def _shorten(self, text: str) -> str:
        """Give out the text of the oldest tokens, up to where no character can go on; drop them where they have none."""
        ids, most = self._ids, len(self._ids)
        cuts = range(most - _CHARACTER_TOKENS, most)
        cut = next((at for at in cuts if self._text(ids[:at]) + self._text(ids[at:]) == text), most)
        fresh = self._emit(self._text(ids[:cut]), cut)
        if not fresh:
            del ids[self._context : cut]
        return fresh

    def _emit(self, text: str, end: int) -> str:
        """The text that the tokens before `end` have brought. `text` is theirs and the context's."""
        before = self._text(self._ids[: self._context])
        if not text.startswith(before):  # a decoder that rewrites what precedes: nothing of it can be taken back
            before = text[: len(before)]
        fresh = text[len(before) :]
        if fresh:
            # what has been given out becomes the context, and the context before that is no longer needed
            self._ids = self._ids[self._context :]
            self._context = end - self._context
        return fresh

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=self._skip_special)


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's part for training. Only what is inside is rendered."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _CodeGenerator(jinja2.compiler.CodeGenerator):
    """Computes nothing while it compiles. Otherwise `{{ "a" * 10**9 }}` would take its memory when the model is loaded."""

    def _output_child_to_const(self, node: jinja2.nodes.Expr, frame: jinja2.compiler.Frame, finalize: Any) -> str:
        if not isinstance(node, jinja2.nodes.TemplateData):
            raise jinja2.nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)

    def visit_EvalContextModifier(self, node: jinja2.nodes.EvalContextModifier, frame: jinja2.compiler.Frame) -> None:
        self.fail("a prompt has no autoescape", node.lineno)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    code_generator_class = _CodeGenerator


def check_template(template: str) -> None:
    """CorruptModel, with the line, where a chat template does not compile."""
    try:
        _compile(template)
    except jinja2.TemplateSyntaxError as error:
        raise CorruptModel(
            f"the chat template does not parse (line {error.lineno}: {short(str(error.message), _SHOWN)}): mend it"
        ) from None
    except jinja2.TemplateError as error:
        raise CorruptModel(f"the chat template is not one ({short(str(error), _SHOWN)}): mend it") from None


def _compile(template: str) -> jinja2.Template:
    """Compile in a sandbox: templates come with models and are not trusted. They have the globals that Hugging Face gives them."""
    extensions: list[str | type[jinja2.ext.Extension]] = ["jinja2.ext.loopcontrols", _Generation]
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False)
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    try:
        return environment.from_string(template)
    except (ArithmeticError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError) as error:  # from Python's compiler
        raise jinja2.TemplateError(str(error) or type(error).__name__) from None


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """JSON without HTML escapes, unlike jinja2's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
