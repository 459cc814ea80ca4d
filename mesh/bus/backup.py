"""JetStream's streams in a folder, and back: by the server's own snapshots, so that sequences, consumers and limits come back as they were.

    backup.json          what is in the folder: each stream, its file, size and SHA-256; written last, so a folder that has it is complete
    STREAM.snapshot      what the server sent (a compressed tar of its own)

Leases are in memory and said anew within seconds; records of running sessions are of value for two minutes. Neither is kept.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mesh.bus.connection import Bus, Received
from mesh.bus.jetstream import ApiRefused, answer_of, ask_api, passing_consumer
from mesh.errors import BadRequest, ConfigError, DeadlineExceeded, NobodyListens, ServiceError
from mesh.protocol import subjects
from mesh.types import Progress, no_progress

__all__ = ["Backup", "SavedStream", "restore_streams", "save_streams"]

_SKIPPED: Final = (f"KV_{subjects.KV_SHARDS}", f"KV_{subjects.KV_SESSIONS}")
_MODELS: Final = f"OBJ_{subjects.OBJECTS_MODELS}"
_NEWS: Final = (subjects.STREAM_EVENTS, subjects.STREAM_DEAD)
"""What happened: processes write to these at once, and what is there now is worth more than what was."""
_CHUNK_BYTES: Final = 512 * 1024
_API_S: Final = 10.0
_SILENCE_S: Final = 30.0
_COPIES_S: Final = 300.0
_INDEX: Final = "backup.json"
_NO_STREAM: Final = 10059
_NOT_READY: Final = (10008, 10104)  # the cluster has no leader yet
_MOST_INDEX_BYTES: Final = 4 * 1024 * 1024


class SavedStream(BaseModel):
    """`config` and `state` are the server's own documents. `bytes`: of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    bytes: int
    sha256: str
    messages: int
    config: dict[str, Any]
    state: dict[str, Any]


