"""Which requests may wait, and after how long the others should try again.

The queue is bounded. A request that finds it full is refused at once, with the time after which a row is likely to be free. A session
that lost its route goes to the front: it has waited already, and its client is in the middle of an answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from mesh.coordinator.core.session import Session, State

__all__ = ["AdmissionQueue"]

SHORTEST_RETRY_S = 0.5
LONGEST_RETRY_S = 60.0
_SMOOTHING = 0.1


class AdmissionQueue:
    """`limit`: sessions that may wait. Sessions that were admitted and lost their route do not count."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._queue: deque[Session] = deque()
        self._mean_s = 2.0  # how long a session holds its rows, smoothed

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Session]:
        return iter(tuple(self._queue))

    @property
    def full(self) -> bool:
        return len(self._queue) >= self.limit

    def retry_after_s(self, capacity: int) -> float:
        """Seconds until the queue has probably moved on by one, with `capacity` rows in use."""
        estimate = self._mean_s * (len(self._queue) + 1) / max(capacity, 1)
        return min(max(estimate, SHORTEST_RETRY_S), LONGEST_RETRY_S)

    def push(self, session: Session) -> None:
        self._queue.append(session)

    def push_front(self, session: Session) -> None:
        """Back in the queue after a loss, before all that wait for the first time; among the lost, the earlier arrival first."""
        index = 0
        for index, waiting in enumerate(self._queue):  # noqa: B007
            if waiting.restarts == 0 or waiting.number > session.number:
                break
        else:
            index = len(self._queue)
        self._queue.insert(index, session)

    def head(self) -> Session | None:
        return self._queue[0] if self._queue else None

    def remove(self, session: Session) -> None:
        self._queue.remove(session)

    def observe(self, held_s: float) -> None:
        """A session has ended. It held its rows for `held_s` seconds."""
        self._mean_s += _SMOOTHING * (held_s - self._mean_s)

    def check(self) -> None:
        assert all(session.state is State.QUEUED for session in self._queue), "a session in the queue is not queued"
        assert len({session.id for session in self._queue}) == len(self._queue), "a session waits twice"
