"""The NATS servers: whether each one is reachable, near and encrypted, and what JetStream keeps there."""

from __future__ import annotations

import ipaddress
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

import orjson

from mesh.bus import Bus, BusOptions
from mesh.bus.inspect import jetstream_facts, round_trips_s, server_facts, stream_facts
from mesh.bus.options import without_password
from mesh.bus.replicas import wanted
from mesh.doctor.findings import Finding, error, ok, skipped, warning
from mesh.errors import MeshError
from mesh.protocol import subjects
from mesh.settings.units import format_bytes, format_seconds

__all__ = ["check_jetstream", "check_monitor", "check_servers"]

_CONNECT_S: Final = 3.0
_FAR_S: Final = 0.005
_SMALL_PAYLOAD: Final = 1024 * 1024
_OLDEST: Final = (2, 10)
_FULL: Final = 0.8
_LITTLE_DISK: Final = 1_000_000_000
_SAFE_SYNC_NS: Final = 1_000_000_000

_STREAMS: Final = {
    f"KV_{subjects.KV_SHARDS}": "leases",
    f"KV_{subjects.KV_PLACEMENT}": "claims of layer ranges",
    f"KV_{subjects.KV_SESSIONS}": "records of sessions",
    f"KV_{subjects.KV_BATCHES}": "results of batches",
    f"KV_{subjects.KV_RESPONSES}": "responses that are kept",
    subjects.STREAM_BATCH: "requests of batches",
    subjects.STREAM_EVENTS: "events",
    f"OBJ_{subjects.OBJECTS_MODELS}": "models",
}


async def check_servers(options: BusOptions) -> AsyncIterator[Finding]:
    """Each server by itself."""
    for url in options.urls:
        shown = without_password(url)
        try:
            async with await Bus.connect(replace(options, urls=(url,)), name="mesh-doctor", timeout_s=_CONNECT_S) as bus:
                async for finding in _server(bus, shown, url):
                    yield finding
        except MeshError as reason:
            advice = "start it, or take it out of nats.urls; see that no firewall is between (`nc -vz HOST PORT`)"
            yield error(
                "NATS", f"{shown}: {reason}", advice if reason.code == "unavailable" else "correct the credentials or TLS files named"
            )


