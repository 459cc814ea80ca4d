"""A shard as a process: the settings that must be made before JAX is used, its signals, and its event loop.

The first SIGTERM or SIGINT drains the shard; a second one ends it at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, nullcontext
from typing import Any

from mesh.bus import Bus, BusOptions
from mesh.errors import ConfigError
from mesh.host.process import no_core_dumps, settle
from mesh.host.signals import on_signals, run_loop
from mesh.shard.http import ShardHttp
from mesh.shard.metrics import ShardMetrics
from mesh.shard.options import ShardOptions
from mesh.shard.service import Shard
from mesh.shard.start_trace import StartTrace
from mesh.telemetry.export import SpanExport
from mesh.telemetry.metrics_http import reporting
from mesh.types import Progress

__all__ = ["choose_device", "limit_threads", "run", "serve"]

_SWITCH_S = 0.0005

log = logging.getLogger("mesh.shard")


def limit_threads(count: int | None, *, turn: int = 0) -> None:
    """Compute on `count` cores (None: all). XLA starts one thread for each core that the process may use, so the process is bound to
    that many cores; `turn` selects different ones for each shard of a machine. Call it before JAX is used."""
    if count is None or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    if count < len(cores):
        os.sched_setaffinity(0, {cores[(turn * count + i) % len(cores)] for i in range(count)})


def choose_device(*, gpu: bool) -> None:
    """Compute on the GPU, or on the CPU. ConfigError where there is no GPU. Call it before JAX is used."""
    import jax

    jax.config.update("jax_platforms", "cuda" if gpu else "cpu")
    if gpu:
        try:
            jax.devices()
        except (RuntimeError, AssertionError) as error:  # without the plugin JAX asserts, and says nothing
            why = f" ({' '.join(str(error).split())})" if str(error) else ""
            raise ConfigError(
                f"resources.enable_gpu: JAX finds no GPU{why}: install stagemesh[gpu] and a driver, or set it to false"
            ) from None


async def serve(
    bus_options: BusOptions,
    make: Callable[[Bus], Awaitable[ShardOptions]],
    *,
    progress: Progress,
    http: ShardHttp | None = None,
    metrics: ShardMetrics | None = None,
    connect_s: float | None = 60.0,
    export: SpanExport | None = None,
) -> bool:
    """Connect, ask `make` for the shard's options, and serve until told to end. Returns whether a thread is still computing. `export`:
    where spans go that leave the mesh."""
    async with _answering(http), nullcontext() if metrics is None else reporting(metrics.registry, metrics.endpoint, export):
        return await _serve(bus_options, make, progress, http, metrics, connect_s, export)


@asynccontextmanager
async def _answering(http: ShardHttp | None) -> AsyncIterator[None]:
    """While this context is open, `http` answers."""
    if http is None:
        yield
        return
    answering = asyncio.create_task(http.run())
    try:
        yield
    finally:
        http.listener.stop(now=True)
        await answering


async def _serve(
    bus_options: BusOptions,
    make: Callable[[Bus], Awaitable[ShardOptions]],
    progress: Progress,
    http: ShardHttp | None,
    metrics: ShardMetrics | None,
    connect_s: float | None,
    export: SpanExport | None,
) -> bool:
    start = StartTrace()
    async with await Bus.connect(bus_options, name="mesh-shard", timeout_s=connect_s) as bus:
        # The loop and the compute thread take turns with the interpreter; at the usual 5 ms a frame could wait for a step's dispatch.
        sys.setswitchinterval(_SWITCH_S)
        options = await make(bus)
        shard = Shard(bus, options, progress=progress, start=start, export=export)
        if http is not None:
            http.shard, shard.http_url = shard, http.listener.url
            log.info("HTTP on %s", http.listener.where)
        if metrics is not None:
            metrics.of(shard)

        def end() -> None:
            if shard.ready.is_set():
                log.info("draining %d sessions; again to end now", shard.drain())
            else:
                shard.stop()

        on_signals(end, shard.stop)
        bus.spawn(_settle(shard), "settling")
        await shard.run()
        return shard.computing


async def _settle(shard: Shard) -> None:
    await shard.ready.wait()
    settle()


def run(main: Callable[[], Coroutine[Any, Any, bool]]) -> None:
    """Run `main`, which is `serve` with its arguments, in a new event loop. Does not return while a thread still computes: the process
    ends here."""
    no_core_dumps()
    if run_loop(main):
        # An interpreter that ends below a thread inside a compiler takes the process down with a signal.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
