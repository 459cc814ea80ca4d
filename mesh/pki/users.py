"""Users of NATS: each has a role, an nkey (a key pair, whose public half the server knows) and an inbox prefix of its own.

users.json    names, roles and public keys: what a server's configuration is made from; no secret
NAME.nk       the seed of a user, which only its owner reads; give it to that process alone
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import nkeys
import orjson

from mesh.errors import BadRequest, ConfigError
from mesh.pki.private import private_folder, write_file
from mesh.protocol.rights import Binding, Rights, inbox_prefix, rights_of
from mesh.protocol.roles import ROLES, Role
from mesh.protocol.subjects import check_token
from mesh.types import LayerRange

__all__ = ["User", "UserFolder"]


@dataclass(frozen=True, slots=True)
class User:
    """`shard`, `layers`, `mirror`: of a shard's user that is bound to its name, and to a range. `public`: its nkey."""

    name: str
    role: Role
    public: str
    shard: str | None = None
    layers: LayerRange | None = None
    mirror: bool = False

    @property
    def inbox(self) -> str:
        return inbox_prefix(self.name)

    @property
    def rights(self) -> Rights:
        return rights_of(self.role, Binding(self.inbox, self.shard, self.layers, self.mirror))


class UserFolder:
    """The users in the folder at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def file(self) -> Path:
        return self.path / "users.json"

    def seed(self, name: str) -> Path:
        return self.path / f"{name}.nk"

    def users(self) -> list[User]:
        """All of them; none where the folder is new. ConfigError: the file is damaged."""
        try:
            said = orjson.loads(self.file.read_bytes())
            return [_user(each) for each in said["users"]]
        except FileNotFoundError:
            return []
        except (OSError, orjson.JSONDecodeError, LookupError, TypeError, ValueError) as error:
            raise ConfigError(f"{self.file}: not a list of users as `mesh nats users` writes it ({error})") from None

    def add(
        self,
        name: str,
        role: Role,
        *,
        shard: str | None = None,
        layers: LayerRange | None = None,
        mirror: bool = False,
        replace: bool = False,
    ) -> User:
        """A new user with a new seed. ConfigError: there is one of this name, and it is not to be replaced. BadRequest: it cannot be."""
        check_token(name, "name")
        if role not in ROLES:
            raise BadRequest(f"role {role!r} is none of {', '.join(ROLES)}", field="role")
        if role != "shard" and (shard is not None or layers is not None or mirror):
            raise BadRequest(f"a {role} has no name of a shard and no layers", field="role")
        if layers is not None and shard is None:
            raise BadRequest("layers are of one shard: give its name as well", field="layers")
        users = self.users()
        if any(user.name == name for user in users) and not replace:
            raise ConfigError(f"the user {name} is there already: nothing was written. Give --replace for a new key")
        private_folder(self.path)
        seed = bytes(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER))
        public = nkeys.from_seed(bytearray(seed)).public_key.decode()
        made = User(name, role, public, None if shard is None else check_token(shard, "shard"), layers, mirror)
        write_file(self.seed(name), seed + b"\n", secret=True)
        kept = [user for user in users if user.name != name]
        write_file(self.file, orjson.dumps({"users": [_document(user) for user in (*kept, made)]}, option=orjson.OPT_INDENT_2), secret=True)
        return made


def _document(user: User) -> dict[str, object]:
    layers = None if user.layers is None else str(user.layers)
    return {"name": user.name, "role": user.role, "public": user.public, "shard": user.shard, "layers": layers, "mirror": user.mirror}


def _user(said: dict[str, object]) -> User:
    role, layers, shard = str(said["role"]), said.get("layers"), said.get("shard")
    if role not in ROLES:
        raise ValueError(f"{role} is no role")
    public = str(said["public"])
    if not (public.startswith("U") and public.isalnum()):
        raise ValueError("a key is not a user's")
    return User(
        check_token(str(said["name"]), "name"),
        role,
        public,
        None if shard is None else check_token(str(shard), "shard"),
        None if layers is None else LayerRange(*map(int, str(layers).split("-"))),
        bool(said.get("mirror")),
    )
