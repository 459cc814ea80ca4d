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
    from mesh.local.mesh import LocalMesh, LocalModel, OtherModel

__all__ = ["add_parser", "run_command"]

_DESCRIPTION = """\
Start a NATS server, a coordinator and shards as child processes on this machine, and wait until they serve. Processes that die are
started again; Ctrl-C ends them all. The NATS server asks for a password, which every command of this user finds by itself. Several models
share the NATS server and the machine's memory; then a gateway in a process of its own serves HTTP for all of them."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("up", help="a whole mesh on this machine", description=_DESCRIPTION)
    parser.add_argument("models", metavar="MODEL", nargs="+", type=Path, help=f"{MODEL_HELP}; several are served side by side")
    parser.add_argument(
        "--shards", type=counts, default=(1,), metavar="N[,N]", help="number of layer ranges, of all models or of each (default 1)"
    )
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
    first, *others = _models(args)
    options = LocalOptions(
        model=first.model,
        shards=first.shards,
        others=tuple(others),
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
        for model in mesh.models:
            print(_served(mesh, model, time.perf_counter() - began), file=sys.stderr)
        if args.ask is not None:
            return _ask(mesh, args)
        password = options.password
        user = None if password is None else mesh.bus.user
        with announced(mesh.url, user=user, password=password, settings=mesh.settings) as file:
            if mesh.http_urls:
                taken = args.http_port is None and not mesh.http_urls[0].endswith(f":{DEFAULT_HTTP_PORT}")
                print(_http_lines(mesh, taken=taken), file=sys.stderr)
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
            which = "" if len(mesh.models) == 1 else f" --model {name}"
            print(
                f"NATS {mesh.url}{how}\n"
                f"  mesh generate --nats {mesh.url}{which} 'What is artificial intelligence?'\n"
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


def counts(text: str) -> tuple[int, ...]:
    """Numbers of a flag, such as 3 or 3,1."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


def _models(args: argparse.Namespace) -> list[OtherModel]:
    """Each model, and the number of its layer ranges."""
    from mesh.local.mesh import OtherModel

    models, shards = args.models, args.shards
    if len(shards) not in (1, len(models)):
        raise ConfigError(f"--shards has {len(shards)} numbers for {len(models)} models: give one for all, or one for each")
    each = shards * len(models) if len(shards) == 1 else shards
    return [OtherModel(model_directory(model), count) for model, count in zip(models, each, strict=True)]


def _ask(mesh: LocalMesh, args: argparse.Namespace) -> int:
    """Let each model answer."""
    from mesh.commands.generate import ask

    done = 0
    for model in mesh.models:
        if len(mesh.models) > 1:
            print(f"{model.name}:")
        done = max(done, ask(mesh.bus, model.name, {"prompt": args.ask, "max_tokens": args.max_tokens}, hops=True))
    return done


def _served(mesh: LocalMesh, model: LocalModel, took_s: float) -> str:
    where, count = ", ".join(map(str, model.ranges)), len(model.ranges) * mesh.options.replicas
    said = f"{model.name} is served by {count} shard{'s' if count > 1 else ''} (layers {where}) after {format_seconds(took_s)}"
    return f"{said}\n{_sizes(mesh, model)}"


def _sizes(mesh: LocalMesh, model: LocalModel) -> str:
    """The rows and the context, and what they take."""
    sizing, longest = model.sizing, model.manifest.context_length
    free = f" of {format_bytes(mesh.free_bytes)} that are free" if mesh.free_bytes else ""
    rows = "1 session" if mesh.options.rows == 1 else f"{mesh.options.rows} sessions at once"
    more = "" if sizing.context >= longest else f"; the model could take {longest:,}: --context"
    return f"{rows}, {sizing.context:,} tokens each, in at most {format_bytes(sizing.needed_bytes)}{free}{more}"


def _http_lines(mesh: LocalMesh, *, taken: bool) -> str:
    urls = mesh.http_urls
    model = "" if len(mesh.models) == 1 else f'"model": "{mesh.manifest.name}", '
    said = f"HTTP {', '.join(urls)}, in a browser the dashboard" + (" (port 8080 is taken; choose one with --http-port)" if taken else "")
    data = f'{{{model}"prompt": "What is artificial intelligence?", "max_tokens": 100, "temperature": 0.7}}'
    return f"{said}\n  curl -X POST {urls[0]}/api/v1/inference -H 'Content-Type: application/json' -d '{data}'"
