"""Processes that end and are started again. They are real; the clock is moved by hand."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mesh.errors import BadRequest, ServiceError
from mesh.host.process import dying_with_parent
from mesh.local.supervisor import MOST_DEATHS, START_TRIES, Child, Supervisor, restart_delay_s

FOREVER = "import signal; signal.pause()"
FAILING = "import sys; print('no memory'); sys.exit(3)"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class World:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = Clock()
        self.said: list[str] = []
        self.supervisor = Supervisor(self.said.append, self.clock)
        self.children: list[Child] = []

    def child(self, name: str, program: str, **options: Any) -> Child:
        command = dying_with_parent([sys.executable, "-c", program])
        child = Child(command, self.folder / f"{name}.log", os.environ)
        self.children.append(child)
        self.supervisor.watch(name, child, **options)
        return child

    def die(self, child: Child) -> None:
        child.process.kill()
        child.process.wait(30)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    for child in made.children:
        child.kill()


def test_the_delay_doubles_up_to_half_a_minute() -> None:
    assert [restart_delay_s(deaths) for deaths in range(1, 10)] == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


def test_a_killed_process_is_started_again_when_its_delay_is_over(world: World) -> None:
    child, other = world.child("shard-1", FOREVER), world.child("shard-2", FOREVER)
    world.supervisor.ready()
    assert world.supervisor.check() is None
    first = child.pid
    world.die(child)
    assert world.supervisor.check() == 0.5
    world.clock.now += 0.4
    assert world.supervisor.check() == pytest.approx(0.1) and child.returncode == -signal.SIGKILL
    world.clock.now += 0.2
    assert world.supervisor.check() is None
    assert child.pid != first
    assert all(each.returncode is None for each in (child, other))
    assert world.said == [
        "shard-1 was ended by SIGKILL; it is started again in 0.5 s",
        f"shard-1 is started again, process {child.pid}",
    ]


def test_a_minute_without_a_death_resets_the_delay(world: World) -> None:
    child = world.child("shard-1", FOREVER)
    world.supervisor.ready()
    for lived_s, expected in ((1, 0.5), (1, 1), (59, 2), (60, 0.5), (59, 1)):
        world.clock.now += lived_s
        world.die(child)
        assert world.supervisor.check() == expected
        world.clock.now += expected
        assert world.supervisor.check() is None


def test_a_child_that_keeps_ending_is_given_up_with_its_last_output(world: World) -> None:
    child = world.child("shard-1", FAILING)
    world.supervisor.ready()
    for deaths in range(1, MOST_DEATHS):
        child.process.wait(30)
        assert world.supervisor.check() == restart_delay_s(deaths)
        world.clock.now += restart_delay_s(deaths)
        world.supervisor.check()
    child.process.wait(30)
    with pytest.raises(ServiceError, match=rf"^shard-1 ended with exit code 3, {MOST_DEATHS} times in a row:\n(  no memory\n?)+$"):
        world.supervisor.check()
    assert world.said[0] == "shard-1 ended with exit code 3: no memory; it is started again in 0.5 s"


def test_fewer_deaths_are_tolerated_before_everything_was_ready(world: World) -> None:
    child = world.child("shard-1", FOREVER)
    for _ in range(START_TRIES - 1):
        world.clock.now += 100
        world.die(child)
        delay_s = world.supervisor.check()
        assert delay_s is not None
        world.clock.now += delay_s
        world.supervisor.check()
    world.die(child)
    with pytest.raises(ServiceError, match=rf"was ended by SIGKILL, {START_TRIES} times in a row: it said nothing"):
        world.supervisor.check()


def test_a_child_that_reports_a_usage_error_is_not_started_again(world: World) -> None:
    world.child("shard-1", "import sys; print('mesh: too little'); sys.exit(2)")
    world.children[0].process.wait(30)
    with pytest.raises(ServiceError, match=r"^shard-1 ended with exit code 2:\n  mesh: too little$"):
        world.supervisor.check()


def test_a_child_that_may_leave_stays_away_until_it_is_restarted(world: World) -> None:
    leaving, ending = world.child("shard-1", "", may_leave=True), world.child("coordinator-1", "")
    world.supervisor.ready()
    leaving.process.wait(30)
    ending.process.wait(30)
    assert world.supervisor.check() == 0.5
    assert world.said == [
        "shard-1 has left, as it was asked to",
        "coordinator-1 ended with exit code 0; it is started again in 0.5 s",
    ]
    before = leaving.pid
    world.supervisor.restart("shard-1")
    assert leaving.pid != before
    with pytest.raises(BadRequest, match="there is no shard-7 here: shard-1, coordinator-1"):
        world.supervisor.restart("shard-7")


def test_a_process_that_cannot_be_started_is_tried_again(world: World) -> None:
    child = world.child("shard-1", FOREVER)
    world.supervisor.ready()
    right, child.command = child.command, ["/nowhere/python"]
    world.die(child)
    world.supervisor.check()
    world.clock.now += 0.5
    assert world.supervisor.check() == 1.0
    assert "shard-1 could not be started" in world.said[-1] and "/nowhere/python" in world.said[-1]
    child.command = right
    world.clock.now += 1.0
    assert world.supervisor.check() is None and child.returncode is None


def test_run_raises_when_a_child_is_given_up(tmp_path: Path) -> None:
    """This one waits in real time, for the end of a process and for a delay."""
    said: list[str] = []
    supervisor = Supervisor(said.append)
    child = Child(dying_with_parent([sys.executable, "-c", FAILING]), tmp_path / "log", os.environ)
    supervisor.watch("shard-1", child)
    with pytest.raises(ServiceError, match="no memory"):
        supervisor.run()
    assert len(said) == 2 * (START_TRIES - 1)
    assert child.returncode == 3


def test_a_model_that_is_given_up_leaves_the_others_alone(world: World) -> None:
    good, bad = world.child("good", FOREVER, group="A"), world.child("bad", FOREVER, group="B")
    world.supervisor.ready()
    for _ in range(MOST_DEATHS):
        world.die(bad)
        delay_s = world.supervisor.check()
        world.clock.now += delay_s or 0.0
        world.supervisor.check()
    assert "bad is given up, and B with it; the other models go on" in world.said[-1]
    assert world.supervisor.check() is None and good.returncode is None
    world.die(good)
    world.supervisor.check()
    assert "good was ended by SIGKILL" in world.said[-1], "it is started again as before"


def test_the_last_model_that_is_given_up_ends_everything(world: World) -> None:
    children = [world.child(name, FOREVER, group=name) for name in ("A", "B")]
    world.supervisor.ready()
    with pytest.raises(ServiceError):
        for _ in range(MOST_DEATHS + 1):
            for child in children:
                if child.returncode is None:
                    world.die(child)
            world.clock.now += world.supervisor.check() or 0.0
            world.supervisor.check()
