"""The model that component and system tests serve: a llama of 3 layers with random weights and a tokenizer of one token a character."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from places import EXPORTS
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from mesh.importer.options import ImportOptions
from mesh.importer.run import import_model

VOCABULARY = 96
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"


def make_model(folder: Path) -> Path:
    """The model directory, named "tiny". Its 96 tokens are the 95 printable characters of ASCII and one unknown token."""
    out = folder / "tiny"
    import_model(make_source(folder / "source"), out, ImportOptions(), name="tiny")
    return out


def make_source(source: Path) -> Path:
    """The folder that it is imported from."""
    source.mkdir()
    shutil.copy(EXPORTS / "llama-dynamo.onnx", source / "model.onnx")
    characters = {chr(32 + index): index for index in range(VOCABULARY - 1)} | {"<unk>": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(characters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return source
