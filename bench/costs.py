"""What a setting of the mesh costs in decode speed: meshes with and without it take turns in one run.

    python bench/costs.py tracing MODEL_DIR [--shards 3] [--sessions 1,32] [--rounds 5] [--out results.json]
    python bench/costs.py security MODEL_DIR ...

tracing   without it, at the default sampling, and with every trace sent to a collector. The collector is a thread of this script that
          reads each body and answers; its work is part of the cost.
security  plain connections and one user for all, against TLS, a key for each process, and the rights of its role alone.

The meshes of processes run at the same time and take turns, a round each, so that a slow minute of the machine slows all. The figure of a
round is as in bench/mesh_overhead.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mesh_overhead import CONTEXT, through_the_mesh

from mesh.local.mesh import LocalMesh, LocalOptions
from mesh.model.manifest import Manifest


@dataclass(frozen=True)
class Variant:
    environment: Mapping[str, str] = field(default_factory=dict)
    secure: bool = False


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
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """The children that are started within have these variables."""
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]


def variants(what: str, collector: Collector) -> dict[str, Variant]:
    """The first is the one that the others are compared with."""
    if what == "security":
        return {"plain": Variant(), "secure": Variant(secure=True)}
    sent = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
    return {
        "without": Variant({"OTEL_SDK_DISABLED": "true"}),
        "default": Variant(sent),
        "every trace": Variant({"OTEL_TRACES_SAMPLER": "always_on"} | sent),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tracing", "security"))
    parser.add_argument("model", type=Path)
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--sessions", default="1,32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    counts = [int(part) for part in args.sessions.split(",")]
    name, collector = Manifest.load(args.model).name, Collector()
    chosen = variants(args.what, collector)
    first, *others = chosen
    results: dict[int, dict[str, list[float]]] = {count: {variant: [] for variant in chosen} for count in counts}
    with ExitStack() as stack:
        meshes = {}
        for title, variant in chosen.items():
            with environment(variant.environment):
                options = LocalOptions(
                    model=args.model, shards=args.shards, rows=max(counts), context=CONTEXT, http=False, secure=variant.secure
                )
                meshes[title] = stack.enter_context(LocalMesh(options))
        for number in range(args.rounds):
            order = list(meshes)[number % len(meshes) :] + list(meshes)[: number % len(meshes)]
            for count in counts:
                for title in order:
                    step_s, _ = asyncio.run(through_the_mesh(meshes[title].bus, name, count))
                    results[count][title].append(step_s)
    print(f"| sessions | {' | '.join(f'{title}, tokens/s' for title in chosen)} | {' | '.join(f'{title} / {first}' for title in others)} |")
    print(f"|{'---|' * (2 * len(chosen))}")
    for count, result in results.items():
        speed = {title: count / statistics.median(seconds) for title, seconds in result.items()}
        ratios = [statistics.median([a / b for a, b in zip(result[first], result[each], strict=True)]) for each in others]
        print(f"| {count} | {' | '.join(f'{each:.1f}' for each in speed.values())} | {' | '.join(f'{each:.3f}' for each in ratios)} |")
    if collector.bodies:
        print(f"the collector took {collector.bodies} bodies of {collector.bytes / 1e6:.1f} MB together")
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
