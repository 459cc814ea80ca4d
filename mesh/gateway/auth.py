"""Which requests a bearer token permits, and how much: each subject has a quota, which all gateways count together (accounts.py).

Tokens are checked before a body is read.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from mesh.errors import BadRequest, Denied
from mesh.gateway.accounts import Account, Accounts
from mesh.gateway.settings import Limits
from mesh.http.tokens import Checks, Claims, Quota

__all__ = ["ANYONE", "Caller", "Gate", "NotAuthenticated"]

ANYONE = "anyone"
"""The subject of every caller where no token is required."""


class NotAuthenticated(Denied):
    """The request has no token, or the token is not valid: status 401. Any other Denied has status 403."""

    code = "not_authenticated"


class Caller:
    """The sender of a request. Call `charge` before a generation and `settle` after it."""

    def __init__(self, claims: Claims | None, account: Account, quota: Quota) -> None:
        self.claims = claims
        self.quota = quota
        self._account = account

    @property
    def name(self) -> str:
        return self._account.subject

    @property
    def owner(self) -> str:
        """The subject that owns what this caller begins; empty where no token is required."""
        return "" if self.claims is None else self.claims.subject

    @property
    def cache_salt(self) -> str | None:
        """What keeps the prompts of this caller apart from those of others where rows are reused (docs/prefix-reuse.md). None: no token is
        required, and all callers are one."""
        return hashlib.sha256(self.owner.encode()).hexdigest()[:32] if self.claims is not None else None

    def may(self, scope: str) -> bool:
        return self.claims is None or self.claims.allows(scope)

    def charge(self, tokens: int, *, requests: int = 1, prompt: int = 0) -> int:
        """Take `requests` and set aside what a call may cost, before it begins: `tokens`, and `prompt` tokens as far as they can be
        guessed. Returns what was set aside.

        Busy, with nothing taken: not so many are left now; it says when they are. BadRequest: a minute never has so many.
        """
        return self._account.charge(self.quota, tokens, requests=requests, prompt=prompt)

    def settle(self, charged: int, used: int) -> None:
        """Correct the charge of a generation: it was charged `charged` tokens and has used `used`, with those of the prompt."""
        self._account.settle(self.quota, charged, used)

    def session(self, count: int = 1) -> AbstractContextManager[None]:
        """Run `count` generations within the block. Busy: too many of this caller run. BadRequest: it may never run so many."""
        return self._account.session(self.quota, count)

    def check_batch(self, requests: int) -> None:
        """BadRequest: the caller may not send a batch of so many requests."""
        most = self.quota.requests_per_batch
        if most is not None and requests > most:
            raise BadRequest(
                f"requests has {requests:,} entries, and this token may have {most:,} in a batch: send fewer at once", field="requests"
            )

    def used(self, requests: int, prompt_tokens: int, completion_tokens: int) -> None:
        """Count generations that have ended, and their tokens, as used."""
        for usage in (self._account.usage, self._account.total):
            usage.requests += requests
            usage.prompt_tokens += prompt_tokens
            usage.completion_tokens += completion_tokens

    def used_batch(self, requests: int, tokens: int) -> None:
        """Count a batch that is kept, and the tokens that were set aside for it."""
        for usage in (self._account.usage, self._account.total):
            usage.batch_requests += requests
            usage.batch_tokens += tokens


class Gate:
    """Checks callers. Without a verifier, every caller may do everything."""

    def __init__(
        self,
        verifier: Checks | None,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
        *,
        accounts: Accounts | None = None,
    ) -> None:
        self._verifier = verifier
        self._limits = limits
        self.accounts = Accounts(clock) if accounts is None else accounts

    @property
    def open(self) -> bool:
        return self._verifier is None

    def admit(self, authorization: str | None, scope: str) -> Caller:
        """The caller behind an Authorization header. An empty scope: any valid token suffices. NotAuthenticated: no valid token. Denied:
        the token lacks the scope."""
        if self._verifier is None:
            return self._anyone()
        claims = self._identify(self._verifier, authorization)
        if scope and not claims.allows(scope):
            raise Denied(f"this token may not do this: it needs the scope {scope}, and has {' '.join(sorted(claims.scopes)) or 'none'}")
        return self._caller(claims)

    def identify(self, authorization: str | None) -> Caller | None:
        """The caller behind an Authorization header. None: there is no valid token."""
        if self._verifier is None:
            return self._anyone()
        try:
            return self._caller(self._identify(self._verifier, authorization))
        except Denied:
            return None

    def _anyone(self) -> Caller:
        return Caller(None, self.accounts.of(ANYONE), Quota())

    def _caller(self, claims: Claims) -> Caller:
        """The token's own limits hold, then those of its subject, then those of every token."""
        of_subject = self._limits.subjects.get(claims.subject, Quota())
        return Caller(claims, self.accounts.of(claims.subject), claims.quota.over(of_subject).over(self._limits.quota))

    def _identify(self, verifier: Checks, authorization: str | None) -> Claims:
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise NotAuthenticated(
                "a token is needed: send it as `Authorization: Bearer TOKEN` or `x-api-key: TOKEN` (see `mesh token issue`)"
            )
        try:
            return verifier.verify(token.strip())
        except Denied as error:
            raise NotAuthenticated(str(error)) from None
