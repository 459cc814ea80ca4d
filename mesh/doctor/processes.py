"""The shards and coordinators of a mesh: versions, models, ranges, clocks, memory, processors, HTTP. Each looks at a Site."""

from __future__ import annotations

import asyncio
import platform
import ssl
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Final
from urllib.parse import urlsplit

from mesh import __version__
from mesh.doctor.findings import Finding, error, ok, skipped, warning
from mesh.doctor.site import Clock, ShardSeen, Site
from mesh.protocol.frame_codec import VERSION as FRAME_VERSION
from mesh.settings.units import format_bytes, format_seconds
from mesh.types import LayerRange

__all__ = ["check_http", "check_processes"]

_SKEW_S: Final = 0.5
_WRONG_S: Final = 30.0
"""A clock that is so far off refuses tokens that are valid, and takes tokens that are not."""
_NEAR_LIMIT: Final = 0.9
_MORE_THAN_PLANNED: Final = 1.25
_SPARE_BYTES: Final = 200_000_000
"""What a shard may take beside it: compiling for the first time leaves some."""
_WANTED_FILES: Final = 256
_HTTP_S: Final = 3.0


def check_processes(site: Site) -> Iterator[Finding]:
    """Everything but HTTP."""
    yield from _present(site)
    yield from _versions(site)
    for model in site.models:
        yield from _model(site, model)
        yield from _ranges(site, model)
    yield from _clocks(site)
    for shard in site.shards:
        yield from _memory(shard)
        yield from _machine(shard)


def _present(site: Site) -> Iterator[Finding]:
    if not site.shards:
        yield error(
            "shards", "no shard answers", "start some: `mesh shard --config FILE`, `mesh join`, or a whole mesh with `mesh up MODEL_DIR`"
        )
    if not site.coordinators:
        yield error("coordinators", "no coordinator answers", "start one: `mesh coordinator --config FILE`")
    for one in site.coordinators:
        if one.stats is None:
            yield error("coordinators", f"coordinator {one.name} gives no statistics", "see its log; start it again if it hangs")
        elif one.stats.serving:
            stats = one.stats
            text = f"coordinator {one.name} serves {one.model}: {stats.live} sessions, {stats.queued} waiting, {stats.capacity} rows"
            yield ok("coordinators", text)
        else:
            yield error(
                "coordinators", f"coordinator {one.name} cannot serve {one.model}: layers are missing", "see the layer ranges below"
            )
    for shard in site.shards:
        if not shard.answers:
            advice = (
                f"see its log on {shard.lease.host or 'its machine'} (process {shard.lease.pid}); end it and start it again if it hangs"
            )
            yield error("shards", f"{shard.name} does not answer: its process has stopped, hangs, or was just killed", advice)
        elif shard.lease.state != "ready":
            yield warning("shards", f"{shard.name} is {shard.lease.state}", "wait until it is ready; a draining shard ends by itself")
    for name in site.still:
        yield error("shards", f"{name} is connected and does not answer: it stands still", "see its log; end it and start it again")
    for name in site.lost:
        advice = f"start it again, or `mesh join`; `mesh forget {name}` where it is gone for ever"
        yield warning("shards", f"{name} was here within the last hour, and was lost", advice)
    for what in site.unreadable:
        yield error("versions", f"{what} of another version answers, and cannot be read", f"bring every process to {__version__}")


def _versions(site: Site) -> Iterator[Finding]:
    found: dict[str, list[str]] = defaultdict(list)
    frames: dict[int, list[str]] = defaultdict(list)
    for shard in site.shards:
        found[shard.lease.version].append(shard.name)
        frames[shard.lease.frame_version].append(shard.name)
    for one in site.coordinators:
        found[one.version].append(one.name)
    if not found:
        return
    if set(frames) - {FRAME_VERSION}:
        old = ", ".join(f"{version}: {', '.join(names)}" for version, names in sorted(frames.items()) if version != FRAME_VERSION)
        yield error(
            "versions",
            f"frames of version {FRAME_VERSION} are spoken here, and others by some ({old})",
            "update these shards: they take no part",
        )
    if set(found) == {__version__}:
        yield ok("versions", f"every process is {__version__}")
    else:
        text = "; ".join(f"{version or 'unknown'}: {', '.join(names)}" for version, names in sorted(found.items()))
        yield warning("versions", f"this program is {__version__}, and the processes are {text}", "bring all of them to one version")


