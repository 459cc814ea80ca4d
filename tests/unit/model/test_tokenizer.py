"""Tokenizers from GGUF and Hugging Face directories, decoding as tokens come, and chat templates."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from demo_model import smollm2_gguf
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import BadRequest, CorruptModel, ModelNotFound, UnsupportedModel
from mesh.importer.sources.gguf_tokenizer import PRE_TOKENIZERS, write_gguf_tokenizer
from mesh.importer.sources.tokenizer import write_huggingface_tokenizer
from mesh.model.manifest import EXTRA_FILES, BlockInfo, CacheInfo, HiddenInfo, Manifest, TokenizerInfo, WeightsInfo, file_info
from mesh.model.tokenizer import Tokenizer

TEXTS = [
    "Hello world",
    "12345 678,90.1 3.14159e-10",
    "naïve café — “quotes” … ½ ² ٣ ४",
    "日本語のテキスト 中文 한국어",
    "👩‍👩‍👧‍👦 🇫🇷 emoji 😀",
    "def f(x):\n\treturn x**2  # comment\n\n\n    y = {'a': [1,2]}\r\n",
    "   leading   and trailing   ",
    "\n\n\n \t \t\n x",
    "I'm you're WE'LL don't",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a<|endoftext|>b",
    "http://example.com/?q=1&b=2",
    "\u00a0nbsp\u200bzero\u3000wide",
    "e\u0301 ﬁ 𝔘𝔫𝔦 Ⅷ ①",
    "\x00\x01 control \x7f",
    "",
    " ",
]


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    ranges = ((32, 127), (0xA0, 0x250), (0x370, 0x400), (0x600, 0x6FF), (0x4E00, 0x4E40), (0x1F600, 0x1F640), (9, 14), (0x2000, 0x2070))
    pool = [chr(code) for span in ranges for code in range(*span)]
    return ["".join(rng.choice(pool if rng.random() < 0.5 else " \n0aA'") for _ in range(rng.randrange(1, 60))) for _ in range(count)]


def read(directory: Path, info: TokenizerInfo) -> Tokenizer:
    template = directory / "chat_template.jinja"
    text = template.read_text() if info.chat_template else None
    return Tokenizer(tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")), info, text)


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    from mesh.importer.sources.gguf_file import GgufCheckpoint

    directory = tmp_path_factory.mktemp("smollm")
    info, _ = write_gguf_tokenizer(GgufCheckpoint(smollm2_gguf()).metadata, "smollm", directory)
    assert info == TokenizerInfo(bos_id=1, eos_ids=(2, 0), add_bos=False, chat_template=True)
    return read(directory, info)


def test_smollm2_tokens_are_those_of_llama_cpp(smollm: Tokenizer) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="compares with llama.cpp")
    oracle = llama_cpp.Llama(str(smollm2_gguf()), vocab_only=True, verbose=False)
    for text in TEXTS + random_texts(500):
        ids = smollm.encode(text)
        assert ids == oracle.tokenize(text.encode(), add_bos=False, special=True), text
        assert smollm.decode(ids, skip_special=False) == text
    oracle.close()


@given(st.text(max_size=60))
def test_streamed_text_is_the_decoded_text_and_never_a_broken_character(smollm: Tokenizer, text: str) -> None:
    ids = smollm.encode(text)
    stream = smollm.stream(skip_special=False)
    pieces = [stream.push(id) for id in ids]
    whole = smollm.decode(ids, skip_special=False)  # not always `text`: the vocabulary lacks some bytes
    assert "".join(pieces) + stream.finish() == whole
    assert "\ufffd" in whole or not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_end_inside_a_character_come_out_at_the_end(smollm: Tokenizer) -> None:
    ids = smollm.encode("ok 🤯")[:-1]
    stream = smollm.stream()
    assert "".join(stream.push(id) for id in ids).rstrip() == "ok"
    assert "\ufffd" in stream.finish()
    assert stream.finish() == ""


@pytest.mark.parametrize("skip_special", [True, False])
def test_tokens_without_text_cost_as_much_as_others(smollm: Tokenizer, skip_special: bool) -> None:
    """End tokens where they are ignored, and bytes that are no character."""
    lone = smollm.encode("🤯")[0]
    assert smollm.decode([lone]) == "\ufffd"
    for ids in ([smollm.info.eos_ids[0]] * 8000, [lone] * 8000, [lone, smollm.info.eos_ids[0]] * 4000):
        stream = smollm.stream(skip_special=skip_special)
        began = time.process_time()
        text = "".join([stream.push(id) for id in ids]) + stream.finish()
        assert time.process_time() - began < 3.0  # 0.3 s; 8 to 21 s where every token was decoded again
        assert text == smollm.decode(ids, skip_special=skip_special)


@given(st.data())
def test_the_text_goes_on_rightly_after_tokens_without_text(smollm: Tokenizer, data: st.DataObject) -> None:
    bytes_ = [id for character in "é🤯語" for id in smollm.encode(character)]
    parts = st.sampled_from([*bytes_, smollm.info.eos_ids[0], *smollm.encode(" the 🤯 end"), *smollm.encode("a語")])
    ids = data.draw(st.lists(parts, max_size=60))
    for skip_special in (True, False):
        stream = smollm.stream(skip_special=skip_special)
        text = "".join([stream.push(id) for id in ids]) + stream.finish()
        assert text == smollm.decode(ids, skip_special=skip_special)


SPM_PIECES = [*"▁abcdehlorw", "▁w", "he", "ll", "hell", "lo", "hello", "▁hello", "or", "ld", "▁wor", "▁world"]


def spm_metadata(prefix: bool) -> dict[str, Any]:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *SPM_PIECES, "<turn>", "\n\n"]
    types = [2, 3, 3, *[6] * 256, *[1] * len(SPM_PIECES), 3, 4]
    scores = [0.0] * 259 + [-float(len(SPM_PIECES) - n if len(piece) > 1 else 100 + n) for n, piece in enumerate(SPM_PIECES)] + [0.0, 0.0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.chat_template": "{{ bos_token }}{% for m in messages %}<turn>{{ m.role }} {{ m.content }}{% endfor %}",
    }


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokens_are_those_of_llama_cpp(prefix: bool, tmp_path: Path) -> None:
    metadata = spm_metadata(prefix)
    info, _ = write_gguf_tokenizer(metadata, "here", tmp_path)
    assert info == TokenizerInfo(bos_id=1, eos_ids=(2,), add_bos=True, chat_template=True)
    ours = read(tmp_path, info)
    assert ours.encode("hello")[0] == 1
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("hello").ids == ours.encode("hello")

    writer = gguf.GGUFWriter(tmp_path / "vocab.gguf", "llama")
    writer.add_vocab_size(len(metadata["tokenizer.ggml.tokens"]))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(metadata["tokenizer.ggml.tokens"])
    writer.add_token_scores(metadata["tokenizer.ggml.scores"])
    writer.add_token_types(metadata["tokenizer.ggml.token_type"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_space_prefix(prefix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    llama_cpp = pytest.importorskip("llama_cpp", reason="compares with llama.cpp")
    oracle = llama_cpp.Llama(str(tmp_path / "vocab.gguf"), vocab_only=True, verbose=False)
    rng = random.Random(0)
    texts = ["hello world", " hello", "hello  world", "é 🤯 z", "hellohello\n\nworld", "world<turn>hello", "wor ld"]
    texts += ["".join(rng.choice("helowrd  \n") for _ in range(rng.randrange(1, 30))) for _ in range(300)]
    for text in texts:
        assert ours.encode(text, add_special=False) == oracle.tokenize(text.encode(), add_bos=False, special=True), text
    oracle.close()
    assert ours.decode(ours.encode("hello world é")) == "hello world é"


def test_every_pre_tokenizer_loses_nothing(tmp_path: Path) -> None:
    from tiny_gguf import MERGES, byte_vocabulary

    for name in PRE_TOKENIZERS:
        metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.tokens": byte_vocabulary(258)}
        info, _ = write_gguf_tokenizer({**metadata, "tokenizer.ggml.merges": MERGES}, "here", tmp_path)
        assert info is not None
        tokenizer = read(tmp_path, info)
        for text in TEXTS:
            assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text
    with pytest.raises(UnsupportedModel, match=r"pre-tokenizer 'new' is not supported"):
        write_gguf_tokenizer({**metadata, "tokenizer.ggml.pre": "new"}, "here", tmp_path)
    with pytest.raises(UnsupportedModel, match=r"kind 't5'"):
        write_gguf_tokenizer({**metadata, "tokenizer.ggml.model": "t5"}, "here", tmp_path)
    assert write_gguf_tokenizer({}, "here", tmp_path) == (None, ())


def test_a_hugging_face_directory_gives_its_files_and_ids(tmp_path: Path, smollm: Tokenizer) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    assert write_huggingface_tokenizer(source, out) == (None, ())
    smollm._backend.save(str(source / "tokenizer.json"))
    settings = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>", "chat_template": "{{ eos_token }}x"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2, 999999]}))
    (source / "config.json").write_text(json.dumps({"eos_token_id": 0, "bos_token_id": 0}))
    info, files = write_huggingface_tokenizer(source, out)
    assert info == TokenizerInfo(bos_id=1, eos_ids=(2, 0), add_bos=False, chat_template=True)
    assert [file.name for file in files] == ["tokenizer.json", "chat_template.jinja"]
    assert read(out, info).apply_chat_template([]) == "<|im_end|>x"

    (source / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": True}))
    (source / "chat_template.jinja").write_text("file{{ messages[0].content }}")
    info, _ = write_huggingface_tokenizer(source, out)
    assert info is not None and info.add_bos
    assert read(out, info).encode("hi")[0] == 1 != read(out, info).encode("hi", add_special=False)[0]
    assert read(out, info).apply_chat_template([{"role": "user", "content": "!"}]) == "file!"

    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(CorruptModel, match=r"tokenizer.json is not a tokenizer"):
        write_huggingface_tokenizer(source, out)
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UnsupportedModel, match=r"save_pretrained"):
        write_huggingface_tokenizer(source, out)


def small_huggingface(folder: Path, **settings: Any) -> tuple[TokenizerInfo, Tokenizer]:
    """A directory with a tokenizer of bytes and of `</s>`, imported. `settings`: of tokenizer_config.json; `post`: the post-processor."""
    source, out = folder / "source", folder / "out"
    for path in (source, out):
        path.mkdir(exist_ok=True)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: id for id, token in enumerate([*alphabet, "<gap>"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    backend.add_tokens(["<tool>"])
    template = settings.pop("post", None)
    if template is not None:
        names = [name for name in ("</s>", "<tool>") if name in template]
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=[(name, backend.token_to_id(name)) for name in names]
        )
    backend.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    info, _ = write_huggingface_tokenizer(source, out)
    assert info is not None
    return info, read(out, info)


def test_the_leading_tokens_of_a_post_processor_come_before_a_plain_prompt(tmp_path: Path) -> None:
    info, tokenizer = small_huggingface(tmp_path, post="<tool> </s> $A")
    assert info.leading_ids == (258, 257) and not info.add_bos
    assert tokenizer.encode("ab")[:2] == [258, 257] and len(tokenizer.encode("ab")) == 4
    assert tokenizer.encode("<tool></s>ab") == tokenizer.encode("ab")  # they are there already
    assert tokenizer.encode("ab", add_special=False) == tokenizer.encode("ab")[2:]

    info, tokenizer = small_huggingface(tmp_path, post="</s> $A", bos_token="</s>")
    assert (info.leading_ids, info.add_bos) == ((), True) and tokenizer.encode("ab")[:1] == [257]
    info, tokenizer = small_huggingface(tmp_path, post="$A </s>", bos_token="</s>")
    assert (info.leading_ids, info.add_bos) == ((), False)


def test_tokens_that_the_configuration_alone_names(tmp_path: Path) -> None:
    """A control token of the vocabulary, one that it lacks, one that the tokenizer has as a plain one, and one that has no place."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    named = {"256": ("<gap>", True), "258": ("<tool>", True), "259": ("<new>", True), "260": ("<word>", False), "900": ("<far>", True)}
    decoder = {id: {"content": text, "special": special, **flags} for id, (text, special) in named.items()}
    _, before = small_huggingface(tmp_path)
    assert before.encode("<gap>") != [256] and before.decode([*before.encode("a"), 258]) == "a<tool>"
    info, tokenizer = small_huggingface(tmp_path, added_tokens_decoder=decoder, eos_token="<new>")
    assert info.eos_ids == (259,)
    text = "a<gap>b<tool>c<new>d<word>"
    ids = tokenizer.encode(text)
    assert [id for id in ids if id >= 256] == [256, 258, 259, 260]
    assert tokenizer.decode(ids) == "abcd<word>" and tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.vocab_size == 261


