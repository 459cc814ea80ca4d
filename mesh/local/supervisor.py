"""Start child processes again when they end: for `mesh up` and the fault tests.

Each death in a row doubles the delay before the next start, from half a second to half a minute. After a minute without a death the count
begins anew. A child is given up after START_TRIES failed starts, while not everything was ready yet, or later after MOST_DEATHS deaths in a
row, each within a minute of its start.

Children of a group (a model, where there are several) do not end the others: one of them that is given up later is left out.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mesh.errors import BadRequest, MeshError, ServiceError
from mesh.host.process import wait_for_end
from mesh.telemetry.logs import readable

__all__ = ["MOST_DEATHS", "START_TRIES", "Child", "Revivable", "Supervisor", "restart_delay_s"]

START_TRIES = 3
MOST_DEATHS = 10
_FIRST_S, _LONGEST_S = 0.5, 30.0
_HEALTHY_S = 60.0
_SHOWN_LINES = 15
_TAIL_BYTES = 16 * 1024


class Revivable(Protocol):
    """A process that can be started again; a NatsServer is one too."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None:
        """The exit code; None while it runs; negative for the number of a signal that ended it."""

    @property
    def log(self) -> list[str]:
        """The last lines that it wrote."""

    def kill(self) -> None:
        """Send SIGKILL and wait for the end. Does nothing if the process has ended."""

    def revive(self) -> None:
        """Start it again. From the main thread, because the process ends with the thread that starts it. MeshError: it cannot be
        started."""


class Child:
    """A child process in a session of its own, so that Ctrl-C in a terminal does not reach it. Its output is appended to `path`."""

    def __init__(self, command: Sequence[str], path: Path, environment: Mapping[str, str]) -> None:
        """`environment`: what `revive` starts it with; it may be changed in between."""
        path.unlink(missing_ok=True)
        self.command = list(command)
        self._path = path
        self.environment = dict(environment)
        self.revive()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.poll()

    @property
    def log(self) -> list[str]:
        with self._path.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
            return [readable(line) for line in file.read().decode(errors="replace").strip().splitlines()]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def revive(self) -> None:
        with self._path.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=self.environment,
            )


def restart_delay_s(deaths: int) -> float:
    """Seconds to wait before a start, after so many deaths in a row."""
    return float(min(_FIRST_S * 2 ** (deaths - 1), _LONGEST_S))


@dataclass
class _Watched:
    process: Revivable
    may_leave: bool
    since: float
    deaths: int = 0  # in a row
    due: float | None = None  # when it is started again
    left: bool = False
    group: str | None = None
    given_up: bool = False


class Supervisor:
    """`check` starts what is due, `run` does so until something is given up. `say` is called with one line for each child that ended or is
    started again."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._watched: dict[str, _Watched] = {}
        self._all_were_ready = False

    def watch(self, name: str, process: Revivable, *, may_leave: bool = False, group: str | None = None) -> None:
        """Watch a process. may_leave: if it ends with code 0, it wanted to, and is not started again. `group`: others than these go on
        without it."""
        self._watched[name] = _Watched(process, may_leave, self._clock(), group=group)

    def ready(self) -> None:
        """Everything is ready: deaths until now are forgotten, and from now on more of them are allowed."""
        self._all_were_ready = True
        for watched in self._watched.values():
            watched.deaths = 0

    def restart(self, name: str) -> None:
        """Start a child again now; end it first if it is alive."""
        if name not in self._watched:
            raise BadRequest(f"there is no {name} here: {', '.join(self._watched)}", field="name")
        watched = self._watched[name]
        watched.process.kill()
        watched.process.revive()
        watched.since, watched.due, watched.left, watched.given_up = self._clock(), None, False, False

    def check(self) -> float | None:
        """Start again what is due. Returns the seconds until the next start, or None. ServiceError: a child is given up, and no other group
        goes on."""
        for name, watched in self._watched.items():
            if watched.left:
                continue
            try:
                self._look(name, watched)
            except ServiceError as error:
                watched.given_up = True
                if not self._others_go_on():
                    raise
                watched.left, watched.due = True, None
                self._say(f"{error}\n{name} is given up, and {watched.group} with it; the other models go on")
        due = [watched.due for watched in self._watched.values() if watched.due is not None]
        return max(min(due) - self._clock(), 0.0) if due else None

    def _look(self, name: str, watched: _Watched) -> None:
        if watched.due is None and (code := watched.process.returncode) is not None:
            self._ended(name, watched, code)
        if watched.due is not None and self._clock() >= watched.due:
            self._start(name, watched)

    def _others_go_on(self) -> bool:
        """Whether some group has lost nothing for good."""
        bad = {watched.group for watched in self._watched.values() if watched.given_up}
        return self._all_were_ready and None not in bad and bool({watched.group for watched in self._watched.values()} - bad - {None})

    def run(self) -> None:
        """Watch until a child is given up (ServiceError). Call it from the main thread."""
        while True:
            delay_s = self.check()
            wait_for_end([watched.process.pid for watched in self._watched.values() if watched.due is None and not watched.left], delay_s)

    def _ended(self, name: str, watched: _Watched, code: int) -> None:
        lines = watched.process.log
        if watched.may_leave and code == 0:
            watched.left = True
            self._say(f"{name} has left, as it was asked to")
            return
        # code 2: it was started wrongly, and its own message says how
        self._count(name, watched, _how(code), lines, hopeless=code == 2 and not self._all_were_ready)
        last = f": {lines[-1]}" if code > 0 and lines else ""
        self._say(f"{name} {_how(code)}{last}; it is started again in {restart_delay_s(watched.deaths):g} s")

    def _start(self, name: str, watched: _Watched) -> None:
        try:
            watched.process.revive()
        except (MeshError, OSError) as error:
            self._count(name, watched, "could not be started", [str(error)])
            self._say(f"{name} could not be started: {error}; tried again in {restart_delay_s(watched.deaths):g} s")
            return
        watched.since, watched.due = self._clock(), None
        self._say(f"{name} is started again, process {watched.process.pid}")

    def _count(self, name: str, watched: _Watched, how: str, lines: list[str], *, hopeless: bool = False) -> None:
        """Count one more death, and decide when to start the child again."""
        now = self._clock()
        healthy = self._all_were_ready and now - watched.since >= _HEALTHY_S
        watched.deaths = 1 if healthy else watched.deaths + 1
        if hopeless or watched.deaths >= (MOST_DEATHS if self._all_were_ready else START_TRIES):
            often = f", {watched.deaths} times in a row" if watched.deaths > 1 else ""
            words = "\n  ".join(["", *lines[-_SHOWN_LINES:]]) if lines else " it said nothing"
            raise ServiceError(f"{name} {how}{often}:{words}")
        watched.due = now + restart_delay_s(watched.deaths)


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
