"""Where a stream of events goes on after its connection was lost: the id of each event, and the header that names the last one.

    NAME.PROGRESS    3f0c...9a.17      of one choice the client has 17 tokens
                     3f0c...9a.17-20e  of the first choice 17; of the second 20, and the text that comes after the last token

NAME is drawn at random for each stream. The sessions and the seeds of the generations follow from it and from the caller's subject. Nobody
guesses the name, and another subject that learns it gets a generation of its own. So any gateway can ask any coordinator for the same
generations, with the same body, and leave out what the client has. A generation that no coordinator remembers is made again, with the
same tokens.
"""

from __future__ import annotations

import hashlib
import re
import secrets

from mesh.client import Chunk
from mesh.errors import BadRequest

__all__ = ["HEADER", "Progress"]

HEADER = "last-event-id"
_NAME_BYTES = 16
_ID = re.compile(r"([0-9a-f]{32})\.([0-9]{1,9}e?(?:-[0-9]{1,9}e?){0,127})")


class Progress:
    """What the client of one stream has. `resumed`: it had a stream before this one."""

    def __init__(self, choices: int, last_id: str | None = None, *, owner: str = "") -> None:
        """`last_id`: the header as it came. `owner`: the subject of the caller; empty where no token is required. BadRequest: it is no
        id of a stream with so many choices."""
        self._owner = owner
        self.resumed = bool(last_id)
        self._name = secrets.token_hex(_NAME_BYTES)
        self._had = [0] * choices  # tokens
        self._had_rest = [False] * choices
        if last_id:
            match = _ID.fullmatch(last_id)
            parts = [] if match is None else match[2].split("-")
            if match is None or len(parts) != choices:
                raise BadRequest(
                    "Last-Event-ID is no id of this stream: send that of its last event, or leave it out", field="Last-Event-ID"
                )
            self._name = match[1]
            self._had = [int(part.rstrip("e")) for part in parts]
            self._had_rest = [part.endswith("e") for part in parts]
        self._has, self._has_rest = list(self._had), list(self._had_rest)

    @property
    def id(self) -> str:
        """Of an event after which the client has everything that was taken so far."""
        parts = [f"{tokens}e" if rest else str(tokens) for tokens, rest in zip(self._has, self._has_rest, strict=True)]
        return f"{self._name}.{'-'.join(parts)}"

    def had(self, choice: int) -> int:
        """Tokens of a choice that the client had when it asked."""
        return self._had[choice]

    def session(self, choice: int) -> str:
        """The name of a choice's generation in the mesh."""
        name = self._name if not self._owner else hashlib.sha256(f"{self._name}.{self._owner}".encode()).hexdigest()[:32]
        return f"{name}-{choice}"

    def seed(self, choice: int) -> int:
        """Where the request has none: from 0 to 2**62."""
        return int.from_bytes(hashlib.sha256(self.session(choice).encode()).digest()[:8], "big") >> 2

    def has(self, choice: int, chunk: Chunk) -> bool:
        """Whether the client had the chunk when it asked."""
        return self._had_rest[choice] if chunk.token is None else chunk.index < self._had[choice]

    def take(self, choice: int, chunk: Chunk) -> None:
        """The chunk is sent now."""
        if chunk.token is None:
            self._has_rest[choice] = True
        else:
            self._has[choice] = max(self._has[choice], chunk.index + 1)
