"""Which NATS a command talks to: the flags that every such command has."""

from __future__ import annotations

import argparse
import os

from mesh.bus import BusOptions

__all__ = ["add_connection_arguments", "bus_options"]

_DEFAULT = "nats://127.0.0.1:4222"


def add_connection_arguments(parser: argparse.ArgumentParser) -> None:
    """--nats and what a server may ask for."""
    group = parser.add_argument_group("connection")
    group.add_argument("--nats", metavar="URL,...", help=f"NATS servers (default: $MESH_NATS_URLS, or {_DEFAULT})")
    group.add_argument("--creds", metavar="FILE", help="credentials file of a NATS user (.creds)")
    group.add_argument("--tls-ca", metavar="FILE", help="PEM file of the authority that signed the server's certificate")
    group.add_argument("--tls-cert", metavar="FILE", help="certificate to show to the server, with --tls-key")
    group.add_argument("--tls-key", metavar="FILE")


def bus_options(args: argparse.Namespace) -> BusOptions:
    """What the flags say, or the environment."""
    urls = args.nats or os.environ.get("MESH_NATS_URLS") or _DEFAULT
    return BusOptions(
        urls=tuple(url.strip() if "://" in url else f"nats://{url.strip()}" for url in urls.split(",") if url.strip()),
        credentials=args.creds,
        tls_ca=args.tls_ca,
        tls_cert=args.tls_cert,
        tls_key=args.tls_key,
    )
