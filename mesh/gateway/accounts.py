"""What each subject has spent of its quota, at this gateway and at the others, and what it has used since the start.

An account counts what was spent, and forgets it evenly: a subject with 60 requests a minute gets one back each second. Spending of other
gateways (sharing.py) is added as it is heard, so that all gateways count the same. What a gateway admits before it has heard of it is a
debt, which is forgotten like any spending: over several minutes the limit holds exactly.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from mesh.errors import BadRequest, Busy
from mesh.http.tokens import Quota
from mesh.protocol.usage import Spending, SubjectUsage

__all__ = ["Account", "Accounts", "Used"]

_REMEMBERED = 10_000
"""The number of accounts that are kept. The account that was used least recently is forgotten first."""
_SESSIONS_S = 3.0
"""How long the sessions of another gateway count after it was heard last."""


class _Spent:
    """An amount that is forgotten within a minute: `limit` / 60 each second."""

    def __init__(self, now: float) -> None:
        self.amount = 0.0
        self._at = now

    def forget(self, now: float, limit: int) -> None:
        self.amount = max(self.amount - (now - self._at) * limit / 60, 0.0)
        self._at = now

    def wait_s(self, needed: float, limit: int) -> float:
        """Seconds until `needed` can be spent."""
        return max((self.amount + needed - limit) * 60 / limit, 0.0)


@dataclass(slots=True)
class Used:
    """What a subject has used here since the start of this gateway; the fields are those of SubjectUsage."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    batch_requests: int = 0
    batch_tokens: int = 0
    refused: int = 0


@dataclass(slots=True)
class _News:
    """What other gateways have not been told."""

    requests: int = 0
    tokens: int = 0


class Account:
    """One subject's. `charge` before a generation, `settle` after it."""

    def __init__(self, subject: str, accounts: Accounts) -> None:
        now = accounts.clock()
        self.subject = subject
        self.usage = Used()
        self.requests, self.tokens = _Spent(now), _Spent(now)
        self.running = 0
        self.news = _News()
        self.limits = Quota()  # those that were measured by last
        self._elsewhere: dict[str, tuple[int, float]] = {}  # gateway -> its sessions, and when it was heard
        self._accounts = accounts

    @property
    def total(self) -> Used:
        """The usage of all subjects."""
        return self._accounts.total

    @property
    def sessions(self) -> int:
        """Sessions that run now, at all gateways."""
        now = self._accounts.clock()
        for gateway, (_, heard) in list(self._elsewhere.items()):
            if now - heard > _SESSIONS_S:
                del self._elsewhere[gateway]
        return self.running + sum(count for count, _ in self._elsewhere.values())

    def charge(self, quota: Quota, tokens: int, *, requests: int = 1, prompt: int = 0) -> int:
        """Take `requests` and set aside `tokens` and `prompt` (a guess). Returns the tokens that were set aside, 0 without a limit.

        Busy, with nothing taken: not so many are left now; it says when they are. BadRequest: a minute never has so many.
        """
        now = self._accounts.clock()
        self.limits = quota
        most, most_tokens = quota.requests_per_minute, quota.tokens_per_minute
        if most is not None:
            self.requests.forget(now, most)
            if requests > most:
                raise BadRequest(
                    f"this call counts as {requests:,} requests, and this token may ask {most:,} times a minute: send fewer at once",
                    field="requests",
                )
            if self.requests.amount + requests > most:
                wait_s = self.requests.wait_s(requests, most)
                raise self._refused(f"this token may ask {most} times a minute: try again in {wait_s:.1f} s", wait_s)
        cost = tokens + prompt
        if most_tokens is not None:
            self.tokens.forget(now, most_tokens)
            if tokens > most_tokens:
                raise BadRequest(
                    f"this call may take {tokens:,} tokens, and this token may have {most_tokens:,} a minute: ask for fewer with "
                    "max_tokens, or send fewer requests at once",
                    field="max_tokens",
                )
            cost = min(cost, most_tokens)
            if self.tokens.amount + cost > most_tokens:
                wait_s = self.tokens.wait_s(cost, most_tokens)
                raise self._refused(f"this token may have {most_tokens} tokens a minute: try again in {wait_s:.1f} s", wait_s)
        if most is not None:
            self.requests.amount += requests
            self.news.requests += requests
        if most_tokens is not None:
            self.tokens.amount += cost
            self.news.tokens += cost
        if most is not None or most_tokens is not None:
            self._accounts.tell(self)
        return cost if most_tokens is not None else 0

    def settle(self, quota: Quota, charged: int, used: int) -> None:
        """Correct the charge of a generation: it was charged `charged` tokens and has used `used`, with those of the prompt."""
        if quota.tokens_per_minute is not None and charged != used:
            self.tokens.amount = max(self.tokens.amount + used - charged, 0.0)
            self.news.tokens += used - charged
            self._accounts.tell(self)

    @contextmanager
    def session(self, quota: Quota, count: int) -> Iterator[None]:
        """Run `count` generations within the block. Busy: too many run. BadRequest: the subject may never run so many."""
        self.limits = quota
        most = quota.concurrent_sessions
        if most is not None:
            if count > most:
                raise BadRequest(f"this call is {count} generations at once, and this token may have {most}: ask for fewer", field="n")
            if self.sessions + count > most:
                raise self._refused(f"this token may have {most} generations at once: try again when one has ended", 1.0)
        self.running += count
        if most is not None:
            self._accounts.tell(self)
        try:
            yield
        finally:
            self.running -= count
            if most is not None:
                self._accounts.tell(self)

    def take(self) -> Spending:
        """What the other gateways have not been told yet; it counts as told."""
        news, self.news = self.news, _News()
        limits = self.limits
        return Spending(
            subject=self.subject,
            requests=news.requests,
            tokens=news.tokens,
            requests_per_minute=limits.requests_per_minute,
            tokens_per_minute=limits.tokens_per_minute,
            sessions=self.running,
        )

    def hear(self, gateway: str, said: Spending) -> None:
        """Count what another gateway says."""
        now = self._accounts.clock()
        for spent, limit, amount in (
            (self.requests, said.requests_per_minute, said.requests),
            (self.tokens, said.tokens_per_minute, said.tokens),
        ):
            if limit is not None:
                spent.forget(now, limit)
                spent.amount = max(spent.amount + amount, 0.0)
        if said.sessions:
            self._elsewhere[gateway] = (said.sessions, now)
        else:
            self._elsewhere.pop(gateway, None)

    def _refused(self, message: str, wait_s: float) -> Busy:
        self.usage.refused += 1
        self.total.refused += 1
        return Busy(message, retry_after_s=wait_s)


