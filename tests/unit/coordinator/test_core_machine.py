"""The core against a perfect model of shards: whatever is interleaved, tokens come in order, none lost or repeated, no row leaks,
no session is stuck."""

from __future__ import annotations

from random import Random

import hypothesis.strategies as st
from fake_stages import FakeMesh, expected, next_token
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mesh.coordinator.core.events import CancelSession, Connection, FinishSession, ReplicaGone, Suspicion, Tick
from mesh.coordinator.core.machine import Core, CoreConfig
from mesh.coordinator.core.session import GenerationRequest
from mesh.types import LayerRange

CUTS = {1: [(0, 6)], 2: [(0, 3), (3, 6)], 3: [(0, 2), (2, 4), (4, 6)]}


class CoreMachine(RuleBasedStateMachine):
    @initialize(
        stages=st.sampled_from([1, 2, 3]),
        replicas=st.integers(1, 2),
        rows=st.integers(1, 4),
        strategy=st.sampled_from(["least_loaded", "round_robin", "queue_group"]),
        mirror=st.booleans(),
        carries=st.booleans(),
        seed=st.integers(0, 2**16),
    )
    def begin(self, stages: int, replicas: int, rows: int, strategy: str, mirror: bool, carries: bool, seed: int) -> None:
        self.random = Random(seed)
        self.mirror, self.carries = mirror, carries
        config = CoreConfig(6, strategy, queue_limit=4, failover_timeout_s=30, step_timeout_s=10)  # type: ignore[arg-type]
        self.mesh = FakeMesh(Core(config, Random(seed + 1)))
        self.ranges = [LayerRange(*cut) for cut in CUTS[stages]]
        self.rows = rows
        self.count = 0
        self.told_to_finish: set[str] = set()
        self.spawned = 0
        for layers in self.ranges:
            for _ in range(replicas):
                self.spawn(layers)

    def spawn(self, layers: LayerRange) -> None:
        self.spawned += 1
        self.mesh.join(
            f"s{self.spawned}", layers, rows=self.rows, chunk=3, instance=str(self.spawned), mirrors=self.mirror, carries=self.carries
        )

    @rule(
        prompt=st.lists(st.integers(0, 49), min_size=1, max_size=12),
        most=st.integers(1, 8),
        stop=st.sets(st.integers(0, 49), max_size=3),
        caller=st.sampled_from(["", "a", "b"]),
    )
    def submit(self, prompt: list[int], most: int, stop: set[int], caller: str) -> None:
        self.count += 1
        self.mesh.submit(GenerationRequest(f"r{self.count}", tuple(prompt), most, None, frozenset(stop), caller=caller))

    @rule(
        prompt=st.lists(st.integers(0, 49), min_size=1, max_size=12), most=st.integers(1, 8), known=st.integers(0, 8), resumed=st.booleans()
    )
    def submit_what_another_coordinator_began(self, prompt: list[int], most: int, known: int, resumed: bool) -> None:
        self.count += 1
        request = GenerationRequest(f"r{self.count}", tuple(prompt), most, None)
        given = tuple(expected(request)[:known])
        self.mesh.submit(GenerationRequest(request.id, request.prompt, most, None, frozenset(), given, resumed))

    @rule(
        begins=st.sampled_from([1, 2]),
        shared=st.integers(14, 40),
        rest=st.lists(st.integers(0, 49), min_size=1, max_size=4),
        most=st.integers(1, 8),
        salt=st.sampled_from(["a", "b"]),
    )
    def submit_what_begins_like_others(self, begins: int, shared: int, rest: list[int], most: int, salt: str) -> None:
        self.count += 1
        prompt = (*((begins * number) % 50 for number in range(shared)), *rest)
        self.mesh.submit(GenerationRequest(f"r{self.count}", prompt, most, None, salt=salt))

    @rule(prompt=st.lists(st.integers(0, 49), min_size=1, max_size=40), salt=st.sampled_from([None, "a"]))
    def submit_for_a_hidden_state(self, prompt: list[int], salt: str | None) -> None:
        self.count += 1
        self.mesh.submit(GenerationRequest(f"r{self.count}", tuple(prompt), 0, None, salt=salt, embed=True))

    @precondition(lambda self: self.mesh.ended)
    @rule(data=st.data(), more=st.lists(st.integers(0, 49), min_size=1, max_size=4))
    def submit_the_next_turn(self, data: st.DataObject, more: list[int]) -> None:
        """The prompt is an earlier prompt with its answer, and more."""
        before = self.mesh.requests[data.draw(st.sampled_from(sorted(self.mesh.ended)))]
        prompt = (*before.prompt, *self.mesh.tokens[before.id], *more)
        if len(prompt) < 60:
            self.count += 1
            self.mesh.submit(GenerationRequest(f"r{self.count}", prompt, 4, None, salt=before.salt))

    @precondition(lambda self: self.mesh.kept)
    @rule(data=st.data())
    def another_coordinator_says_what_is_kept(self, data: st.DataObject) -> None:
        """It may be late, and about shards that no longer hold it."""
        self.mesh.event(data.draw(st.sampled_from(self.mesh.kept)))

    @rule(count=st.integers(1, 40))
    def deliver(self, count: int) -> None:
        for _ in range(count):
            self.mesh.deliver(self.random)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.count:
            self.mesh.event(CancelSession(f"r{data.draw(st.integers(1, self.count))}"))

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        if self.count:
            name = f"r{data.draw(st.integers(1, self.count))}"
            self.told_to_finish.add(name)
            self.mesh.event(FinishSession(name))

    @rule(data=st.data(), noticed=st.booleans())
    def kill(self, data: st.DataObject, noticed: bool) -> None:
        if self.mesh.shards:
            self.mesh.kill(data.draw(st.sampled_from(sorted(self.mesh.shards))), noticed=noticed)

    @rule(data=st.data())
    def join(self, data: st.DataObject) -> None:
        self.spawn(data.draw(st.sampled_from(self.ranges)))

    @precondition(lambda self: self.mesh.shards)
    @rule(data=st.data())
    def restart_under_the_same_name(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.mesh.shards)))
        layers = self.mesh.shards[name].replica.layers
        self.mesh.kill(name, noticed=False)
        self.spawned += 1
        self.mesh.join(name, layers, rows=self.rows, chunk=3, instance=str(self.spawned), mirrors=self.mirror, carries=self.carries)

    @precondition(lambda self: self.mesh.shards)
    @rule(data=st.data(), draining=st.booleans())
    def lease(self, data: st.DataObject, draining: bool) -> None:
        self.mesh.lease(data.draw(st.sampled_from(sorted(self.mesh.shards))), draining=draining)

    @precondition(lambda self: self.mesh.shards)
    @rule(data=st.data(), stopped=st.booleans())
    def stop_and_continue(self, data: st.DataObject, stopped: bool) -> None:
        self.mesh.shards[data.draw(st.sampled_from(sorted(self.mesh.shards)))].stopped = stopped

    @rule(count=st.integers(1, 3))
    def lose(self, count: int) -> None:
        for _ in range(count):
            self.mesh.lose(self.random)

    @rule(count=st.integers(1, 3))
    def double(self, count: int) -> None:
        for _ in range(count):
            self.mesh.double(self.random)

    @rule()
    def heartbeat(self) -> None:
        self.mesh.heartbeat()

    @rule()
    def a_connection_ends(self) -> None:
        self.mesh.event(Suspicion())

    @rule(online=st.booleans())
    def connection(self, online: bool) -> None:
        self.mesh.event(Connection(online))

    @rule(seconds=st.floats(0, 12))
    def time_passes(self, seconds: float) -> None:
        self.mesh.now += seconds
        self.mesh.event(Tick())

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "mesh"):
            self.mesh.check()

    def teardown(self) -> None:
        """Every range has a shard and nothing fails any more, so every session must end."""
        if not hasattr(self, "mesh"):
            return
        mesh = self.mesh
        mesh.event(Connection(True))
        for there in mesh.shards.values():
            there.stopped = False
        alive = {shard.replica.shard for shard in mesh.shards.values()}
        for replica in mesh.core.replicas():
            if replica.shard not in alive:  # a death nobody noticed: its lease ends
                mesh.event(ReplicaGone(replica.shard))
        for layers in self.ranges:
            self.spawn(layers)
        for _ in range(1000):
            mesh.settle(self.random)
            if mesh.core.idle:
                break
            for name in sorted(mesh.shards):
                mesh.lease(name)
            mesh.now += 0.5
            mesh.event(Tick())
        mesh.settle(self.random)
        assert mesh.core.idle, "a session is stuck"
        mesh.heartbeat()
        mesh.heartbeat()
        for shard in mesh.shards.values():
            assert not shard.reservations, "a row leaked"
        for id, request in mesh.requests.items():
            if id in mesh.rejected:
                assert mesh.tokens[id] == list(request.prefix) and not request.resumed
                continue
            ended = mesh.ended[id]
            assert ended.tokens == len(mesh.tokens[id])
            if request.embed:
                assert id not in mesh.states or ended.reason == "stop"
                assert mesh.states.get(id, next_token(request.prompt)) == next_token(request.prompt)
                assert ended.error is not None or id in mesh.states or id in self.told_to_finish
                continue
            if ended.reason == "length" or (ended.reason == "stop" and mesh.tokens[id] == expected(request)):
                assert mesh.tokens[id] == expected(request)
        mesh.check()


TestCore = CoreMachine.TestCase
TestCore.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