def test_a_configuration_whose_tokens_do_not_read(tmp_path: Path) -> None:
    kinds: list[Any] = [{"x": {"content": "a"}}, {"5": {}}, {"5": "a"}, ["a"]]
    for wrong in kinds:
        with pytest.raises(CorruptModel, match=r"tokenizer_config\.json"):
            small_huggingface(tmp_path, added_tokens_decoder=wrong)


def test_gpt2_files_make_a_tokenizer(tmp_path: Path) -> None:
    from tiny_gguf import byte_vocabulary

    vocabulary = [*byte_vocabulary(256), "ab", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: id for id, token in enumerate(vocabulary)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}))
    (tmp_path / "out").mkdir()
    info, _ = write_huggingface_tokenizer(tmp_path, tmp_path / "out")
    assert info == TokenizerInfo(bos_id=257, eos_ids=(257,))
    tokenizer = read(tmp_path / "out", info)
    assert tokenizer.encode("ab<|endoftext|>") == [256, 257]
    for text in TEXTS[:9]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


TEMPLATE = """{%- for message in messages %}
    {%- if message.role not in ("user", "assistant") %}{{ raise_exception("role " + message.role + " is unknown") }}{% endif %}
    {%- if loop.index > 2 %}{% break %}{% endif %}
<{{ message.role }}>{% generation %}{{ message.content | trim }}{% endgeneration %}{{ eos_token }}
{% endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}<assistant>{{ strftime_now("%Y") | length }}{% endif %}"""


