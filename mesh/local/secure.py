"""What a secure mesh on this machine needs: an authority, certificates, a user for each process, and the server's configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mesh.bus import BusOptions
from mesh.pki.folder import PkiFolder
from mesh.pki.server import ServerOptions, TlsFiles, server_config
from mesh.pki.users import UserFolder

__all__ = ["OPERATOR", "SecureSite"]

OPERATOR = "operator"
_HOSTS = ("127.0.0.1", "localhost")
_DAYS = 3650  # the folder lives as long as its mesh


class SecureSite:
    """The files, in `folder`. `config`: of the server. `pki`, `users`: certificates and users; a user's certificate has its name, and a
    shard's user is bound to its name."""

    def __init__(self, folder: Path, *, shards: Sequence[str], coordinators: Sequence[str], gateways: Sequence[str] = ()) -> None:
        self.pki, self.users = PkiFolder(folder / "pki"), UserFolder(folder / "users")
        self.pki.init(name="mesh up")
        self.pki.issue("server", kind="server", hosts=_HOSTS, days=_DAYS)
        self.users.add(OPERATOR, "operator")
        self.users.add("system", "system")
        for name in coordinators:
            self.users.add(name, "coordinator")
        for name in gateways:
            self.users.add(name, "gateway")
        for name in shards:
            self.users.add(name, "shard", shard=name)
        for user in self.users.users():
            self.pki.issue(user.name, kind="client", days=_DAYS)
        tls = TlsFiles(self.pki.certificate("server"), self.pki.key("server"), self.pki.ca)
        self.config = folder / "nats.conf"
        self.config.write_text(server_config(ServerOptions(tls=tls), self.users.users()))

    def bus(self, name: str, url: str) -> BusOptions:
        """How the process of this name connects to the server at `url`."""
        user = next(user for user in self.users.users() if user.name == name)
        return BusOptions(
            (url,),
            nkey_seed=str(self.users.seed(name)),
            tls_ca=str(self.pki.ca),
            tls_cert=str(self.pki.certificate(name)),
            tls_key=str(self.pki.key(name)),
            inbox_prefix=user.inbox,
        )
