"""`mesh trace`: where the time of a request went."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

import orjson
from rich.console import Console

from mesh.client import AsyncMeshClient
from mesh.commands.connection import bus_options
from mesh.commands.generate import add_mesh_arguments
from mesh.errors import BadRequest, ConfigError, Unavailable
from mesh.protocol.generation import without_prefix
from mesh.protocol.spans import Span
from mesh.protocol.status import SessionReport
from mesh.protocol.subjects import is_token
from mesh.telemetry.views.bound import bound
from mesh.telemetry.views.document import looked_at, spans_of
from mesh.telemetry.views.skew import aligned
from mesh.telemetry.views.waterfall import clocks, draw, headline, rows

__all__ = ["add_parser", "exported", "run_command", "show"]

_DESCRIPTION = """\
Show a request as a waterfall: each step, its way through the shards, and one line that says what bounds the request. Without an ID it is
the last request that ended. Coordinators keep the last requests, and those that failed or were slow for longer."""
_FORMATS: Final = ("otlp-json", "perfetto")
_PLAIN_WIDTH: Final = 120
Kind = Literal["last", "slow", "failed"]


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("trace", help="where the time of a request went", description=_DESCRIPTION)
    parser.add_argument(
        "id", nargs="?", metavar="ID", help="the id of an answer, as clients see it; or a session, or a trace id of 32 hex digits"
    )
    which = parser.add_mutually_exclusive_group()
    for kind, help in (
        ("last", "the last request that ended (default)"),
        ("slow", "the slowest request that is kept"),
        ("failed", "the last request that failed"),
    ):
        which.add_argument(f"--{kind}", dest="kind", action="store_const", const=kind, help=help)
    parser.add_argument("--all", action="store_true", help="every step with its parts, not only the first of a series")
    parser.add_argument(
        "--export", nargs=2, metavar=("FORMAT", "FILE"), help="write the trace to FILE instead; FORMAT is otlp-json or perfetto"
    )
    parser.add_argument("--json", action="store_true", help="print the trace as one object: report, sums of each route, spans")
    add_mesh_arguments(parser)
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    if args.id is not None and args.kind is not None:
        raise BadRequest(f"give either an ID or --{args.kind}", field="id")
    if args.export is not None and args.export[0] not in _FORMATS:
        raise BadRequest(f"--export {args.export[0]}: the formats are {' and '.join(_FORMATS)}", field="export")

    async def work() -> dict[str, Any]:
        async with AsyncMeshClient(options=bus_options(args), model=args.model) as client:
            return await (_last(client, args.kind or "last", args.model) if args.id is None else _named(client, args.id))

    document = asyncio.run(work())
    if args.export is not None:
        _write(document, *args.export)
    elif args.json:
        sys.stdout.buffer.write(orjson.dumps(looked_at(document)) + b"\n")
    else:
        console = Console(highlight=False)
        show(document, console if console.is_terminal else Console(highlight=False, width=_PLAIN_WIDTH), fold=not args.all)
    return 0


def show(document: dict[str, Any], console: Console, *, fold: bool) -> None:
    """Print a trace document as a waterfall."""
    found = aligned(spans_of(document))
    console.print(headline(document))
    console.print(bound(document, found.spans).sentence(), style="bold")
    if document.get("error"):
        console.print(document["error"], style="red")
    for line in clocks(found.spans, found):
        console.print(line, style="yellow")
    console.print()
    for text in draw(rows(found.spans, fold=fold), width=console.width):
        console.print(text, no_wrap=True, overflow="ignore", crop=False)


def exported(spans: Sequence[Span], format: str) -> dict[str, Any]:
    """A trace as the JSON of another tool's format. OTLP has the spans as they were recorded; ConfigError: the extra `otlp` is missing."""
    if format == "perfetto":
        from mesh.telemetry.views.perfetto import perfetto

        return perfetto(aligned(spans).spans)
    from mesh.telemetry.views.otlp_json import otlp_json

    return otlp_json(spans)


def _write(document: dict[str, Any], format: str, file: str) -> None:
    spans = spans_of(document)
    if not spans:
        raise Unavailable(f"the trace of request {document['request']} has no spans: `mesh trace {document['request']}` shows its sums")
    data = orjson.dumps(exported(spans, format))
    try:
        Path(file).expanduser().write_bytes(data)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}: give a file that can be written") from None
    hint = "open it at https://ui.perfetto.dev" if format == "perfetto" else "any OTLP collector takes it as POST /v1/traces"
    print(f"wrote {len(spans)} spans of request {document['request']} to {file}: {hint}")


# -- which request -----------------------------------------------------------------------------------------------------


async def _named(client: AsyncMeshClient, id: str) -> dict[str, Any]:
    """The trace of an ID of any kind."""
    name = without_prefix(id)
    if not is_token(name):
        raise BadRequest(
            f"{id[:80]!r} is no id of a request: an id has letters, digits, - and _; `mesh trace --last` needs none", field="id"
        )
    document = await client.inspect(name) or await client.trace(name)
    if document is None:
        await _require_coordinators(client)
        raise BadRequest(
            f"no coordinator knows request {id}: each keeps its last requests, and failed and slow ones for longer; "
            "`mesh trace --last` shows the last one",
            field="id",
        )
    return document


async def _last(client: AsyncMeshClient, kind: Kind, model: str | None) -> dict[str, Any]:
    reports = await _reports(client, kind, model)
    for report in reports:
        document = await client.inspect(report.request)
        if document is not None:
            return document
    await _require_coordinators(client)
    asked = "that failed" if kind == "failed" else "that ended"
    raise BadRequest(f"no coordinator has a request {asked}: `mesh generate` sends one, `mesh status` shows what runs", field=kind)


async def _reports(client: AsyncMeshClient, kind: Kind, model: str | None) -> list[SessionReport]:
    """The requests that are kept, the one that is asked for first. Where none was slow by the configuration (tracing.slow_request), the
    slowest of the last ones is."""
    if kind == "slow":
        found = await client.traces("slow", model=model) or await client.traces("last", limit=64, model=model)
        return sorted(found, key=lambda report: -report.total_s)
    return await client.traces(kind, model=model)


async def _require_coordinators(client: AsyncMeshClient) -> None:
    if not await client.coordinators():
        raise Unavailable("no coordinator answers: start a mesh with `mesh up`, or see `mesh status`")
