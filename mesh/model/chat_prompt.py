"""Chat messages to token ids.

The control tokens of the template count as such. What a message spells does not: `<|im_end|>` typed by a user is nine or so plain tokens,
or a user could end the turn and begin another one as the system. In steps:

    1. each control token that a message spells is replaced by a stand-in before the template sees it
    2. in the template's text, each control token is replaced by a stand-in of another kind, and the text of step 1 is put back
    3. a copy of the tokenizer that knows no control tokens, but the stand-ins of step 2, makes ids; they become those of the tokens

Where no message spells a control token, the template's text is simply encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Final

import tokenizers

from mesh.errors import BadRequest
from mesh.model.tokenizer import Tokenizer
from mesh.model.tool_prompt import in_words

__all__ = ["ChatPrompts"]

# Characters of Unicode's private areas, which no text has that is meant for others. They are taken out of messages where they would count.
_OWN, _SPELLED, _END = "\ue000", "\ue001", "\ue002"
_FIRST: Final = 0xF0000
_MOST: Final = 0xFFFD


class ChatPrompts:
    """The prompts of one tokenizer's template. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        control = sorted(tokenizer.control_tokens().items(), key=lambda each: -len(each[1].content))[:_MOST]
        self._control = [(id, token) for id, token in control if token.content]
        texts = [token.content for _, token in self._control]
        self._texts = texts
        self._common = _shared(min(texts, default=""), max(texts, default=""))
        self._normalized = any(token.normalized for _, token in self._control)

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        parse_special: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids. `tools`: what the answer may call, for the template; a template that knows none gets them in words (tool_prompt.py).
        `add_generation_prompt`: the assistant's turn is begun. `continue_final_message`: the last message is the beginning of the answer.
        `parse_special`: a control token that a message spells is that token. `variables`: further values for the template, by its own
        names; control tokens that they spell are as those of messages. BadRequest as for apply_chat_template."""
        given: list[dict[str, Any]] = [{**message, "content": str(message.get("content") or "")} for message in messages]
        offered: list[Any] | None = list(tools) if tools else None
        if not self.tokenizer.knows_tools:
            given, offered = in_words(given, offered), None
        values: dict[str, Any] = dict(variables or {})
        spelled = not parse_special and any(map(self._spells, _texts((given, offered, values))))
        if spelled:
            given, offered, values = (_changed(each, self._set_aside) for each in (given, offered, values))
        if continue_final_message and given:
            # the space shows whether the template strips messages
            given[-1]["content"] = given[-1]["content"].replace(_END, "") + _END + " "
        text = self.tokenizer.apply_chat_template(
            given, tools=offered, add_generation_prompt=add_generation_prompt and not continue_final_message, **values
        )
        if continue_final_message:
            text = _until_end(text)
        return self._encode_spelled(text) if spelled else self.tokenizer.encode(text, add_special=False)

    def _spells(self, content: str) -> bool:
        if self._normalized:
            content = f"{content}\n{self.tokenizer.normalize(content)}"
        return self._common in content and any(text in content for text in self._texts)

    def _set_aside(self, content: str) -> str:
        """`content` with a stand-in for each control token that it spells."""
        if self._normalized:
            content = self.tokenizer.normalize(content)
        content = content.replace(_OWN, "").replace(_SPELLED, "")
        for place, text in enumerate(self._texts):
            content = content.replace(text, _stand_in(_SPELLED, place))
        return content

    def _encode_spelled(self, text: str) -> list[int]:
        for place, own in enumerate(self._texts):
            text = text.replace(own, _stand_in(_OWN, place))
        for place, spelled in enumerate(self._texts):
            text = text.replace(_stand_in(_SPELLED, place), spelled)
        backend, meant = self._plain
        return [meant.get(id, id) for id in backend.encode_batch_fast([text], add_special_tokens=False)[0].ids]

    @cached_property
    def _plain(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """A tokenizer to which control tokens are text, and stand-ins are tokens; and the control tokens that these mean."""
        backend = self.tokenizer.copy()
        backend.encode_special_tokens = True
        meant: dict[int, int] = {}
        for place, (id, token) in enumerate(self._control):
            name, kept = _stand_in(_OWN, place), {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
            meant[backend.get_vocab_size()] = id
            backend.add_tokens([tokenizers.AddedToken(name, normalized=False, special=False, **kept)])
        return backend, meant


def _texts(value: Any) -> Iterator[str]:
    """Every text in messages and tools, keys of arguments included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(str(key)): _changed(inner, change) for key, inner in value.items()}
    return [_changed(inner, change) for inner in value] if isinstance(value, list | tuple) else value


def _stand_in(kind: str, place: int) -> str:
    return kind + chr(_FIRST + place)


def _shared(first: str, last: str) -> str:
    """What all texts between two, in their order, begin with."""
    length = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]


def _until_end(text: str) -> str:
    """The template's text up to where the last message ends."""
    before, found, after = text.rpartition(_END)
    if not found:
        raise BadRequest(
            "the chat template leaves the last message out, so it cannot be continued: leave out continue_final_message",
            field="continue_final_message",
        )
    return before if after.startswith(" ") else before.rstrip()
