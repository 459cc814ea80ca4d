"""What observers of a mesh are told, from given leases and counts."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from mesh.client import CoordinatorStatus, MeshStatus
from mesh.client import read_model as module
from mesh.client.read_model import MeshReadModel
from mesh.protocol.events import Event
from mesh.protocol.status import CoordinatorStats, ShardLease, ShardStats


def lease(shard: str, start: int, stop: int, **values: Any) -> ShardLease:
    fixed: dict[str, Any] = {
        "instance": f"{shard}-1", "model": "m", "model_hash": "0" * 16, "total_layers": 4, "state": "ready", "rows": 4, "free_rows": 3,
        "context": 64, "chunk": 16, "hidden_size": 8, "hidden_itemsize": 4, "max_frame_bytes": 10**6, "queue_limit": 8,
        "memory_bytes": 100, "frame_version": 1,
    }  # fmt: skip
    return ShardLease(shard=shard, layers_start=start, layers_end=stop, **{**fixed, **values})


def stats(shard: str, instance: str = "1", **values: Any) -> ShardStats:
    fixed: dict[str, Any] = dict.fromkeys(
        ("uptime_s", "prefill_s", "decode_s", "queue_s", "codec_s"), 1.0
    ) | dict.fromkeys(
        ("sessions", "queue_frames", "prefill_steps", "prefill_tokens", "decode_steps", "decode_tokens", "frames_in", "frames_out",
         "bytes_in", "bytes_out", "memory_bytes"), 0
    )  # fmt: skip
    fixed |= {"model": "m", "state": "ready", "rows": 4, "free_rows": 2, "gaps": {}, "rejected": {}}
    return ShardStats(shard=shard, instance=f"{shard}-{instance}", **{**fixed, **values})


def coordinator(name: str = "c", *, serving: bool = True, **counters: Any) -> CoordinatorStatus:
    values = {"coordinator": name, "model": "m", "live": 2, "queued": 1, "capacity": 4, "serving": serving, **counters}
    return CoordinatorStatus(CoordinatorStats.parse(orjson.dumps(values)))


BOTH = (lease("a", 0, 2), lease("b", 2, 4))


def only(read_model: MeshReadModel) -> dict[str, Any]:
    document = orjson.loads(orjson.dumps(read_model.snapshot()))
    (model,) = document["models"]
    return model


def test_before_the_first_look_nothing_is_known() -> None:
    document = MeshReadModel().snapshot()
    assert document["models"] == [] and document["error"] and document["seen_s"] is None


def test_rates_are_between_two_looks() -> None:
    read_model = MeshReadModel()
    hops = {"steps": 10, "step_s": 0.03, "compute_s": 0.02, "queue_s": 0.001, "codec_s": 0.001}
    read_model.look(MeshStatus(BOTH, (coordinator(tokens=100, hops=hops),)), [stats("a", bytes_out=1000)], now=10.0, unix_s=100.0)
    assert only(read_model)["step"] is None and only(read_model)["point"][1] == 0
    hops = {"steps": 30, "step_s": 0.04, "compute_s": 0.03, "queue_s": 0.001, "codec_s": 0.001}
    read_model.look(MeshStatus(BOTH, (coordinator(tokens=160, hops=hops),)), [stats("a", bytes_out=4000)], now=12.0, unix_s=102.0)
    model = only(read_model)
    assert model["point"][:2] == [102.0, 30.0]
    assert model["step"]["step_s"] == pytest.approx((30 * 0.04 - 10 * 0.03) / 20)  # the mean of the 20 new ones
    assert model["step"]["hops_s"] == pytest.approx(model["step"]["step_s"] - model["step"]["compute_s"] - 0.002)
    assert model["shards"][0]["out_bytes_per_s"] == 1500 and model["shards"][0]["used"] == 2
    assert model["point"][4:] == [1.0, 1.0]  # one session of two runs, one waits
    assert len(read_model.history()["series"]["m"]) == 2


def test_a_process_that_began_anew_has_no_rate_yet() -> None:
    read_model = MeshReadModel()
    read_model.look(MeshStatus(BOTH, (coordinator(tokens=1000),)), [stats("a", bytes_out=9000)], now=1.0, unix_s=1.0)
    read_model.look(MeshStatus(BOTH, (coordinator(tokens=5),)), [stats("a", "2", bytes_out=9500)], now=2.0, unix_s=2.0)
    assert only(read_model)["point"][1] == 0 and only(read_model)["shards"][0]["out_bytes_per_s"] == 0


@pytest.mark.parametrize(
    ("shards", "coordinators", "state", "words"),
    [
        (BOTH, (coordinator(),), "ready", ""),
        (BOTH, (), "down", "No coordinator"),
        (BOTH[:1], (coordinator(serving=False),), "down", "layers 2-4"),
        ((BOTH[0], lease("b", 2, 4, state="loading")), (coordinator(serving=False),), "starting", "2-4 are being loaded"),
        (BOTH, (coordinator(serving=False),), "starting", "complete chain"),
        ((*BOTH, lease("b2", 2, 4, state="draining")), (coordinator(),), "degraded", "draining"),
        ((*BOTH, lease("b2", 2, 4, state="warming")), (coordinator(),), "ready", "getting ready"),
    ],
)
def test_how_a_mesh_stands_and_why(
    shards: tuple[ShardLease, ...], coordinators: tuple[CoordinatorStatus, ...], state: str, words: str
) -> None:
    read_model = MeshReadModel()
    read_model.look(MeshStatus(shards, coordinators), [], now=1.0, unix_s=1.0)
    model = only(read_model)
    assert (model["state"], words in model["reason"]) == (state, True), model["reason"]


def test_a_lost_shard_is_shown_for_a_while_and_a_shard_that_left_is_no_loss() -> None:
    read_model = MeshReadModel()
    three = (*BOTH, lease("b2", 2, 4), lease("b3", 2, 4))
    read_model.look(MeshStatus(three, (coordinator(),)), [], now=0.0, unix_s=0.0)
    read_model.happened(Event(kind="left", who="b3", model="m", at_unix_s=1.0))
    read_model.look(MeshStatus(BOTH, (coordinator(),)), [], now=1.0, unix_s=1.0)
    model = only(read_model)
    assert {shard["name"]: shard["state"] for shard in model["shards"]} == {"a": "ready", "b": "ready", "b2": "lost", "b3": "left"}
    assert model["state"] == "degraded" and "b2 is lost" in model["reason"] and "b3" not in model["reason"]
    read_model.look(MeshStatus((*BOTH, three[2]), (coordinator(),)), [], now=2.0, unix_s=2.0)  # it came back
    assert {shard["name"] for shard in only(read_model)["shards"]} == {"a", "b", "b2", "b3"} and only(read_model)["state"] == "ready"
    read_model.look(MeshStatus(BOTH, (coordinator(),)), [], now=3.0, unix_s=3.0)
    read_model.look(MeshStatus(BOTH, (coordinator(),)), [], now=4.0 + module.GHOST_S, unix_s=0.0)
    assert {shard["name"] for shard in only(read_model)["shards"]} == {"a", "b"}


def test_a_mesh_that_does_not_answer_keeps_what_was_seen() -> None:
    read_model = MeshReadModel()
    read_model.look(MeshStatus(BOTH, (coordinator(),)), [], now=1.0, unix_s=1.0)
    read_model.failed("gone", now=5.0, unix_s=5.0)
    document = read_model.snapshot()
    assert document["error"] == "gone" and document["seen_s"] == 4.0 and len(document["models"][0]["shards"]) == 2


def test_latency_is_of_requests_that_ended_lately() -> None:
    def line(ended: float, first_s: float | None) -> dict[str, Any]:
        return {"request": "r", "began_unix_s": ended - 1.0, "total_s": 1.0, "first_token_s": first_s, "tokens": 11}

    read_model = MeshReadModel()
    recent = [line(1000.0, 0.1), line(999.0, 0.3), line(998.0, 0.2), line(997.0, None), line(1000.0 - module.FRESH_S - 5, 9.0)]
    read_model.look(MeshStatus(BOTH, (coordinator(recent=recent),)), [], now=1.0, unix_s=1000.0)
    latency = only(read_model)["latency"]
    assert (latency["requests"], latency["first_token_s"], latency["worst_s"]) == (3, 0.2, 0.3)
    assert latency["token_s"] == pytest.approx(0.08)


def test_a_shard_that_is_suspected_is_shown_before_its_lease_ends_and_no_longer_when_it_is_renewed() -> None:
    read_model = MeshReadModel()
    three = MeshStatus((*BOTH, lease("b2", 2, 4)), (coordinator(),))
    read_model.look(three, [], now=1.0, unix_s=101.0)
    read_model.happened(Event(kind="suspected", who="b2", model="m", at_unix_s=101.5))
    model = only(read_model)
    assert model["shards"][2]["state"] == "suspected" and model["state"] == "degraded" and "b2 does not answer" in model["reason"]
    read_model.look(three, [], now=2.0, unix_s=102.0)
    assert only(read_model)["shards"][2]["state"] == "suspected"
    read_model.happened(Event(kind="ready", who="b2", model="m", at_unix_s=102.5))
    assert only(read_model)["shards"][2]["state"] == "ready"
    read_model.happened(Event(kind="suspected", who="b2", model="m", at_unix_s=103.0))
    read_model.look(three, [], now=20.0, unix_s=120.0)
    assert only(read_model)["shards"][2]["state"] == "ready"


def test_an_event_that_was_stored_and_received_is_shown_once() -> None:
    read_model = MeshReadModel()
    event = Event(kind="ready", who="a", model="m", at_unix_s=1.5, data={"layers": "0-2"})
    for one in (event, event.model_copy(), event.model_copy(update={"at_unix_s": 2.5})):
        read_model.happened(one)
    assert [said["at_unix_s"] for said in read_model.history()["events"]] == [1.5, 2.5]


def test_series_and_events_are_bounded() -> None:
    read_model = MeshReadModel()
    for second in range(module.POINTS + 50):
        read_model.look(MeshStatus(BOTH, (coordinator(),)), [], now=float(second), unix_s=float(second))
        read_model.happened(Event(kind="ready", who="a", model="m", at_unix_s=float(second)))
    history = read_model.history()
    assert len(history["series"]["m"]) == module.POINTS and len(history["events"]) == module.EVENTS
    read_model.look(MeshStatus((), ()), [], now=1000.0, unix_s=1000.0)
    read_model.look(MeshStatus((), ()), [], now=1000.0 + module.GHOST_S + 1, unix_s=2000.0)
    assert read_model.history()["series"] == {} and read_model.snapshot()["models"] == []


def test_the_time_to_the_first_token_counts_a_wait_that_is_not_over() -> None:
    read_model = MeshReadModel()

    def session(request: str, total_s: float, first_s: float | None) -> dict[str, Any]:
        state = "queued" if first_s is None else "decoding"
        return {
            "request": request, "state": state, "route": [], "prompt_tokens": 3, "max_tokens": 9, "tokens": 1, "prefilled": 0,
            "queue_s": 0.0, "first_token_s": first_s, "total_s": total_s, "restarts": 0,
        }  # fmt: skip

    fast = session("a", 1.0, 0.2)
    read_model.look(MeshStatus(BOTH, (coordinator(sessions=[fast, session("b", 0.1, None)]),)), [], now=1.0, unix_s=100.0)
    assert only(read_model)["latency"] == {"requests": 1, "first_token_s": 0.2, "worst_s": 0.2, "token_s": 0.0}, "it may come any moment"
    read_model.look(MeshStatus(BOTH, (coordinator(sessions=[fast, session("b", 30.0, None)]),)), [], now=2.0, unix_s=101.0)
    latency = only(read_model)["latency"]
    assert (latency["requests"], latency["worst_s"]) == (2, 30.0) and latency["first_token_s"] > 15
    read_model.look(MeshStatus(BOTH, (coordinator(sessions=[session("b", 31.0, None)]),)), [], now=3.0, unix_s=102.0)
    assert only(read_model)["latency"]["first_token_s"] == 31.0, "nobody has had a token"
