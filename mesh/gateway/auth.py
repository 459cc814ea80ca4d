"""Who may ask for what, and how often: bearer tokens at the edge, each with buckets of its own.

Checked before a body is read. Limits are kept by each gateway for itself: behind a load balancer a token has them at each.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from mesh.errors import BadRequest, Busy, Denied
from mesh.gateway.settings import Limits
from mesh.http.tokens import Claims, Verifier

__all__ = ["Caller", "Gate", "NotAuthenticated"]

_REMEMBERED = 10_000
"""Tokens whose buckets are kept; of one that was forgotten they are full again, which takes that many others."""


class NotAuthenticated(Denied):
    """There is no token, or it is not one of ours: 401, where Denied alone is 403."""

    code = "not_authenticated"


class _Bucket:
    """`level` of `size`, refilled within a minute. Below nothing is debt, which the refill pays first: a call that used more than was set
    aside for it, because its prompt was longer than it looked, leaves some."""

    def __init__(self, size: int, now: float) -> None:
        self.size = size
        self.level = float(size)
        self._at = now

    def refill(self, now: float) -> None:
        self.level = min(self.size, self.level + (now - self._at) * self.size / 60)
        self._at = now

    def wait_s(self, needed: float) -> float:
        """Seconds until `needed` are there."""
        return max((needed - self.level) * 60 / self.size, 0.0)


@dataclass(slots=True)
class _Buckets:
    requests: _Bucket | None
    tokens: _Bucket | None


class Caller:
    """Who asks. `charge` before a generation, `settle` after it."""

    def __init__(self, claims: Claims | None, buckets: _Buckets | None, clock: Callable[[], float]) -> None:
        self.claims = claims
        self._buckets = buckets
        self._clock = clock

    @property
    def name(self) -> str:
        return "anyone" if self.claims is None else self.claims.subject

    def may(self, scope: str) -> bool:
        return self.claims is None or self.claims.allows(scope)

    def charge(self, tokens: int, *, requests: int = 1, prompt: int = 0) -> int:
        """Take `requests` and set aside what a call may cost, before it begins: `tokens`, and `prompt` tokens as far as they can be
        guessed. Returns what was set aside.

        Busy, with nothing taken: not so many are left now; it says when they are. BadRequest: a minute never has so many.
        """
        if self._buckets is None:
            return 0
        now = self._clock()
        asked, given = self._buckets.requests, self._buckets.tokens
        if asked is not None:
            asked.refill(now)
            if requests > asked.size:
                raise BadRequest(
                    f"this call counts as {requests:,} requests, and this token may ask {asked.size:,} times a minute: send fewer at once",
                    field="requests",
                )
            if asked.level < requests:
                wait_s = asked.wait_s(requests)
                raise Busy(f"this token may ask {asked.size} times a minute: try again in {wait_s:.1f} s", retry_after_s=wait_s)
        cost = tokens + prompt
        if given is not None:
            given.refill(now)
            if tokens > given.size:
                raise BadRequest(
                    f"this call may take {tokens:,} tokens, and this token may have {given.size:,} a minute: ask for fewer with "
                    "max_tokens, or send fewer requests at once",
                    field="max_tokens",
                )
            cost = min(cost, given.size)
            if given.level < cost:
                wait_s = given.wait_s(cost)
                raise Busy(f"this token may have {given.size} tokens a minute: try again in {wait_s:.1f} s", retry_after_s=wait_s)
        if asked is not None:
            asked.level -= requests
        if given is not None:
            given.level -= cost
        return cost

    def settle(self, charged: int, used: int) -> None:
        """A generation that was charged `charged` tokens has used `used`, those of the prompt included."""
        if self._buckets is not None and self._buckets.tokens is not None:
            self._buckets.tokens.level += charged - used


class Gate:
    """Lets callers in. Without a verifier everyone may do everything."""

    def __init__(self, verifier: Verifier | None, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._verifier = verifier
        self._limits = limits
        self._clock = clock
        self._buckets: OrderedDict[str, _Buckets] = OrderedDict()

    @property
    def open(self) -> bool:
        return self._verifier is None

    def admit(self, authorization: str | None, scope: str) -> Caller:
        """The caller behind an Authorization header. NotAuthenticated: no valid token. Denied: it has not the scope."""
        if self._verifier is None:
            return Caller(None, None, self._clock)
        claims = self._identify(self._verifier, authorization)
        if not claims.allows(scope):
            raise Denied(f"this token may not do this: it needs the scope {scope}, and has {' '.join(sorted(claims.scopes)) or 'none'}")
        return Caller(claims, self._buckets_of(claims), self._clock)

    def identify(self, authorization: str | None) -> Caller | None:
        """Who it is, None for nobody we know."""
        if self._verifier is None:
            return Caller(None, None, self._clock)
        try:
            return Caller(self._identify(self._verifier, authorization), None, self._clock)
        except Denied:
            return None

    def _identify(self, verifier: Verifier, authorization: str | None) -> Claims:
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise NotAuthenticated("a token is needed: send the header `Authorization: Bearer TOKEN` (see `mesh token issue`)")
        try:
            return verifier.verify(token.strip())
        except Denied as error:
            raise NotAuthenticated(str(error)) from None

    def _buckets_of(self, claims: Claims) -> _Buckets | None:
        requests = claims.requests_per_minute or self._limits.requests_per_minute
        tokens = claims.tokens_per_minute or self._limits.tokens_per_minute
        if requests is None and tokens is None:
            return None
        found = self._buckets.get(claims.id)
        if found is None:
            now = self._clock()
            found = _Buckets(
                None if requests is None else _Bucket(requests, now),
                None if tokens is None else _Bucket(tokens, now),
            )
            self._buckets[claims.id] = found
            while len(self._buckets) > _REMEMBERED:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(claims.id)
        return found