class Backup(BaseModel):
    """The index of a folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    made_unix_s: float
    server_version: str
    streams: tuple[SavedStream, ...]

    @classmethod
    def load(cls, folder: Path) -> Backup:
        """The index. ConfigError: the folder has none, or a damaged one."""
        file = folder / _INDEX
        try:
            with file.open("rb") as opened:
                data = opened.read(_MOST_INDEX_BYTES)
            return cls.model_validate_json(data)
        except OSError as error:
            raise ConfigError(f"{file}: {error.strerror}: give a folder that `mesh nats backup` made and finished") from None
        except ValidationError as error:
            raise ConfigError(f"{file}: not as `mesh nats backup` writes it ({error.error_count()} faults)") from None


@dataclass
class _Sink:
    """Takes the chunks of a snapshot, and counts and hashes them."""

    file: BinaryIO
    size: int = 0

    def __post_init__(self) -> None:
        self.hash = hashlib.sha256()

    def write(self, chunk: bytes) -> None:
        self.file.write(chunk)
        self.hash.update(chunk)
        self.size += len(chunk)


async def save_streams(bus: Bus, folder: Path, *, models: bool = True, progress: Progress = no_progress) -> Backup:
    """Write every stream of this account into `folder`. ConfigError: a backup is there already. ServiceError: the server refuses."""
    if (folder / _INDEX).exists():
        raise ConfigError(f"{folder} has a backup already: give another folder, such as one with the date in its name")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    names = [name for name in await _names(bus) if name not in _SKIPPED and (models or name != _MODELS)]
    saved = [await _save(bus, name, folder, progress) for name in names]
    backup = Backup(made_unix_s=time.time(), server_version=str(bus.client._server_info.get("version", "")), streams=tuple(saved))
    fresh = folder / f"{_INDEX}.new"
    fresh.write_bytes(orjson.dumps(backup.model_dump(mode="json"), option=orjson.OPT_INDENT_2))
    fresh.replace(folder / _INDEX)
    return backup


async def restore_streams(bus: Bus, folder: Path, *, replace: bool = False, progress: Progress = no_progress) -> list[str]:
    """Bring the streams of `folder` back. Returns their names. A stream that is there and empty makes room; events that are there stay, and
    those of the backup are left out. BadRequest: another stream has messages, and `replace` is not given; then nothing is changed.
    ConfigError: a file is not what the index says."""
    backup = Backup.load(folder)
    for stream in backup.streams:
        await asyncio.to_thread(_check, folder, stream)
    there = {stream.name: await _messages(bus, stream.name) for stream in backup.streams}
    wanted = [stream for stream in backup.streams if replace or stream.name not in _NEWS or not there[stream.name]]
    full = [f"{stream.name} ({there[stream.name]} messages)" for stream in wanted if there[stream.name]]
    if full and not replace:
        raise BadRequest(
            f"{', '.join(full)}: there already, and nothing was changed. Give --replace to lose what is in them", field="replace"
        )
    for stream in wanted:
        if there[stream.name] is not None:
            await _api(bus, f"STREAM.DELETE.{stream.name}", {})
        await _restore(bus, stream, folder, progress)
    for stream in wanted:
        await _settled(bus, stream)
    return [stream.name for stream in wanted]


async def _names(bus: Bus) -> list[str]:
    said = await _api(bus, "STREAM.NAMES", {"offset": 0})
    return sorted(said.get("streams") or [])


async def _messages(bus: Bus, name: str) -> int | None:
    """How many messages a stream has; None if there is no such stream."""
    try:
        said = await _api(bus, f"STREAM.INFO.{name}", {})
    except ApiRefused as error:
        if error.number == _NO_STREAM:
            return None
        raise
    return int(said["state"]["messages"])


async def _save(bus: Bus, name: str, folder: Path, progress: Progress) -> SavedStream:
    """Chunks come as long as each is acknowledged; an empty one ends them."""
    chunks: asyncio.Queue[Received] = asyncio.Queue()
    inbox = bus.new_inbox()
    subscription = await bus.subscribe(inbox, chunks.put)
    file = folder / f"{name}.snapshot"
    try:
        await bus.flush()
        said = await _api(bus, f"STREAM.SNAPSHOT.{name}", {"deliver_subject": inbox, "chunk_size": _CHUNK_BYTES, "jsck": True})
        expected = int(said["state"]["bytes"])
        with await asyncio.to_thread(file.open, "wb") as opened:
            sink = _Sink(opened)
            while chunk := await _next(chunks, name):
                await asyncio.to_thread(sink.write, chunk.data)
                progress(name, min(sink.size, expected), max(expected, sink.size))
                if chunk.reply:
                    await bus.publish(chunk.reply, b"")
    finally:
        await subscription.stop()
    state = said["state"]
    return SavedStream(
        name=name,
        bytes=sink.size,
        sha256=sink.hash.hexdigest(),
        messages=int(state["messages"]),
        config=said["config"],
        state=state,
    )


async def _next(chunks: asyncio.Queue[Received], name: str) -> Received | None:
    """The next chunk; None after the last one. ServiceError: the server has given up."""
    try:
        async with asyncio.timeout(_SILENCE_S):
            chunk = await chunks.get()
    except TimeoutError:
        raise DeadlineExceeded(f"the snapshot of {name} stands still: nothing came for {_SILENCE_S:g} s") from None
    if chunk.data:
        return chunk
    status = chunk.headers.get("Status", "204")
    if status not in ("", "200", "204"):
        raise ServiceError(f"the snapshot of {name} broke off: {status} {chunk.headers.get('Description', '')}".rstrip())
    return None


async def _restore(bus: Bus, stream: SavedStream, folder: Path, progress: Progress) -> None:
    said = await _api(bus, f"STREAM.RESTORE.{stream.name}", {"config": stream.config, "state": stream.state})
    to, done = str(said["deliver_subject"]), 0
    with await asyncio.to_thread((folder / f"{stream.name}.snapshot").open, "rb") as file:
        while chunk := await asyncio.to_thread(file.read, _CHUNK_BYTES):
            await _sent(bus, to, chunk, stream.name)
            done += len(chunk)
            progress(stream.name, done, stream.bytes)
    restored = await _sent(bus, to, b"", stream.name)
    messages = int(restored["state"]["messages"])
    if messages != stream.messages:
        raise ServiceError(f"{stream.name} has {messages} messages after it was restored, and had {stream.messages}")


async def _sent(bus: Bus, to: str, chunk: bytes, name: str) -> dict[str, Any]:
    """The answer to a chunk. The server that waits for it may be another one than ours, which hears of that a moment later."""
    deadline = time.monotonic() + _API_S
    while True:
        try:
            return answer_of((await bus.ask(to, chunk, timeout_s=_SILENCE_S)).data, f"restoring {name}")
        except NobodyListens:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.05)


async def _settled(bus: Bus, stream: SavedStream) -> None:
    """Wait until every server of the cluster that keeps the stream has all of it: each of them answers reads."""
    deadline = time.monotonic() + _COPIES_S
    complete: set[str] = set()
    while behind := await _behind(bus, stream, complete):
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"{stream.name} is restored, and {', '.join(behind)} has not all of it after {_COPIES_S:g} s")
        await asyncio.sleep(0.05)  # a server tells nobody when its copy is complete


async def _behind(bus: Bus, stream: SavedStream, complete: set[str]) -> list[str]:
    """The servers that are not known to have all of a stream. Each may be called current before it has anything; so one reader is opened,
    which is given one of them, and that one is `complete` if the reader finds everything there."""
    said = await _api(bus, f"STREAM.INFO.{stream.name}", {})
    cluster = said.get("cluster") or {}
    copies = cluster.get("replicas") or []
    if int(said["state"]["last_seq"]) < int(stream.state["last_seq"]) or (copies and not cluster.get("leader")):
        return ["its leader"]
    late = [str(copy["name"]) for copy in copies if not copy.get("current") or copy.get("lag")]
    if late or not copies or said["config"]["retention"] != "limits":  # readers of a queue wait for what is not there yet
        return late
    server, found = await _reader(bus, stream.name)
    if found >= int(said["state"]["messages"]):
        complete.add(server)
    return sorted({str(cluster["leader"]), *(str(copy["name"]) for copy in copies)} - complete)


async def _reader(bus: Bus, stream: str) -> tuple[str, int]:
    """The server that a new reader of a stream is given, and how many messages it has for it."""
    name = f"restored-{secrets.token_hex(8)}"
    request = {"stream_name": stream, "config": passing_consumer(name, _API_S)}
    said = await _api(bus, f"CONSUMER.CREATE.{stream}.{name}", request)
    await _api(bus, f"CONSUMER.DELETE.{stream}.{name}", {})
    return str(said["cluster"]["leader"]), int(said["num_pending"])


def _check(folder: Path, stream: SavedStream) -> None:
    file = folder / f"{stream.name}.snapshot"
    try:
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}: the backup is not complete") from None
    if found != stream.sha256:
        raise ConfigError(f"{file} is not what {_INDEX} says: it was changed or damaged after the backup, and nothing was restored")


async def _api(bus: Bus, what: str, request: dict[str, Any]) -> dict[str, Any]:
    """An answer of JetStream. A cluster that has just lost a server chooses a leader first: it is asked again for some seconds."""
    deadline = time.monotonic() + _SILENCE_S
    while True:
        try:
            return await ask_api(bus, what, request, timeout_s=_API_S)
        except ApiRefused as error:
            if error.number not in _NOT_READY or time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.2)