def _model(site: Site, model: str) -> Iterator[Finding]:
    hashes: dict[str, list[str]] = defaultdict(list)
    for shard in site.shards_of(model):
        hashes[shard.lease.model_hash].append(shard.name)
    for one in site.coordinators_of(model):
        hashes[one.model_hash].append(one.name)
    if len(hashes) == 1:
        yield ok("model", f"{model}: every process has the model {next(iter(hashes))}")
        return
    text = "; ".join(f"{known}: {', '.join(names)}" for known, names in sorted(hashes.items()))
    yield error(
        "model",
        f"{model}: processes have different models ({text})",
        "give all of them one directory, or `mesh push` it and start them again",
    )


def _ranges(site: Site, model: str) -> Iterator[Finding]:
    ready = [shard for shard in site.shards_of(model) if shard.lease.state == "ready" and shard.answers]
    total = next((shard.lease.total_layers for shard in site.shards_of(model)), 0)
    replicas: dict[LayerRange, list[str]] = defaultdict(list)
    for shard in ready:
        replicas[shard.lease.layers].append(shard.name)
    missing = _missing(total, replicas)
    for gap in missing:
        yield error(
            "layer ranges", f"{model}: no shard that is ready serves layers {gap}", f"`mesh join --layers {gap}`, or start the shard again"
        )
    for text in dict.fromkeys(_lacking(site, model)):
        yield warning("layer ranges", f"{model}: fewer shards than its coordinators were told of: {text}", "start them: `mesh join`")
    for layers, names in sorted(replicas.items()):
        text = f"{model}: layers {layers} are served by {', '.join(sorted(names))}"
        if len(names) == 1:
            yield ok("layer ranges", f"{text} alone", "a second one would keep the mesh serving when it dies: `mesh join`")
        else:
            yield ok("layer ranges", text)
    if ready and not missing and not _has_chain(total, replicas):
        yield error(
            "layer ranges",
            f"{model}: the ranges do not join to one chain from layer 0 to {total}",
            "move a boundary: `mesh load SHARD --layers A-B`",
        )


def _lacking(site: Site, model: str) -> Iterator[str]:
    """What coordinators miss of the shards that their files name, in their words."""
    for one in site.coordinators_of(model):
        said = None if one.stats is None or one.stats.expected is None else one.stats.expected.get("lacking")
        if said:
            yield str(said)


def _missing(total: int, ranges: Iterable[LayerRange]) -> list[LayerRange]:
    gaps, covered = [], 0
    for layers in sorted(ranges):
        if layers.start > covered:
            gaps.append(LayerRange(covered, layers.start))
        covered = max(covered, layers.stop)
    if covered < total:
        gaps.append(LayerRange(covered, total))
    return gaps


def _has_chain(total: int, ranges: Iterable[LayerRange]) -> bool:
    reached = {0}
    for layers in sorted(ranges):
        if layers.start in reached:
            reached.add(layers.stop)
    return total in reached


def _clocks(site: Site) -> Iterator[Finding]:
    clocks: dict[str, Clock] = {shard.name: shard.clock for shard in site.shards if shard.clock is not None}
    clocks |= {one.name: one.clock for one in site.coordinators if one.clock is not None}
    advice = "let chrony or systemd-timesyncd set the clock of that machine; traces are corrected meanwhile"
    wrong = False
    for name, clock in clocks.items():
        off = abs(clock.ahead_s) - clock.error_s
        if off <= _SKEW_S:
            continue
        wrong = True
        way = "ahead of" if clock.ahead_s > 0 else "behind"
        far, doubt = format_seconds(abs(clock.ahead_s)), format_seconds(clock.error_s)
        text = f"the clock of {name} is {far} {way} this machine's, known to {doubt}"
        yield (
            error("clocks", text, f"{advice}. Tokens of HTTP are refused or taken wrongly")
            if off > _WRONG_S
            else warning("clocks", text, advice)
        )
    if clocks and not wrong:
        most = max(abs(clock.ahead_s) for clock in clocks.values())
        yield ok("clocks", f"all within {format_seconds(most)} of this machine's")