def test_templates_have_what_hugging_face_gives_them(smollm: Tokenizer) -> None:
    tokenizer = Tokenizer(smollm._backend, TokenizerInfo(eos_ids=(2,)), TEMPLATE)
    messages = [{"role": "user", "content": " <é> "}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    text = tokenizer.apply_chat_template(messages, tools=[{"name": "<é>"}])
    assert text == '<user><é><|im_end|>\n<assistant>b<|im_end|>\n[{"name": "<é>"}]<assistant>4'
    assert not tokenizer.apply_chat_template(messages[:1], add_generation_prompt=False).endswith("<assistant>4")
    with pytest.raises(BadRequest, match=r"role x is unknown") as caught:
        tokenizer.apply_chat_template([{"role": "x", "content": ""}])
    assert caught.value.field == "messages"
    with pytest.raises(BadRequest, match=r"no chat template"):
        Tokenizer(smollm._backend, TokenizerInfo()).apply_chat_template([])
    escape = Tokenizer(smollm._backend, TokenizerInfo(), "{{ messages.__class__.__mro__ }}")
    with pytest.raises(BadRequest, match=r"refuses"):
        escape.apply_chat_template([])


def save_manifest(directory: Path, info: TokenizerInfo | None) -> None:
    blocks = tuple(BlockInfo(name=name, files=(), weight_bytes=0, parameters=0) for name in ("embed", "layer_000", "head"))
    Manifest(
        name="m",
        architecture="a",
        source="gguf",
        layers=1,
        vocab_size=10,
        context_length=10,
        hidden=HiddenInfo(size=4, dtype="float32"),
        cache=(CacheInfo(kv_heads=1, key_dim=4, value_dim=4),),
        cache_dtype="float32",
        weights=WeightsInfo(bits=32),
        blocks=blocks,
        tokenizer=info,
        extra_files=tuple(file_info(path) for name in sorted(EXTRA_FILES) if (path := directory / name).exists()),
    ).save(directory)


def test_a_model_directory_gives_its_tokenizer_or_says_what_to_do(tmp_path: Path, smollm: Tokenizer) -> None:
    with pytest.raises(ModelNotFound, match=r"not a model directory"):
        Tokenizer.load(tmp_path)
    save_manifest(tmp_path, None)
    with pytest.raises(ModelNotFound, match=r"has no tokenizer: give token ids"):
        Tokenizer.load(tmp_path)
    info = TokenizerInfo(eos_ids=(2,), chat_template=True)
    smollm._backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}")
    save_manifest(tmp_path, info)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == "hi<|im_end|>"
    assert tokenizer.encode("hi there") == smollm.encode("hi there")
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    save_manifest(tmp_path, info)
    with pytest.raises(CorruptModel, match=r"chat_template.jinja is not a template"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[")
    save_manifest(tmp_path, info)
    with pytest.raises(CorruptModel, match=r"tokenizer.json does not read"):
        Tokenizer.load(tmp_path)