@dataclass(slots=True)
class Accounts:
    """The accounts of every subject, by name. `changed` is called when there is something to tell other gateways."""

    clock: Callable[[], float] = time.monotonic
    changed: Callable[[], object] = lambda: None
    since_unix_s: float = field(default_factory=time.time)
    total: Used = field(default_factory=Used)
    _accounts: OrderedDict[str, Account] = field(default_factory=OrderedDict)
    _untold: dict[str, Account] = field(default_factory=dict)

    def of(self, subject: str) -> Account:
        """The subject's account; a new one if it has none."""
        found = self._accounts.get(subject)
        if found is None:
            found = self._accounts[subject] = Account(subject, self)
            if len(self._accounts) > _REMEMBERED:
                self._forget_one()
        self._accounts.move_to_end(subject)
        return found

    def tell(self, account: Account) -> None:
        self._untold[account.subject] = account
        self.changed()

    def remind(self) -> None:
        """Tell the sessions that run once more: other gateways forget those that they do not hear of."""
        for account in self._accounts.values():
            if account.running and account.limits.concurrent_sessions is not None:
                self._untold[account.subject] = account

    def news(self, most: int) -> list[Spending]:
        """Of at most `most` subjects what other gateways have not been told; it counts as told."""
        return [self._untold.pop(subject).take() for subject in list(self._untold)[:most]]

    def report(self, subject: str | None = None) -> list[SubjectUsage]:
        """The usage of one subject or of all, those with the most tokens first."""
        found = [account for name, account in self._accounts.items() if subject in (None, name)]
        found = [account for account in found if account.running or account.usage != Used()]
        found.sort(key=lambda each: each.usage.prompt_tokens + each.usage.completion_tokens + each.usage.batch_tokens, reverse=True)
        return [
            SubjectUsage(
                subject=each.subject,
                requests=each.usage.requests,
                prompt_tokens=each.usage.prompt_tokens,
                completion_tokens=each.usage.completion_tokens,
                batch_requests=each.usage.batch_requests,
                batch_tokens=each.usage.batch_tokens,
                refused=each.usage.refused,
                sessions=each.running,
            )
            for each in found
        ]

    def _forget_one(self) -> None:
        for name, account in self._accounts.items():
            if not account.running and name not in self._untold:
                del self._accounts[name]
                return
