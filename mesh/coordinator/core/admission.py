"""Which requests may wait, which is next, and after how long the others should try again.

The queue is bounded. A request that finds it full is refused at once, with the time after which a row is likely to be free. A session
that lost its route goes to the front: it has waited already, and its client is in the middle of an answer.

Among the others the next one is of the caller who has the fewest sessions with rows; among those of one caller, and among callers that
have as many, the earlier arrival. So one caller's crowd does not keep the others waiting. A named caller may take three quarters of the
queue. Callers without a name count as one, and may take all of it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator

from mesh.coordinator.core.session import Session, State

__all__ = ["AdmissionQueue"]

SHORTEST_RETRY_S = 0.5
LONGEST_RETRY_S = 60.0
_SMOOTHING = 0.1


class AdmissionQueue:
    """`limit`: sessions that may wait."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lost: deque[Session] = deque()
        self._queues: dict[str, deque[Session]] = {}  # of each caller, in order of arrival
        self._served: Counter[str] = Counter()  # sessions with rows, by caller
        self._mean_s = 2.0  # how long a session holds its rows, smoothed

    def __len__(self) -> int:
        return len(self._lost) + sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Session]:
        """Those that lost their route, then the others by arrival."""
        waiting = [session for queue in self._queues.values() for session in queue]
        return iter((*self._lost, *sorted(waiting, key=lambda session: session.number)))

    def full(self, caller: str) -> bool:
        """Whether no further session of this caller may wait."""
        most = self.limit if not caller else self.limit - self.limit // 4
        return len(self) >= self.limit or len(self._queues.get(caller, ())) >= most

    def waiting(self, caller: str) -> int:
        """How many sessions of a caller wait, without those that lost their route."""
        return len(self._queues.get(caller, ()))

    def retry_after_s(self, capacity: int) -> float:
        """Seconds until the queue has probably moved on by one, with `capacity` rows in use."""
        estimate = self._mean_s * (len(self) + 1) / max(capacity, 1)
        return min(max(estimate, SHORTEST_RETRY_S), LONGEST_RETRY_S)

    def push(self, session: Session) -> None:
        self._queues.setdefault(session.caller, deque()).append(session)

    def push_front(self, session: Session) -> None:
        """Back in the queue after a loss, before all that wait for the first time; among the lost, the earlier arrival first."""
        index = next((index for index, lost in enumerate(self._lost) if lost.number > session.number), len(self._lost))
        self._lost.insert(index, session)

    def head(self) -> Session | None:
        """The next one."""
        if self._lost:
            return self._lost[0]
        heads = [queue[0] for queue in self._queues.values()]
        return min(heads, key=lambda session: (self._served[session.caller], session.number), default=None)

    def remove(self, session: Session) -> None:
        if session in self._lost:
            self._lost.remove(session)
            return
        queue = self._queues[session.caller]
        queue.remove(session)
        if not queue:
            del self._queues[session.caller]

    def took_rows(self, session: Session) -> None:
        self._served[session.caller] += 1

    def gave_rows_back(self, session: Session) -> None:
        self._served[session.caller] -= 1
        if not self._served[session.caller]:
            del self._served[session.caller]

    def observe(self, held_s: float) -> None:
        """A session has ended. It held its rows for `held_s` seconds."""
        self._mean_s += _SMOOTHING * (held_s - self._mean_s)

    def check(self, with_rows: Iterable[Session]) -> None:
        assert all(session.state is State.QUEUED for session in self), "a session in the queue is not queued"
        assert len({session.id for session in self}) == len(self), "a session waits twice"
        assert all(self._queues.values()), "a caller without sessions is remembered"
        assert self._served == Counter(session.caller for session in with_rows), "sessions with rows are miscounted"