def _memory(shard: ShardSeen) -> Iterator[Finding]:
    stats = shard.stats
    if stats is None:
        return
    limit, machine = stats.machine.memory_limit_bytes, stats.machine
    sizes = [format_bytes(size) for size in (stats.memory_bytes, stats.predicted_bytes, limit)]
    text = f"{shard.name} takes {sizes[0]}, {sizes[1]} were planned, {sizes[2]} is the limit"
    if limit and machine.available_bytes < (1 - _NEAR_LIMIT) * limit:
        advice = "the system may kill it: give it fewer layers, rows or context (`mesh plan`), or more memory"
        yield warning("memory of shards", f"{text}; only {format_bytes(machine.available_bytes)} are free there", advice)
    elif limit and stats.predicted_bytes > limit:
        yield warning(
            "memory of shards", text, "it was planned larger than its machine allows: lower resources.max_memory_gb, and plan again"
        )
    elif stats.predicted_bytes and stats.memory_bytes > _MORE_THAN_PLANNED * stats.predicted_bytes + _SPARE_BYTES:
        yield warning(
            "memory of shards", text, "it takes more than planned: report it with the model's manifest; drain and start it again meanwhile"
        )
    else:
        yield ok("memory of shards", text)


def _machine(shard: ShardSeen) -> Iterator[Finding]:
    machine = None if shard.stats is None else shard.stats.machine
    if machine is None or not machine.cores:
        return
    has = ", ".join(machine.features) or "no known instruction set"
    yield ok("processors of shards", f"{shard.name}: {machine.processor}, {machine.usable_cores} of {machine.cores} cores ({has})")
    if 0 < machine.quota_cores < machine.usable_cores:
        advice = f"set resources.worker_threads: {max(int(machine.quota_cores), 1)}: threads beyond the quota are stopped within a step"
        yield warning(
            "threads", f"{shard.name} may use the time of {machine.quota_cores:g} cores, and has {machine.usable_cores} threads", advice
        )
    if machine.open_files < _WANTED_FILES:
        yield warning(
            "open files", f"{shard.name} may have {machine.open_files} files open", "raise its limit: LimitNOFILE= of systemd, `ulimit -Hn`"
        )


async def check_http(site: Site) -> AsyncIterator[Finding]:
    """Whether the HTTP of each process answers, and the port of its metrics, as far as they can be reached from here."""
    served = [(one.name, "", one.stats.http, one.stats.metrics) for one in site.coordinators if one.stats is not None]
    served += [(shard.name, shard.lease.host, shard.lease.http, shard.lease.metrics) for shard in site.shards if shard.answers]
    pages = [(name, host, "HTTP", http, f"{http}/api/v1/health") for name, host, http, _ in served if http]
    pages += [(name, host, "metrics", metrics, metrics) for name, host, _, metrics in served if metrics]
    here = platform.node()
    for name, host, what, url, page in pages:
        name_there = urlsplit(url).hostname or ""
        if name_there in ("127.0.0.1", "localhost", "::1") and host and host != here:
            yield skipped(what, f"{name} serves {what} on its own machine alone ({url} of {host})", "run `mesh doctor` there")
            continue
        reason = await asyncio.to_thread(_answers, page)
        if reason is None:
            yield ok(what, f"{name} answers at {url}")
        else:
            yield error(what, f"{name} does not answer at {url}: {reason}", "see its log; is a firewall between, or does the process hang?")


def _answers(url: str) -> str | None:
    """What is wrong; None where any HTTP answer comes, also one that asks for a token. Certificates are not looked at."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        urllib.request.urlopen(url, timeout=_HTTP_S, context=context).close()  # from a process of the mesh
    except urllib.error.HTTPError as answer:
        return f"status {answer.code}" if answer.code >= 500 else None
    except (OSError, ValueError) as reason:
        return str(getattr(reason, "reason", None) or reason)
    return None
