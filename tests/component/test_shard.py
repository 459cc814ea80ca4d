"""Shards on a real server, driven with frames: the tokens of one process, and nothing that arrives can disturb them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from driver import Driver, ranges
from running import Run
from serving import COMPILED, CONTEXT, shards

from mesh.bus import Bucket, Bus, BusOptions, LeaseTable, Received
from mesh.errors import BadRequest, Busy, ConfigError, DeadlineExceeded, MessageRejected, Unavailable
from mesh.local.nats_server import NatsServer
from mesh.protocol import frame_codec, subjects, topics
from mesh.protocol.control import Close, Drain, Open, Opened, OpenMany
from mesh.protocol.events import Event
from mesh.protocol.failures import ErrorReply
from mesh.protocol.frame_codec import Flags, Frame, Kind, Nack
from mesh.protocol.status import Heartbeat, ShardLease
from mesh.runtime.generate import Pipeline
from mesh.runtime.sampling import SamplingParams
from mesh.runtime.stage import Stage, StageConfig
from mesh.shard.state import ROW_MASK
from mesh.types import LayerRange

PROMPTS = [[5, 17, 33, 2, 8], list(range(1, 41)), [90], [7, 7, 7, 60, 3, 3, 11, 80, 41]]


@pytest.fixture(scope="module")
def pipeline(model: Path) -> Pipeline:
    config = StageConfig(LayerRange(0, 3), rows=4, context=CONTEXT, chunk=16)
    return Pipeline([Stage.load(model, config, compiled=COMPILED)])


def lone(pipeline: Pipeline, prompt: list[int], count: int, **params: Any) -> list[int]:
    return pipeline.complete(prompt, SamplingParams(**{"temperature": 0.0, **params}), max_tokens=count).ids


@pytest.mark.parametrize("count", [1, 2, 3])
def test_tokens_equal_those_of_one_process(count: int, run: Run, server: NatsServer, model: Path, pipeline: Pipeline) -> None:
    async def work() -> None:
        async with shards(server.url, model, ranges(count)) as running, Driver.on(server.url, model, running) as driver:
            for session, prompt in enumerate(PROMPTS, 1):
                assert await driver.generate(session, prompt, 12) == lone(pipeline, prompt, 12)
            await driver.close(1, 2, 3, 4)
            sampled = SamplingParams(temperature=0.8, top_k=20, seed=7, repetition_penalty=1.2)
            want = lone(pipeline, PROMPTS[0], 12, temperature=0.8, top_k=20, seed=7, repetition_penalty=1.2)
            assert await driver.generate(5, PROMPTS[0], 12, sampled) == want
            stats = await driver.stats(count - 1)
            assert stats.sessions == 1 and stats.rejected == {} and stats.gaps == {}
            assert stats.decode_tokens == 5 * 11

    run(work())


def test_sessions_of_one_decode_batch_join_and_leave(run: Run, server: NatsServer, model: Path, pipeline: Pipeline) -> None:
    """Rows of different lengths step together, in any order and company."""

    async def work() -> None:
        async with shards(server.url, model, ranges(2)) as running, Driver.on(server.url, model, running) as driver:
            want = {session: lone(pipeline, prompt, 10) for session, prompt in enumerate(PROMPTS, 1)}
            got: dict[int, list[int]] = {}
            for joined in range(1, 5):
                prompt = PROMPTS[joined - 1]
                await driver.open(joined, len(prompt))
                got[joined] = [int((await driver.prefill(joined, prompt)).tokens[0])]
                for _ in range(2):
                    together = sorted(got, reverse=joined % 2 == 0)
                    at = [len(PROMPTS[s - 1]) + len(got[s]) - 1 for s in together]
                    answer = await driver.decode(together, at, [got[s][-1] for s in together])
                    assert answer.kind is Kind.TOKENS, answer
                    for session, token in zip(answer.sessions.tolist(), answer.tokens.tolist(), strict=True):
                        got[session].append(token)
                if joined == 3:
                    assert [closed.closed for closed in await driver.close(1)] == [1, 1]
                    assert got.pop(1) == want[1][:7]
            for session, tokens in got.items():
                assert tokens == want[session][: len(tokens)]

    run(work())


def test_several_sessions_are_opened_by_one_message(run: Run, server: NatsServer, model: Path) -> None:
    """Each has its own answer: a row, or why there is none."""

    async def work() -> None:
        async with shards(server.url, model, ranges(1)) as running, Driver.on(server.url, model, running) as driver:
            await driver.open(1, 5)
            rows = running[0].state.shape.rows
            opens = [driver.opening(session, 5) for session in range(1, rows + 3)]
            opens[1] = opens[1].model_copy(update={"model_hash": "0" * 16})
            to = topics.OPEN_MANY.at(running[0].options.name)
            answers = (await driver.bus.request(to, OpenMany(opens=tuple(opens)), timeout_s=5.0)).answers
            kinds = [answer.code if isinstance(answer, ErrorReply) else "opened" for answer in answers]
            assert kinds == ["opened", "message_rejected", *["opened"] * (rows - 1), "busy"]
            opened = [answer for answer in answers if isinstance(answer, Opened)]
            assert [one.session for one in opened] == [1, *range(3, rows + 2)]
            assert len({one.row & ROW_MASK for one in opened}) == rows
            gone = OpenMany(opens=(opens[0].model_copy(update={"instance": "another"}),))
            with pytest.raises(DeadlineExceeded):
                await driver.bus.request(to, gone, timeout_s=0.3)

    run(work())


@pytest.mark.parametrize("flags", [Flags.ZSTD, Flags.BF16, Flags.BF16 | Flags.ZSTD])
def test_compressed_activations(flags: Flags, run: Run, server: NatsServer, model: Path, pipeline: Pipeline) -> None:
    """zstd changes nothing; bfloat16 halves the bytes, and may change a token, so only its first is compared."""

    async def work() -> None:
        async with shards(server.url, model, ranges(3)) as running, Driver.on(server.url, model, running) as driver:
            driver.flags = flags
            tokens = await driver.generate(1, PROMPTS[1], 8)
            want = lone(pipeline, PROMPTS[1], 8)
            assert tokens == want if Flags.BF16 not in flags else tokens[0] == want[0]

    run(work())


def test_log_probabilities_travel(run: Run, server: NatsServer, model: Path, pipeline: Pipeline) -> None:
    async def work() -> None:
        async with shards(server.url, model, ranges(2)) as running, Driver.on(server.url, model, running) as driver:
            await driver.open(1, 5, SamplingParams(temperature=0.0, logprobs=3))
            await driver.open(2, 5)
            for session in (1, 2):
                last = await driver.prefill(session, PROMPTS[0])
            assert last.tensors == ()
            token = int(last.tokens[0])
            answer = await driver.decode([2, 1], [5, 5], [token, token])
            want = pipeline.complete(PROMPTS[0], SamplingParams(temperature=0.0, logprobs=3), max_tokens=2).tokens[1]
            chosen, ids, values = answer.tensors
            assert np.isnan(chosen[0]) and chosen[1] == pytest.approx(want.logprob, abs=1e-5)
            assert ids[1].tolist() == [i for i, _ in want.top]
            assert values[1] == pytest.approx([p for _, p in want.top], abs=1e-4)

    run(work())


def test_timings_of_every_stage_and_the_trace_come_back(run: Run, server: NatsServer, model: Path) -> None:
    async def work() -> None:
        async with shards(server.url, model, ranges(3)) as running, Driver.on(server.url, model, running) as driver:
            await driver.open(1, 1)
            trace = "00-" + "5" * 32 + "-" + "6" * 16 + "-01"
            await driver.send(driver.frame(Kind.PREFILL, [1], [0], [3], flags=Flags.FINAL, traceparent=trace, batch=9))
            answer = await driver.answer()
            assert answer.traceparent == trace and answer.batch == 9
            assert len(answer.timings) == 3 and all(timing.compute_us > 0 for timing in answer.timings)

    run(work())


def test_damage_is_rejected_and_counted_and_disturbs_nothing(run: Run, server: NatsServer, model: Path, pipeline: Pipeline) -> None:
    """Between the steps of a generation each stage is sent everything that can go wrong."""

    async def work() -> None:
        async with shards(server.url, model, ranges(2)) as running, Driver.on(server.url, model, running) as driver:
            prompt, want = PROMPTS[0], lone(pipeline, PROMPTS[0], 10)
            await driver.open(1, len(prompt))
            tokens = [int((await driver.prefill(1, prompt)).tokens[0])]
            random = np.random.default_rng(0)
            sent = 0
            while len(tokens) < 10:
                good = driver.frame(Kind.DECODE, [1], [len(prompt) + len(tokens) - 1], tokens[-1:])
                second = good.forward(random.standard_normal((1, 32), np.float32), frame_codec.StageTiming())
                for hop, base in enumerate((good, second)):
                    subject = base.subject("tiny")
                    data = frame_codec.encode(base)
                    flipped = bytearray(data)
                    flipped[random.integers(len(data))] ^= 1 << random.integers(8)
                    versioned = bytearray(data)
                    versioned[4] = 9
                    other_shard = replace(base, route=tuple(replace(h, shard="nobody") for h in base.route))
                    short_route = replace(
                        base, route=base.route[hop : hop + 1], stage_rows=base.stage_rows[hop : hop + 1], hop=0, tensors=()
                    )
                    bad = [bytes(flipped), bytes(versioned), data[:-3], b"", random.bytes(200), b'{"session": 1}']
                    bad += [frame_codec.encode(replace(base, model_hash="f" * 16)), frame_codec.encode(other_shard)]
                    bad += [frame_codec.encode(short_route), frame_codec.encode(replace(base, tokens=np.array([10**6], np.int32)))]
                    bad += [frame_codec.encode(base.answer(Kind.TOKENS, frame_codec.StageTiming(), tokens=base.tokens))]
                    if hop:
                        bad += [frame_codec.encode(replace(base, tensors=(np.zeros((1, 31), np.float32),)))]
                        bad += [frame_codec.encode(replace(base, tensors=(np.zeros((1, 32), np.float16),)))]
                    for message in bad:
                        await driver.bus.publish(subject, message)
                        sent += 1
                for topic in (topics.OPEN, topics.CLOSE, topics.DRAIN, topics.STATS):
                    with pytest.raises(MessageRejected):
                        await driver.bus.ask(topic.at(driver.route[0].shard).subject, random.bytes(20), timeout_s=5)
                await driver.bus.publish(topics.HEARTBEATS.at("tiny").subject, b"\xff")
                await driver.send(good)
                answer = await driver.answer()
                assert answer.kind is Kind.TOKENS
                tokens.append(int(answer.tokens[0]))
            assert tokens == want
            stats = [await driver.stats(hop) for hop in range(2)]
            counted = [{k: v for k, v in s.rejected.items() if k != "beat"} for s in stats]
            assert sum(sum(reasons.values()) for reasons in counted) == sent
            assert {"version", "checksum", "truncated", "magic", "model", "route", "input", "kind"} <= set(counted[0]) | set(counted[1])
            assert [s.gaps for s in stats] == [{}, {}] and all(s.rejected["beat"] == 9 for s in stats)
            assert driver.answers.empty()

    run(work())


def test_rows_out_of_turn_are_left_out_with_a_gap_and_the_others_computed(
    run: Run, server: NatsServer, model: Path, pipeline: Pipeline
) -> None:
    async def work() -> None:
        async with shards(server.url, model, ranges(2)) as running, Driver.on(server.url, model, running) as driver:
            for session in (1, 2, 3):
                await driver.open(session, 5, epoch=4)
                answer = await driver.prefill(session, PROMPTS[0])
            token = int(answer.tokens[0])
            frame = driver.frame(Kind.DECODE, [1, 2, 3], [5, 9, 5], [token] * 3)
            frame = replace(frame, epochs=np.array([4, 4, 3], np.uint32))
            await driver.send(frame)
            answers = [await driver.answer() for _ in range(3)]
            by_reason = {answer.reason: answer for answer in answers}
            assert by_reason[Nack.HOLE].sessions.tolist() == [2] and by_reason[Nack.HOLE].positions.tolist() == [5]
            assert by_reason[Nack.STALE_EPOCH].sessions.tolist() == [3]
            computed = by_reason[Nack.NONE]
            assert computed.sessions.tolist() == [1]
            assert computed.tokens.tolist() == lone(pipeline, PROMPTS[0], 2)[1:]
            await driver.close(1)
            nack = await driver.decode([1], [6], [0])
            assert nack.kind is Kind.NACK and nack.reason is Nack.UNKNOWN_SESSION
            assert (await driver.stats()).gaps == {"hole": 1, "stale_epoch": 1, "unknown_session": 1}

    run(work())


def test_replay_after_a_higher_epoch_gives_the_same_tokens(run: Run, server: NatsServer, model: Path, pipeline: Pipeline) -> None:
    """A recovery: the session is opened again, some of its cache is kept, and its history is sent again."""

    async def work() -> None:
        async with shards(server.url, model, ranges(3)) as running, Driver.on(server.url, model, running) as driver:
            prompt, want = PROMPTS[1], lone(pipeline, PROMPTS[1], 10)
            assert await driver.generate(1, prompt, 5) == want[:5]
            await driver.open(1, len(prompt), epoch=2, keep=20)
            assert [opened.filled for opened in driver.rows[1]] == [20, 20, 20]
            history = [*prompt, *want[:5]]
            answer = await driver.prefill(1, history[20:], start=20)
            assert int(answer.tokens[0]) == want[5]
            twice = [await driver.decode([1], [len(history)], [want[5]]) for _ in range(2)]
            assert [int(answer.tokens[0]) for answer in twice] == [want[6]] * 2

    run(work())


def test_a_full_shard_says_busy_and_a_closed_row_is_free_again(run: Run, server: NatsServer, model: Path) -> None:
    async def work() -> None:
        async with shards(server.url, model, ranges(1), rows=2) as running, Driver.on(server.url, model, running) as driver:
            await driver.open(1, 1)
            await driver.open(2, 1)
            with pytest.raises(Busy) as caught:
                await driver.open(3, 1)
            assert caught.value.retry_after_s > 0
            assert (await driver.close(1))[0].free_rows == 1
            await driver.open(3, 1)
            assert driver.rows[3][0].row & ROW_MASK == 0

    run(work())


def test_opening_by_the_queue_group_names_the_replica(run: Run, server: NatsServer, model: Path) -> None:
    async def work() -> None:
        whole = LayerRange(0, 3)
        async with shards(server.url, model, [whole, whole]) as running, Driver.on(server.url, model, running[:1]) as driver:
            message = {"coordinator": driver.name, "model_hash": driver.manifest.model_hash, "epoch": 1, "prompt_length": 1}
            chosen = set()
            for session in range(1, 9):
                request = Open(session=session, **message)  # type: ignore[arg-type]
                try:
                    opened = await driver.bus.request(topics.OPEN_ANY.at("tiny", whole), request, timeout_s=5)
                except Busy:
                    continue
                chosen.add(opened.shard)
            assert chosen == {shard.options.name for shard in running}

    run(work())


@pytest.mark.parametrize(
    ("change", "error", "field"),
    [
        ({"model_hash": "f" * 16}, MessageRejected, "model_hash"),
        ({"session": 0}, MessageRejected, "session"),
        ({"sampling": {"temperature": -1.0}}, BadRequest, "temperature"),
        ({"sampling": {"top_q": 1}}, MessageRejected, "sampling.top_q"),
    ],
)
def test_a_wrong_open_names_the_field(
    change: dict[str, Any], error: type[Exception], field: str, run: Run, server: NatsServer, model: Path
) -> None:
    async def work() -> None:
        import orjson

        async with shards(server.url, model, ranges(1)) as running, Driver.on(server.url, model, running) as driver:
            values = {"session": 1, "epoch": 1, "coordinator": "c", "model_hash": driver.manifest.model_hash, "prompt_length": 1}
            with pytest.raises(error) as caught:
                await driver.bus.ask(topics.OPEN.at(driver.route[0].shard).subject, orjson.dumps({**values, **change}), timeout_s=5)
            assert caught.value.field == field  # type: ignore[attr-defined]
            assert (await driver.stats()).sessions == 0

    run(work())


def test_sessions_of_a_coordinator_that_falls_silent_are_closed(run: Run, server: NatsServer, model: Path) -> None:
    async def work() -> None:
        async with shards(server.url, model, ranges(1), lease_ttl_s=0.6) as running, Driver.on(server.url, model, running) as driver:
            seen = asyncio.Event()
            bucket = Bucket(driver.bus, subjects.KV_SHARDS, ttl_s=0.6)

            def changed(key: str, lease: ShardLease | None) -> None:
                if key == driver.route[0].shard and lease is not None and opened.is_set() and lease.free_rows == 4:
                    seen.set()

            opened = asyncio.Event()
            table = LeaseTable(bucket, ShardLease, changed)
            await table.start()
            await driver.bus.send(topics.HEARTBEATS.at("tiny"), Heartbeat(coordinator=driver.name, ttl_s=0.3))
            await driver.open(1, 1)
            opened.set()
            await asyncio.wait_for(seen.wait(), 20)
            await table.stop()

    run(work())


def test_draining_lets_sessions_end_and_takes_no_new_ones(run: Run, server: NatsServer, model: Path, pipeline: Pipeline) -> None:
    async def work() -> None:
        async with shards(server.url, model, ranges(1)) as running, Driver.on(server.url, model, running) as driver:
            events: asyncio.Queue[Event] = asyncio.Queue()

            async def take(received: Received) -> None:
                event = Event.parse(received.data)
                if event.who == driver.route[0].shard:
                    events.put_nowait(event)

            await driver.bus.subscribe(topics.EVENTS.any(), take)
            prompt, want = PROMPTS[0], lone(pipeline, PROMPTS[0], 4)
            await driver.open(1, len(prompt))
            drained = await driver.bus.request(topics.DRAIN.at(driver.route[0].shard), Drain(timeout_s=60, force=True), timeout_s=5)
            assert drained.sessions == 1
            with pytest.raises(Unavailable, match="draining"):
                await driver.open(2, 1)
            answer = await driver.prefill(1, prompt)
            assert int(answer.tokens[0]) == want[0]
            await driver.bus.send(topics.CLOSE.at(driver.route[0].shard), Close(coordinator=driver.name, sessions=(1,)))
            kinds = [(await asyncio.wait_for(events.get(), 20)).kind for _ in range(2)]
            assert kinds == ["drained", "left"]

    run(work())


def test_a_second_shard_of_the_same_name_is_refused(run: Run, server: NatsServer, model: Path) -> None:
    async def work() -> None:
        from mesh.shard.service import Shard

        async with shards(server.url, model, ranges(1)) as running, await Bus.connect(BusOptions((server.url,)), name="twin") as bus:
            twin = Shard(bus, running[0].options)
            with pytest.raises(ConfigError, match="another shard_id"):
                await twin.run()

    run(work())


def test_a_step_that_fails_tells_the_coordinator_and_ends_the_shard(
    run: Run, server: NatsServer, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with shards(server.url, model, ranges(1)) as running, Driver.on(server.url, model, running) as driver:
            await driver.open(1, 1)

            def explode(*args: object) -> Frame:
                raise RuntimeError("out of memory")

            assert running[0].stage is not None
            monkeypatch.setattr(running[0].stage, "prefill", explode)
            nack = await driver.prefill(1, [3])
            assert nack.kind is Kind.NACK and nack.reason is Nack.FAILED
            await asyncio.wait_for(running[0]._stop.wait(), 10)

    run(work())
