"""Which requests a bearer token permits, and how often: each token has token buckets of its own.

Tokens are checked before a body is read. Each gateway keeps the limits for itself: behind a load balancer, a token has them at each
gateway.
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
"""The number of tokens whose buckets are kept. A forgotten token has full buckets again, but only after this many other tokens came."""


class NotAuthenticated(Denied):
    """The request has no token, or the token is not valid: status 401. Any other Denied has status 403."""

    code = "not_authenticated"


class _Bucket:
    """A token bucket: `level` of `size`, refilled within a minute. A negative level is a debt, which the refill pays first. A call
    leaves one if it used more than was set aside for it, because its prompt was longer than it looked."""

    def __init__(self, size: int, now: float) -> None:
        self.size = size
        self.level = float(size)
        self._at = now

    def refill(self, now: float) -> None:
        self.level = min(self.size, self.level + (now - self._at) * self.size / 60)
        self._at = now

    def wait_s(self, needed: float) -> float:
        """Seconds until the bucket holds `needed`."""
        return max((needed - self.level) * 60 / self.size, 0.0)


@dataclass(slots=True)
class _Buckets:
    requests: _Bucket | None
    tokens: _Bucket | None


class Caller:
    """The sender of a request. Call `charge` before a generation and `settle` after it."""

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
        """Correct the charge of a generation: it was charged `charged` tokens and has used `used`, with those of the prompt."""
        if self._buckets is not None and self._buckets.tokens is not None:
            self._buckets.tokens.level += charged - used


class Gate:
    """Checks callers. Without a verifier, every caller may do everything."""

    def __init__(self, verifier: Verifier | None, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._verifier = verifier
        self._limits = limits
        self._clock = clock
        self._buckets: OrderedDict[str, _Buckets] = OrderedDict()

    @property
    def open(self) -> bool:
        return self._verifier is None

    def admit(self, authorization: str | None, scope: str) -> Caller:
        """The caller behind an Authorization header. NotAuthenticated: no valid token. Denied: the token lacks the scope."""
        if self._verifier is None:
            return Caller(None, None, self._clock)
        claims = self._identify(self._verifier, authorization)
        if not claims.allows(scope):
            raise Denied(f"this token may not do this: it needs the scope {scope}, and has {' '.join(sorted(claims.scopes)) or 'none'}")
        return Caller(claims, self._buckets_of(claims), self._clock)

    def identify(self, authorization: str | None) -> Caller | None:
        """The caller behind an Authorization header. None: there is no valid token."""
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
