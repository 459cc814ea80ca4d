"""What tracing costs: decode speed without it, at the default sampling, and with every trace sent to a collector, in one run.

    python bench/tracing_cost.py MODEL_DIR [--shards 3] [--sessions 1,32] [--rounds 5] [--out results.json]

Three meshes of processes run; they take turns, a round each, so that a slow minute of the machine slows all. The collector is a thread of
this script that reads each body and answers; its work is part of the cost. The figure of a round is as in bench/mesh_overhead.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mesh_overhead import CONTEXT, through_the_mesh

from mesh.local.mesh import LocalMesh, LocalOptions
from mesh.model.manifest import Manifest

VARIANTS = {
    "without": {"OTEL_SDK_DISABLED": "true"},
    "default": {},
    "every trace": {"OTEL_TRACES_SAMPLER": "always_on"},
}


class Collector:
    """bodies, bytes: what came."""

    def __init__(self) -> None:
        self.bodies = self.bytes = 0
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector.bytes += len(self.rfile.read(int(self.headers["content-length"])))
                collector.bodies += 1
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """The children that are started within have these variables."""
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--sessions", default="1,32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    counts = [int(part) for part in args.sessions.split(",")]
    name, collector = Manifest.load(args.model).name, Collector()
    results: dict[int, dict[str, list[float]]] = {count: {variant: [] for variant in VARIANTS} for count in counts}
    with ExitStack() as stack:
        meshes = {}
        for variant, values in VARIANTS.items():
            sent = {} if variant == "without" else {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
            with environment(values | sent):
                options = LocalOptions(model=args.model, shards=args.shards, rows=max(counts), context=CONTEXT, http=False)
                meshes[variant] = stack.enter_context(LocalMesh(options))
        for number in range(args.rounds):
            order = list(meshes)[number % 3 :] + list(meshes)[: number % 3]
            for count in counts:
                for variant in order:
                    step_s, _ = asyncio.run(through_the_mesh(meshes[variant].url, name, count))
                    results[count][variant].append(step_s)
    print("| sessions | without, tokens/s | default | every trace | default / without | every trace / without |")
    print("|---|---|---|---|---|---|")
    for count, result in results.items():
        speed = {variant: count / statistics.median(seconds) for variant, seconds in result.items()}
        ratios = [statistics.median([a / b for a, b in zip(result["without"], result[each], strict=True)]) for each in list(VARIANTS)[1:]]
        print(f"| {count} | {' | '.join(f'{each:.1f}' for each in speed.values())} | {' | '.join(f'{each:.3f}' for each in ratios)} |")
    print(f"the collector took {collector.bodies} bodies of {collector.bytes / 1e6:.1f} MB together")
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
