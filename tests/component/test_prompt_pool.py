"""Templates and tokenizers that take unbounded time or memory harm the prompt that meets them, and nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import tokenizers
from running import Run
from serving import connect, coordinator

from mesh.coordinator import prompt_pool, prompt_process
from mesh.coordinator.prompt_pool import SHORT_CHARACTERS, PromptPool
from mesh.errors import BadRequest, Busy, CorruptModel, PromptTooLong
from mesh.local.nats_server import NatsServer
from mesh.model.chat_prompt import ChatPrompts
from mesh.model.manifest import FileInfo, Manifest, TokenizerInfo, file_info
from mesh.model.tokenizer import Tokenizer
from mesh.protocol import topics

PLAIN = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"


@pytest.fixture
def directory(tmp_path: Path) -> Callable[[str], Path]:
    """A model directory with a byte-level tokenizer and the given chat template; no blocks."""

    def make(template: str) -> Path:
        backend = tokenizers.Tokenizer(tokenizers.models.BPE({chr(i): i for i in range(256)}, [], byte_fallback=False))
        backend.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "chat_template.jinja").write_text(template)
        files = [file_info(tmp_path / name) for name in ("tokenizer.json", "chat_template.jinja")]
        write_manifest(tmp_path, files)
        return tmp_path

    return make


def write_manifest(directory: Path, files: list[FileInfo]) -> None:
    block = {"files": [], "weight_bytes": 0, "parameters": 0}
    Manifest.model_validate(
        {
            "name": "m",
            "architecture": "a",
            "source": "onnx",
            "layers": 1,
            "vocab_size": 256,
            "context_length": 64,
            "hidden": {"size": 4, "dtype": "float32"},
            "cache": [{"kv_heads": 1, "key_dim": 2, "value_dim": 2}],
            "cache_dtype": "float32",
            "weights": {"bits": 32},
            "blocks": [{"name": name, **block} for name in ("embed", "layer_000", "head")],
            "tokenizer": TokenizerInfo(chat_template=True).model_dump(),
            "extra_files": [file.model_dump() for file in files],
        }
    ).save(directory)


def chat(text: str) -> dict[str, Any]:
    return {"prompt": None, "messages": [{"role": "user", "content": text}], "raw": False}


def plain(text: str) -> dict[str, Any]:
    return {"prompt": text, "messages": None, "raw": True}


def test_prompts_become_the_ids_that_the_tokenizer_gives(run: Run, directory: Callable[[str], Path]) -> None:
    model = directory(PLAIN)
    tokenizer = Tokenizer.load(model)

    async def work() -> None:
        pool = PromptPool(model)
        await pool.start()
        try:
            for text in ("hello", "a" * (SHORT_CHARACTERS + 1)):
                assert await pool.tokenize(**plain(text)) == tokenizer.encode(text)
                assert await pool.tokenize(**chat(text)) == tokenizer.encode(f"user: {text}\n")
            with pytest.raises(BadRequest, match="at least one"):
                await pool.tokenize(prompt=None, messages=[], raw=False)
        finally:
            await pool.stop()

    run(work())


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% if messages[0].content == 'bad' %}" + ENDLESS + "{% endif %}ok", "longer than"),
        ("{% if messages[0].content == 'bad' %}{{ 'a' * 10**11 }}{% endif %}ok", "memory"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{% if messages[0].content == 'bad' %}{{ again() }}{% endif %}ok", "deep"),
        ("{% if messages[0].content == 'bad' %}{{ 1 // 0 }}{% endif %}ok", "refuses"),
        ("{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}ok", "refuses"),
    ],
    ids=["endless", "memory", "recursion", "division", "refusal"],
)
def test_a_template_that_goes_wild_ends_that_prompt_alone(run: Run, directory: Callable[[str], Path], template: str, said: str) -> None:
    model = directory(template)
    expected = Tokenizer.load(model).encode("ok")

    async def work() -> None:
        pool = PromptPool(model, timeout_s=2.0)
        await pool.start()
        try:
            bad = asyncio.create_task(pool.tokenize(**chat("bad")))
            longest, last = 0.0, time.monotonic()
            while not bad.done():
                await asyncio.sleep(0.005)  # the heartbeat of the loop, whose pauses are measured
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
            with pytest.raises(BadRequest, match=said):
                await bad
            assert longest < 1.0
            assert await pool.tokenize(**chat("good")) == expected
        finally:
            await pool.stop()

    run(work())


def test_an_answer_has_a_bound_on_both_sides(run: Run, directory: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A template may make far more text of a prompt than the coordinator's process should hold as tokens."""
    model = directory("{{ 'a' * 9 }}")
    monkeypatch.setattr(prompt_process, "MAX_TOKENS", 8)
    tokenizer = Tokenizer.load(model)
    grammars = prompt_process._Grammars(tokenizer, model, Manifest.load(model))
    said = prompt_process._answer(ChatPrompts(tokenizer), grammars, orjson.dumps(chat("x")))
    assert said[:1] == prompt_process.ERROR and b"are the most" in said
    monkeypatch.setattr(prompt_pool, "MOST_ANSWER_BYTES", 8)

    async def work() -> None:
        pool = PromptPool(model)
        await pool.start()
        try:
            with pytest.raises(BadRequest, match="shorten it"):
                await pool.tokenize(**chat("x"))
            assert pool.counters["died"] == 1
            assert len(await pool.tokenize(**plain("x"))) == 1
        finally:
            await pool.stop()

    run(work())


