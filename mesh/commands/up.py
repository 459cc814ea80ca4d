"""`mesh up`: a whole mesh on this machine."""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesh.commands.connection import add_connection_arguments, bus_options
from mesh.commands.progress import progress_bar
from mesh.commands.sources import MODEL_HELP, model_directory
from mesh.errors import ConfigError
from mesh.settings.defaults import DEFAULT_HTTP_PORT, DEFAULT_ROWS
from mesh.settings.units import format_bytes, format_seconds, parse_bytes

if TYPE_CHECKING:
    from mesh.local.mesh import LocalMesh

__all__ = ["add_parser", "run_command"]

_DESCRIPTION = """\
Start a NATS server, a coordinator and shards as child processes on this machine, and wait until they serve. Processes that die are
started again; Ctrl-C ends them all. The NATS server asks for a password, which every command of this user finds by itself."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("up", help="a whole mesh on this machine", description=_DESCRIPTION)
    parser.add_argument("model", metavar="MODEL", type=Path, help=MODEL_HELP)
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="number of layer ranges (default 1)")
    parser.add_argument("--replicas", type=int, default=1, metavar="R", help="shards of each range (default 1)")
    parser.add_argument(
        "--mode",
        choices=("balance", "mirror"),
        default="balance",
        help="whether replicas share sessions, or mirror each other (default balance)",
    )
    parser.add_argument("--coordinators", type=int, default=1, metavar="N", help="number of coordinators (default 1)")
    parser.add_argument("--port", type=int, metavar="PORT", help="port of the NATS server (default: a free one)")
    parser.add_argument("--http-port", type=int, metavar="PORT", help="port of HTTP (default: 8080, or a free one)")
    parser.add_argument("--no-http", action="store_true", help="serve only over NATS, without HTTP")
    parser.add_argument(
        "--rows", type=int, default=DEFAULT_ROWS, metavar="N", help=f"sessions at once in each shard (default {DEFAULT_ROWS})"
    )
    parser.add_argument(
        "--context", type=int, metavar="TOKENS", help="positions a session may have (default: the model's, or fewer on a small machine)"
    )
    parser.add_argument("--memory", metavar="SIZE", help="the most memory of each shard, such as 8GB (default: its share of what is free)")
    parser.add_argument("--queue", type=int, default=256, metavar="N", help="requests that may wait for a row (default 256)")
    parser.add_argument(
        "--strategy", choices=("least_loaded", "round_robin", "queue_group"), default="least_loaded", help="which replica serves a session"
    )
    parser.add_argument(
        "--prefix-reuse",
        choices=("off", "tenant", "all"),
        default="tenant",
        help="which sessions may begin with the rows that earlier ones have left: none, those of the same caller, any (default tenant)",
    )
    parser.add_argument("--compression", action="store_true", help="send hidden states compressed (exact)")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="folder for the processes' logs")
    parser.add_argument("--ask", metavar="PROMPT", help="answer this prompt, show where the time went, and stop")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="most tokens of the answer to --ask (default 128)")
    parser.add_argument(
        "--secure",
        action="store_true",
        help="TLS, and for each process a user with a key of its own and no more rights than it needs (docs/security.md)",
    )
    add_connection_arguments(parser, nats="use these NATS servers (with JetStream) instead of starting one")
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    from mesh.host.signals import ignore_signals, interrupt_on_signals
    from mesh.local.mesh import LocalMesh, LocalOptions
    from mesh.local.running import announced
    from mesh.protocol import topics

    if args.secure and args.nats:
        raise ConfigError("--secure is of the server that `mesh up` starts: for servers of your own see `mesh nats --help`")
    options = LocalOptions(
        model=model_directory(args.model),
        shards=args.shards,
        replicas=args.replicas,
        mode=args.mode,
        coordinators=args.coordinators,
        nats=args.nats,
        bus=bus_options(args) if args.nats else None,
        port=args.port,
        secure=args.secure,
        password=None
        if args.nats or args.secure
        else f"m{secrets.token_hex(24)}",  # a letter first: to nats-server, digits would be a number
        http=not args.no_http,
        http_port=args.http_port,
        rows=args.rows,
        context=args.context,
        memory_bytes=None if args.memory is None else parse_bytes(args.memory),
        strategy=args.strategy,
        prefix_reuse=args.prefix_reuse,
        compression=args.compression,
        logs=args.logs,
        coordinator_arguments=("--queue", str(args.queue)),
    )
    mesh = LocalMesh(options, say=lambda line: print(line, file=sys.stderr, flush=True))

    interrupt_on_signals()
    began = time.perf_counter()
    try:
        with progress_bar() as progress:
            mesh.start(progress=progress)
        name = mesh.manifest.name
        where = ", ".join(str(layers) for layers in mesh.ranges)
        print(
            f"{name} is served by {mesh.shard_count} shard{'s' if mesh.shard_count > 1 else ''} (layers {where}) after "
            f"{format_seconds(time.perf_counter() - began)}\n{_sizes(mesh)}",
            file=sys.stderr,
        )
        if args.ask is not None:
            from mesh.commands.generate import ask

            return ask(mesh.bus, name, {"prompt": args.ask, "max_tokens": args.max_tokens}, hops=True)
        password = options.password
        user = None if password is None else mesh.bus.user
        with announced(mesh.url, user=user, password=password, settings=mesh.settings) as file:
            if mesh.http_urls:
                taken = args.http_port is None and not mesh.http_urls[0].endswith(f":{DEFAULT_HTTP_PORT}")
                print(_http_lines(mesh.http_urls, taken=taken), file=sys.stderr)
            if mesh.metrics_urls:
                print(f"metrics {', '.join(f'{url} ({name})' for name, url in mesh.metrics_urls.items())}", file=sys.stderr)
            if (password is not None or mesh.settings) and file is None:
                print(
                    "mesh: the file with the way in cannot be written: commands do not find this mesh; set XDG_RUNTIME_DIR", file=sys.stderr
                )
            bus, who, how, flags = mesh.bus, "", "", ""
            if mesh.settings:
                how = f", TLS, user operator, key in {bus.nkey_seed}"
                files = f"--nkey {bus.nkey_seed} --tlsca {bus.tls_ca} --tlscert {bus.tls_cert} --tlskey {bus.tls_key}"
                flags = f" {files} --inbox-prefix {bus.inbox_prefix}"
            elif file is not None:
                who, how = f'NATS_USER={bus.user} NATS_PASSWORD="$(cat {file})" ', f", user {bus.user}, password in {file}"
            print(
                f"NATS {mesh.url}{how}\n"
                f"  mesh generate --nats {mesh.url} 'What is artificial intelligence?'\n"
                f'  {who}nats -s {mesh.url}{flags} req {topics.GENERATE.at(name)} \'{{"prompt": "What is rain?", "max_tokens": 20}}\'\n'
                "Ctrl-C ends it.",
                file=sys.stderr,
            )
            mesh.supervise()
    except KeyboardInterrupt:
        print("stopping", file=sys.stderr)
        return 130
    finally:
        ignore_signals()  # a second Ctrl-C does not interrupt the end; after a SIGKILL the kernel ends the children
        mesh.stop()
    return 0


def _sizes(mesh: LocalMesh) -> str:
    """The rows and the context, and what they take."""
    sizing, longest = mesh.sizing, mesh.manifest.context_length
    free = f" of {format_bytes(mesh.free_bytes)} that are free" if mesh.free_bytes else ""
    rows = "1 session" if mesh.options.rows == 1 else f"{mesh.options.rows} sessions at once"
    more = "" if sizing.context >= longest else f"; the model could take {longest:,}: --context"
    return f"{rows}, {sizing.context:,} tokens each, in at most {format_bytes(sizing.needed_bytes)}{free}{more}"


def _http_lines(urls: tuple[str, ...], *, taken: bool) -> str:
    said = f"HTTP {', '.join(urls)}, in a browser the dashboard" + (" (port 8080 is taken; choose one with --http-port)" if taken else "")
    data = '{"prompt": "What is artificial intelligence?", "max_tokens": 100, "temperature": 0.7}'
    return f"{said}\n  curl -X POST {urls[0]}/api/v1/inference -H 'Content-Type: application/json' -d '{data}'"
