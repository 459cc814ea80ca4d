"""`mesh batch`: requests that are each answered once, whichever processes end meanwhile."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime
from typing import TYPE_CHECKING, Any

from mesh.commands.batch_lines import at_its_line, read_lines, result_line
from mesh.commands.connection import add_connection_arguments, bus_options
from mesh.errors import BadRequest, PayloadTooLarge, RequestError

if TYPE_CHECKING:
    from mesh.client import BatchStatus

__all__ = ["add_batch_parser"]

_DESCRIPTION = """\
Durable batches: every line of a file is a request: a JSON string (a prompt), an object with the fields of a request (prompt, messages or
tokens, max_tokens, temperature ...), or a line of OpenAI's batches ({"custom_id", "url", "body"}). The NATS server keeps the requests, and
they are answered when rows are free, even if every process is restarted meanwhile. Results are kept for a week."""

_CANCEL = """\
Take a batch back. Requests that have not begun are not begun, those that run are cancelled within seconds, and what has ended keeps its
result."""
_LIST = """\
The batches of the last week, the latest first. Whoever knows the id of a batch may read its results, so the connection must be an
operator's."""
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
    result.add_argument(
        "--requests",
        metavar="FILE.jsonl",
        help="the file that was submitted: answers to lines of OpenAI's form have that form and their custom_id",
    )

    listing = verbs.add_parser("list", help="the batches of the last week", description=_LIST)
    listing.add_argument("--json", action="store_true", help="one object a line")

    cancel = verbs.add_parser("cancel", help="take a batch back", description=_CANCEL)
    cancel.add_argument("id", metavar="ID", help="as `mesh batch submit` printed it")
    cancel.add_argument("--json", action="store_true", help="print one object")

    dead = verbs.add_parser("dead", help="what was set aside", description=_DEAD)
    dead.add_argument("--last", type=int, default=100, metavar="N", help="show the last N (default 100)")
    dead.add_argument("--json", action="store_true", help="one object a line")
    for verb, command in ((submit, _submit), (status, _status), (result, _result), (listing, _list), (cancel, _cancel), (dead, _dead)):
        add_connection_arguments(verb)
        verb.set_defaults(run=command)


def _submit(args: argparse.Namespace) -> int:
    from mesh.client import MeshClient

    common = {} if args.max_tokens is None else {"max_tokens": args.max_tokens}
    lines = read_lines(args.file)
    with MeshClient(options=bus_options(args), model=args.model) as client:
        try:
            status = client.submit_batch([{**common, **_as_object(line.request)} for line in lines], id=args.id)
        except (RequestError, PayloadTooLarge) as error:
            raise at_its_line(error, args.file, lines) from None
        if args.wait:
            print(f"batch {status.id}: waiting for {status.total} answers", file=sys.stderr)
            status = client.wait_batch(status.id)
    print(status.model_dump_json() if args.json else status.id)
    return 0


def _as_object(request: str | dict[str, Any]) -> dict[str, Any]:
    return {"prompt": request} if isinstance(request, str) else request


def _list(args: argparse.Namespace) -> int:
    from mesh.client import MeshClient

    with MeshClient(options=bus_options(args)) as client:
        found = client.batches()
    for status in found:
        if args.json:
            print(status.model_dump_json())
        else:
            at = datetime.fromtimestamp(status.submitted_unix_s).strftime("%Y-%m-%d %H:%M:%S")
            print(f"{at}  {status.id:34}  {status.state:9}  {status.done + status.failed} of {status.total}  {status.model}")
    if not found and not args.json:
        print("no batches: `mesh batch submit FILE.jsonl` makes one", file=sys.stderr)
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

    page = 200
    lines = {} if args.requests is None else dict(enumerate(read_lines(args.requests)))
    with MeshClient(options=bus_options(args)) as client:
        batch = client.wait_batch(args.id) if args.wait else client.batch_status(args.id)
        if lines and len(lines) != batch.total:
            raise BadRequest(
                f"{args.requests} has {len(lines)} requests, and the batch {batch.total}: give the file that was submitted",
                field="requests",
            )
        for offset in range(0, batch.total, page):
            for item in client.batch_results(args.id, offset=offset, limit=page):
                print(json.dumps(result_line(item, lines.get(item.index), batch), ensure_ascii=False))
    return 0


def _dead(args: argparse.Namespace) -> int:
    from mesh.client import MeshClient

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