def test_a_long_prompt_does_not_keep_short_ones_waiting(run: Run, directory: Callable[[str], Path]) -> None:
    model = directory("{% if messages[0].content | length > 5000 %}" + ENDLESS + "{% endif %}ok")

    async def work() -> None:
        pool = PromptPool(model, timeout_s=3.0, long_limit=2)
        await pool.start()
        try:
            slow = [asyncio.create_task(pool.tokenize(**chat("a" * 6000))) for _ in range(2)]
            await pool.tokenize(**chat("quick"))
            assert not any(task.done() for task in slow)
            with pytest.raises(Busy):
                await pool.tokenize(**chat("a" * 6000))
            results = await asyncio.gather(*slow, return_exceptions=True)
            assert all(isinstance(result, BadRequest) for result in results)
        finally:
            await pool.stop()

    run(work())


def test_a_prompt_that_was_given_up_leaves_no_answer_behind(run: Run, directory: Callable[[str], Path]) -> None:
    model = directory(
        "{% if messages[0].content == 'slow' %}{% for a in range(3000) %}{% for b in range(300) %}{% endfor %}{% endfor %}{% endif %}ok"
    )

    async def work() -> None:
        pool = PromptPool(model)
        await pool.start()
        try:
            given_up = asyncio.create_task(pool.tokenize(**chat("slow")))
            await asyncio.sleep(0)
            given_up.cancel()
            await asyncio.gather(given_up, return_exceptions=True)
            assert len(await pool.tokenize(**plain("four"))) == 4
        finally:
            await pool.stop()

    run(work())


def test_a_tokenizer_that_does_not_read_is_an_error_at_the_start(run: Run, directory: Callable[[str], Path]) -> None:
    model = directory(PLAIN)
    (model / "tokenizer.json").write_bytes(orjson.dumps({"model": {}}))

    async def work() -> None:
        with pytest.raises(CorruptModel):
            await PromptPool(model).start()

    run(work())


def test_what_cannot_fit_is_refused_unread(server: NatsServer, run: Run, directory: Callable[[str], Path]) -> None:
    """The context is 64 tokens, and a token of this vocabulary is one character."""
    model = directory(PLAIN)

    async def work() -> None:
        async with coordinator(server.url, model) as serving, await connect(server) as bus:
            assert serving.stats().max_prompt_characters == 64
            bodies: list[dict[str, Any]] = [
                {"prompt": "a" * 65},
                {"prompt": "a" * 900_000},
                {"messages": [{"role": "user", "content": "a" * 65}]},
                {"messages": [{"role": "user", "content": ""}] * 65},
                {"tokens": [1] * 65},
                {"tokens": [1] * 600_000},
            ]
            for body in bodies:
                with pytest.raises(PromptTooLong, match="context"):
                    await bus.ask(topics.GENERATE.at("m").subject, orjson.dumps(body), timeout_s=10)
            assert serving.prompts is not None and not serving.prompts.counters["prompts"]

    run(work())


def test_a_coordinator_refuses_the_prompt_whose_template_goes_wild_and_takes_the_next(
    server: NatsServer, run: Run, directory: Callable[[str], Path]
) -> None:
    model = directory("{% if messages[0].content == 'hi' %}" + ENDLESS + "{% endif %}ok")

    async def work() -> None:
        async with coordinator(server.url, model, idle=False) as serving, await connect(server) as bus:
            subject = topics.GENERATE.at("m").subject
            wild = asyncio.create_task(bus.ask(subject, orjson.dumps({"prompt": "hi"}), timeout_s=30))
            with pytest.raises(PromptTooLong):  # answered at once: the loop is free
                await bus.ask(subject, orjson.dumps({"prompt": "a" * 65}), timeout_s=3)
            with pytest.raises(BadRequest, match="longer than"):
                await wild
            await bus.publish(subject, orjson.dumps({"prompt": "hello", "max_tokens": 1}), reply=bus.new_inbox())
            while not serving.core.load(0.0).live:
                await asyncio.sleep(0.01)  # the prompt is made tokens in another process
            assert serving.stats().prompts == {"prompts": 2, "late": 1}

    run(work())
