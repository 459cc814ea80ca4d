"""The tiny llama with a byte-level tokenizer, an end token and a template that knows tools: what grammars and tool calls need."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from places import EXPORTS
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mesh.importer.options import ImportOptions
from mesh.importer.run import import_model

END = "<|end|>"
TEMPLATE = (
    "{% if tools %}tools:{% for t in tools %}{{ t['function']['name'] }} {% endfor %}<tool_call>;{% endif %}"
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}<tool_call>{{ c['function'] | tojson }}</tool_call>{% endfor %};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def byte_level() -> Tokenizer:
    """One token for each of the 95 printable characters of ASCII, and the end token."""
    characters = ["Ġ", *(chr(code) for code in range(33, 127))]  # the byte-level alphabet writes a space as Ġ
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return tokenizer


def make_chat_model(folder: Path) -> Path:
    """The model directory, named "tinychat"."""
    source = folder / "chat-source"
    source.mkdir()
    shutil.copy(EXPORTS / "llama-dynamo.onnx", source / "model.onnx")
    byte_level().save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": END}))
    out = folder / "tinychat"
    import_model(source, out, ImportOptions(), name="tinychat")
    return out
