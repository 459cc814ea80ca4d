"""`mesh batch`: requests that are each answered once, whichever processes end meanwhile."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesh.commands.connection import add_connection_arguments, bus_options

if TYPE_CHECKING:
    from mesh.client import BatchStatus

__all__ = ["add_batch_parser"]

_DESCRIPTION = """\
Durable batches: every line of a file is a request, either a JSON string (a prompt) or an object with the fields of a request (prompt,
messages or tokens, max_tokens, temperature ...). The NATS server keeps the requests, and they are answered when rows are free, even if
every process is restarted meanwhile. Results are kept for a week."""

_CANCEL = """\
Take a batch back. Requests that have not begun are not begun, those that run are cancelled within seconds, and what has ended keeps its
result."""
_DEAD = """\
Messages of the queue that no coordinator could handle, the oldest first: where each one was, its size, and what was wrong with it. They
are no longer in the queue. The last 1,000 of a week are kept."""


def add_batch_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("batch", help="requests that survive every process", description=_DESCRIPTION)
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    submit = verbs.add_parser("submit", help="put a file of requests into the queue", description=_DESCRIPTION)
    submit.add_argument("file", metavar="FILE.jsonl", help="one request a line; - is standard input")
    submit.add_argument(
        "--id", metavar="ID", help="a name of your own; submitting it again continues the same batch (default: a random one)"
    )
    submit.add_argument("--model", metavar="NAME", help="default: the only one there")
    submit.add_argument("--max-tokens", type=int, metavar="N", help="for lines that do not give max_tokens")
    submit.add_argument("--wait", action="store_true", help="wait until all requests are answered")
    submit.add_argument("--json", action="store_true", help="print the status as one object")

    status = verbs.add_parser("status", help="how far a batch is", description="How far a batch is.")
    status.add_argument("id", metavar="ID", help="as `mesh batch submit` printed it")
    status.add_argument("--json", action="store_true", help="print one object")

    result = verbs.add_parser("result", help="the answers", description="The answers so far, one object a line, in the order of the file.")
    result.add_argument("id", metavar="ID", help="as `mesh batch submit` printed it")
    result.add_argument("--wait", action="store_true", help="wait until all answers are there")

    cancel = verbs.add_parser("cancel", help="take a batch back", description=_CANCEL)
    cancel.add_argument("id", metavar="ID", help="as `mesh batch submit` printed it")
    cancel.add_argument("--json", action="store_true", help="print one object")

    dead = verbs.add_parser("dead", help="what was set aside", description=_DEAD)
    dead.add_argument("--last", type=int, default=100, metavar="N", help="show the last N (default 100)")
    dead.add_argument("--json", action="store_true", help="one object a line")
    for verb, command in ((submit, _submit), (status, _status), (result, _result), (cancel, _cancel), (dead, _dead)):
        add_connection_arguments(verb)
        verb.set_defaults(run=command)


def _submit(args: argparse.Namespace) -> int:
    from mesh.client import MeshClient

    common = {} if args.max_tokens is None else {"max_tokens": args.max_tokens}
    requests = _requests(args.file)
    with MeshClient(options=bus_options(args), model=args.model) as client:
        status = client.submit_batch(requests, id=args.id, **common)
        if args.wait:
            print(f"batch {status.id}: waiting for {status.total} answers", file=sys.stderr)
            status = client.wait_batch(status.id)
    print(status.model_dump_json() if args.json else status.id)
    return 0


def _status(args: argparse.Namespace) -> int:
    from mesh.client import MeshClient

    with MeshClient(options=bus_options(args)) as client:
        _show(client.batch_status(args.id), as_json=args.json)
    return 0


def _cancel(args: argparse.Namespace) -> int:
    from mesh.client import MeshClient

    with MeshClient(options=bus_options(args)) as client:
        _show(client.cancel_batch(args.id), as_json=args.json)
    return 0


def _show(status: BatchStatus, *, as_json: bool) -> None:
    if as_json:
        print(status.model_dump_json())
        return
    waiting = status.total - status.running - status.done - status.failed - status.cancelled
    cancelled = f"{status.cancelled} cancelled, " if status.cancelled else ""
    print(
        f"batch {status.id} of {status.model}: {status.state}, {status.done} done, {status.failed} failed, {cancelled}"
        f"{status.running} running, {waiting} waiting, {status.total} in all"
    )


def _result(args: argparse.Namespace) -> int:
    from mesh.client import MeshClient
    from mesh.errors import Cancelled

    page = 200
    with MeshClient(options=bus_options(args)) as client:
        total = (client.wait_batch(args.id) if args.wait else client.batch_status(args.id)).total
        for offset in range(0, total, page):
            for item in client.batch_results(args.id, offset=offset, limit=page):
                failed = "cancelled" if isinstance(item.error, Cancelled) else "failed"
                line: dict[str, Any] = {"index": item.index, "state": "done" if item.error is None else failed}
                if item.completion is not None:
                    line |= {name: value for name, value in item.completion.document().items() if name not in ("request", "timing")}
                if item.error is not None:
                    line |= {"error": str(item.error), "code": item.error.code}
                print(json.dumps(line, ensure_ascii=False))
    return 0


def _dead(args: argparse.Namespace) -> int:
    from mesh.client import MeshClient
    from mesh.errors import BadRequest

    if args.last < 1:
        raise BadRequest(f"--last {args.last}: give 1 or more", field="last")
    with MeshClient(options=bus_options(args)) as client:
        messages = client.dead_messages(last=args.last)
    for message in messages:
        if args.json:
            print(message.to_bytes().decode())
        else:
            at = datetime.fromtimestamp(message.at_unix_s).strftime("%Y-%m-%d %H:%M:%S")
            print(f"{at}  {message.subject}  {message.size_bytes} bytes  {message.reason}")
    return 0


def _requests(name: str) -> list[str | dict[str, Any]]:
    from mesh.errors import BadRequest

    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"{name}: {error}: give a file with one request a line, or - for standard input", field="file") from None
    requests: list[str | dict[str, Any]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            request = json.loads(line)
        except ValueError as error:
            raise BadRequest(f"{name}, line {number}: {error}: give a JSON string or object", field="file") from None
        if not isinstance(request, (str, dict)):
            raise BadRequest(f"{name}, line {number} is neither a JSON string nor an object", field="file")
        requests.append(request)
    return requests
