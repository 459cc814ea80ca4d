"""Print the Secrets of deploy/kubernetes: certificates, a NATS user for each role, the servers' configuration, a secret of tokens.

    python deploy/kubernetes/make_secrets.py --folder keys --host llm.example.org | kubectl apply -f -

The folder keeps the authority and the keys: run it again with the same folder, and the same Secrets are printed. Keep it off the cluster.
"""

from __future__ import annotations

import argparse
import secrets
import sys
from pathlib import Path
from typing import Any, Final

import yaml

from mesh.pki.certificates import Kind
from mesh.pki.folder import PkiFolder
from mesh.pki.private import write_file
from mesh.pki.server import Cluster, ServerOptions, TlsFiles, server_config
from mesh.pki.users import UserFolder
from mesh.protocol.roles import ROLES

NAMESPACE: Final = "mesh"
OWN: Final = Path("/keys/own")
SERVERS: Final = tuple(f"mesh-nats-{number}.mesh-nats" for number in range(3))
DAYS: Final = 365
CLIENTS: Final = ("coordinator", "shard", "provisioner", "monitor")


def hosts() -> list[str]:
    """The names by which processes and the other servers reach a server, and a forwarded port."""
    services = ["mesh-nats", "mesh-nats-client"]
    names = [*SERVERS, *services, *(f"{name}.{NAMESPACE}.svc" for name in (*SERVERS, *services))]
    return [*names, "localhost", "127.0.0.1"]


def make_folder(folder: Path, edge: list[str]) -> tuple[PkiFolder, UserFolder]:
    """The keys in `folder`, made if they are not there."""
    pki, users = PkiFolder(folder / "pki"), UserFolder(folder / "users")
    if not pki.ca.exists():
        pki.init(name=NAMESPACE)
    wanted: dict[str, tuple[Kind, list[str]]] = {
        "nats": ("both", hosts()),
        "edge": ("server", edge),
        **{name: ("client", []) for name in CLIENTS},
    }
    for name, (kind, names) in wanted.items():
        if not pki.certificate(name).exists():
            pki.issue(name, kind=kind, hosts=names, days=DAYS)
    there = {user.name for user in users.users()}
    for role in ROLES:
        if role not in there:
            users.add(role, role)
    if not (folder / "token-secret").exists():
        write_file(folder / "token-secret", secrets.token_hex(32).encode() + b"\n", secret=True)
    return pki, users


def nats_config(users: UserFolder) -> str:
    routes = tuple(f"nats://{server}:6222" for server in SERVERS)
    options = ServerOptions(
        host="0.0.0.0",
        tls=TlsFiles(OWN / "tls.crt", OWN / "tls.key", OWN / "ca.crt"),
        store="/var/lib/mesh/jetstream",
        max_file="40GB",
        sync_interval="10s",
        cluster=Cluster("mesh", "0.0.0.0:6222", routes),
    )
    return server_config(options, users.users())


def documents(folder: Path, edge: list[str]) -> list[dict[str, Any]]:
    """The Secrets."""
    pki, users = make_folder(folder, edge)
    token = (folder / "token-secret").read_text()

    def certificate(name: str) -> dict[str, str]:
        files = {"ca.crt": pki.ca, "tls.crt": pki.certificate(name), "tls.key": pki.key(name)}
        return {key: path.read_text() for key, path in files.items()}

    def process(name: str) -> dict[str, str]:
        return certificate(name) | {"user.nk": users.seed(name).read_text()}

    return [
        _secret("mesh-nats", certificate("nats") | {"nats.conf": nats_config(users)}),
        _secret("mesh-edge", certificate("edge")),
        _secret("mesh-coordinator", process("coordinator") | {"token-secret": token}),
        _secret("mesh-shard", process("shard")),
    ]


def _secret(name: str, data: dict[str, str]) -> dict[str, Any]:
    metadata = {"name": name, "namespace": NAMESPACE, "labels": {"app.kubernetes.io/part-of": "mesh"}}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "Opaque", "stringData": data}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("keys"), help="of the authority and the keys (default ./keys)")
    parser.add_argument("--host", action="append", required=True, help="a name or address of the load balancer; repeatable")
    args = parser.parse_args()
    yaml.safe_dump_all(documents(args.folder, args.host), sys.stdout, sort_keys=False)


if __name__ == "__main__":
    main()