async def _server(bus: Bus, shown: str, url: str) -> AsyncIterator[Finding]:
    facts = server_facts(bus)
    times = await round_trips_s(bus)
    middle = times[len(times) // 2]
    what = f"{shown}: nats-server {facts.version}" + (f", cluster {facts.cluster}" if facts.cluster else "")
    yield ok("NATS", what)
    trip = f"{shown}: a round trip takes {format_seconds(middle)}"
    if middle > _FAR_S:
        yield warning("round trip", trip, "every hop of every token takes at least half of this: place server and shards in one network")
    else:
        yield ok("round trip", trip)
    host = urlsplit(url).hostname or ""
    if facts.tls:
        yield ok("TLS", f"{shown}: the connection is encrypted")
    elif _is_local(host):
        yield ok("TLS", f"{shown}: not encrypted, on this machine alone")
    else:
        yield warning("TLS", f"{shown}: prompts and answers travel unencrypted", "turn TLS on: nats/secure.conf, nats.tls_ca_file")
    if facts.max_payload < _SMALL_PAYLOAD:
        advice = "raise max_payload to 8MB: prefills are cut into smaller chunks otherwise, and long answers are refused"
        yield warning("max_payload", f"{shown}: a message may have {format_bytes(facts.max_payload)}", advice)
    version = tuple(int(part) for part in facts.version.split(".")[:2] if part.isdigit())
    if version and version < _OLDEST:
        yield warning("NATS", f"{shown}: nats-server {facts.version} is old", "2.10 or later is tested: update it")


async def check_jetstream(bus: Bus) -> AsyncIterator[Finding]:
    """What JetStream keeps, and how safely."""
    advice = "enable it (`jetstream { store_dir: ... }` and, with accounts, `jetstream: enabled`): nats/single.conf has both"
    try:
        facts = await jetstream_facts(bus)
    except MeshError as reason:
        if not server_facts(bus).jetstream:
            yield error(
                "JetStream",
                "JetStream is off: sessions do not survive their coordinator, and there are no batches or pushed models",
                advice,
            )
        elif reason.code == "deadline_exceeded":
            yield skipped("JetStream", "this user may not ask for it, or it does not answer", "run the check as an operator")
        else:
            yield error("JetStream", f"JetStream does not answer: {reason}", advice)
        return
    used = f"{format_bytes(facts.storage_bytes)} on disk, {format_bytes(facts.memory_bytes)} in memory, {facts.streams} streams"
    limits = ((facts.storage_bytes, facts.storage_limit_bytes, "max_file"), (facts.memory_bytes, facts.memory_limit_bytes, "max_mem"))
    full = [f"{key} {format_bytes(limit)}" for have, limit, key in limits if limit > 0 and have > _FULL * limit]
    if full:
        yield warning("JetStream", f"{used}: near the limit ({', '.join(full)})", "raise the limit, or remove models or batches")
    else:
        yield ok("JetStream", used)
    count, missing, single, behind = wanted(bus), [], [], []
    for name, what in _STREAMS.items():
        try:
            stream = await stream_facts(bus, name)
        except MeshError:
            yield skipped("JetStream", f"this user may not look at {name}", "run the check as an operator")
            continue
        if stream is None:
            missing.append(f"{name} ({what})")
            continue
        if stream.servers < count:
            single.append(f"{name} ({stream.servers})")
        if stream.behind:
            behind.append(f"{name} ({stream.behind})")
        if stream.max_bytes > 0 and stream.bytes > _FULL * stream.max_bytes:
            found = f"{name} ({what}) has {format_bytes(stream.bytes)} of {format_bytes(stream.max_bytes)}"
            yield warning("JetStream", found, "wait until batches are done, or cancel some; old entries go after a week")
    if missing:
        yield ok("JetStream", f"not there yet: {', '.join(missing)}", "each is made by the first process that needs it")
    if single:
        yield warning(
            "JetStream", f"kept on fewer than {count} servers: {', '.join(single)}", "start the other servers; processes spread it then"
        )
    if behind:
        yield warning("JetStream", f"copies that are away or behind: {', '.join(behind)}", "start the server that is away, or wait")


def check_monitor(url: str | None) -> list[Finding]:
    """When JetStream writes to disk, which only the monitoring port tells."""
    ask = "start nats-server with `http: 127.0.0.1:8222` and give --nats-monitor http://127.0.0.1:8222"
    if url is None:
        unknown = "how often JetStream writes to disk is not known: by default every 2 minutes, which a loss of power loses"
        return [skipped("sync_interval", unknown, f"{ask}; `sync_interval: always` loses nothing and is slower")]
    try:
        with urlopen(f"{url.rstrip('/')}/varz", timeout=_CONNECT_S) as answer:  # the address is the operator's
            config: dict[str, Any] = orjson.loads(answer.read()).get("jetstream", {}).get("config") or {}
    except (URLError, OSError, ValueError) as reason:
        return [error("sync_interval", f"{url} does not answer: {reason}", ask)]
    found: list[Finding] = []
    interval_ns, always = int(config.get("sync_interval") or 0), bool(config.get("sync_always"))
    if always or 0 < interval_ns <= _SAFE_SYNC_NS:
        found.append(
            ok("sync_interval", "JetStream writes to disk always" if always else f"JetStream writes to disk every {interval_ns / 1e9:g} s")
        )
    else:
        every = f"JetStream writes to disk every {interval_ns / 1e9:g} s" if interval_ns else "JetStream writes to disk now and then"
        advice = "`sync_interval: always` (or `1s`) in the jetstream block; a server that ends alone loses nothing either way"
        found.append(warning("sync_interval", f"{every}: a machine that loses its power loses as much of records and batches", advice))
    folder = config.get("store_dir")
    if isinstance(folder, str) and Path(folder).exists():
        free = shutil.disk_usage(folder).free
        text = f"{format_bytes(free)} free at {folder}"
        enough = free >= _LITTLE_DISK
        found.append(ok("disk (JetStream)", text) if enough else warning("disk (JetStream)", text, "make room, or move store_dir"))
    return found


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
