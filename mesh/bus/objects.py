"""Models in the object store `mesh_models`, so that a shard anywhere can fetch just the blocks that it serves.

    sha256.<digest>     the bytes of one file; models that share a file share the object
    model.<NAME>        the manifest, written last: a model that can be seen is complete

Every file is compared with the manifest's checksum as it arrives, and gets its name only if it is right.
"""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import nats.js.api
import nats.js.errors
import nats.js.object_store

from mesh.bus.chunks import StoredObject, missing_chunks
from mesh.bus.connection import Bus
from mesh.bus.mapping import mapped
from mesh.bus.pulling import Pull
from mesh.bus.replicas import replicated, spread
from mesh.errors import BadRequest, CorruptModel, ModelNotFound
from mesh.host.known_files import KnownFiles
from mesh.host.paths import cache_directory
from mesh.model.manifest import MAX_MANIFEST_BYTES, FileInfo, Manifest, block_name, check_file
from mesh.protocol import subjects
from mesh.types import LayerRange, Progress, no_progress

if TYPE_CHECKING:  # a client is installed without cryptography
    from mesh.model.signature import Signers

__all__ = ["ModelStore", "Progress", "Pull", "files_of", "kept_at"]

_CHUNK_BYTES = 512 * 1024
_API_S = 30.0


def files_of(manifest: Manifest, layers: LayerRange | None = None, *, embed: bool = True, head: bool = True) -> list[FileInfo]:
    """The files that a range needs (None: all layers); tokenizer and chat template come with the head or the embedding."""
    names = [block_name(i) for i in layers or LayerRange(0, manifest.layers)]
    names = ([block_name("embed")] if embed else []) + names + ([block_name("head")] if head else [])
    files = [file for name in names for file in manifest.block(name).files]
    return files + (list(manifest.extra_files) if embed or head else [])


def kept_at(manifest: Manifest) -> Path:
    """The folder of a fetched model on this machine. Another model of the same name has another folder."""
    return cache_directory() / "models" / f"{subjects.token(manifest.name)}-{manifest.model_hash}"


class ModelStore:
    """The models of a mesh. `signers`: one of them must have signed every model that is fetched (None: no signature is asked for)."""

    def __init__(self, bus: Bus, signers: Signers | None = None) -> None:
        self._bus = bus
        self._signers = signers
        self._store: nats.js.object_store.ObjectStore | None = None

    async def names(self) -> list[str]:
        """The names of the models that are complete."""
        with mapped("listing models"):
            try:
                found = await (await self._open()).list(ignore_deletes=True)
            except nats.js.errors.NotFoundError:
                return []
        return sorted(info.name.removeprefix("model.") for info in found if info.name and info.name.startswith("model."))

    async def only_name(self) -> str:
        """The name of the only model. ModelNotFound: none was pushed. BadRequest: several were."""
        names = await self.names()
        if not names:
            raise ModelNotFound("the mesh has no model yet: push one with `mesh push MODEL_DIR`")
        if len(names) > 1:
            raise BadRequest(f"the mesh has {len(names)} models: say which one: {', '.join(names)}", field="model")
        return names[0]

    async def manifest(self, name: str) -> Manifest:
        """The manifest of a model. ModelNotFound: no such model was pushed. UntrustedModel: none of the signers has signed it."""
        sink = _Bounded(MAX_MANIFEST_BYTES)
        with mapped(f"fetching {name}"):
            try:
                await (await self._open()).get(f"model.{subjects.token(name)}", writeinto=sink)
            except nats.js.errors.NotFoundError:
                raise ModelNotFound(f"the mesh has no model {name}: push it with `mesh push MODEL_DIR`") from None
        manifest = await asyncio.to_thread(Manifest.parse, sink.getvalue(), f"the manifest of {name} in the object store")
        if self._signers is not None:
            await asyncio.to_thread(self._signers.check, manifest, f"the model {name} of the mesh")
        return manifest

    async def push(self, directory: Path, progress: Progress = no_progress) -> Manifest:
        """Copy a model directory into the store. Files that are there already are not sent again. CorruptModel: a file differs from the
        manifest."""
        manifest = await asyncio.to_thread(Manifest.load, directory)
        store = await self._made()
        files = files_of(manifest)
        total, done = sum(file.bytes for file in files), 0
        for file in files:
            path = directory / file.name
            await asyncio.to_thread(check_file, path, file, checksum=True)
            if not await self._has(file):
                meter = _Meter(await asyncio.to_thread(path.open, "rb"), partial(_step, progress, file.name, done, total))
                with mapped(f"pushing {file.name}"), meter:
                    options = nats.js.api.ObjectMetaOptions(max_chunk_size=min(_CHUNK_BYTES, self._bus.max_payload // 2))
                    meta = nats.js.api.ObjectMeta(name=_object_name(file), options=options)
                    await store.put(_object_name(file), meter, meta=meta)  # type: ignore[arg-type]  # it only reads
            done += file.bytes
            progress(file.name, done, total)
        with mapped(f"pushing {manifest.name}"):
            await store.put(f"model.{subjects.token(manifest.name)}", manifest.model_dump_json().encode())
        return manifest

    async def pull(
        self,
        name: str,
        directory: Path,
        layers: LayerRange | None = None,
        *,
        embed: bool = True,
        head: bool = True,
        progress: Progress = no_progress,
        bytes_per_s: float | None = None,
    ) -> Manifest:
        """Copy a model, or what a range of it needs, into `directory`. Files that are there already and right stay as they are.

        A file gets its name only once it is complete. CorruptModel: a file that arrived differs from the manifest.
        """
        manifest = await self.manifest(name)
        files = files_of(manifest, layers, embed=embed, head=head)
        await self.pulling(manifest, files, directory, progress=progress, bytes_per_s=bytes_per_s).run()
        return manifest

    def pulling(
        self,
        manifest: Manifest,
        files: list[FileInfo],
        directory: Path,
        *,
        progress: Progress = no_progress,
        bytes_per_s: float | None = None,
    ) -> Pull:
        """A pull of `files` that is to be run or started. `bytes_per_s`: at most so fast."""
        known = KnownFiles(cache_directory() / "files")
        return Pull(self._bus, self._find, manifest, files, directory, known, bytes_per_s=bytes_per_s, progress=progress)

    async def pull_description(self, name: str, directory: Path | None = None) -> Path:
        """Copy everything but the blocks (manifest, tokenizer, chat template) into `directory` (None: the cache's folder). Returns the
        folder."""
        manifest = await self.manifest(name)
        directory = directory or kept_at(manifest)
        await self.pulling(manifest, list(manifest.extra_files), directory).run()
        return directory

    async def remove(self, name: str) -> int:
        """Remove a model, and the files that no other model of the store has; returns their bytes. Copies that shards keep stay.
        ModelNotFound: no such model was pushed."""
        manifest = await self.manifest(name)
        others = [await self.manifest(other) for other in await self.names() if other != name]
        kept = {file.sha256 for other in others for file in files_of(other)}
        store, freed, removed = await self._open(), 0, set[str]()
        with mapped(f"removing {name}"):
            await store.delete(f"model.{subjects.token(name)}")  # first: a model that can be seen is complete
            for file in files_of(manifest):
                if file.sha256 in kept or file.sha256 in removed:
                    continue
                removed.add(file.sha256)
                with suppress(nats.js.errors.NotFoundError):  # it was lost before
                    await store.delete(_object_name(file))
                    freed += file.bytes
        return freed

    async def _find(self, file: FileInfo) -> StoredObject:
        with mapped(f"fetching {file.name}"):
            try:
                info = await (await self._open()).get_info(_object_name(file))
            except nats.js.errors.NotFoundError:
                raise CorruptModel(f"{file.name} is not in the object store: push the model again") from None
        if not _is_object_of(info, file):
            more = f", with more than the {file.bytes:,} bytes that were announced" if (info.size or 0) > file.bytes else ""
            raise CorruptModel(f"{file.name} of the object store does not match the manifest{more}: push the model again")
        return _stored_object(info, file, self._bus.max_payload)

    async def _has(self, file: FileInfo) -> bool:
        """Whether the store has the file, with all its chunks."""
        try:
            return not await missing_chunks(self._bus, await self._find(file))
        except CorruptModel:
            return False

    async def _open(self) -> nats.js.object_store.ObjectStore:
        """The store. NotFoundError: nothing was ever pushed."""
        if self._store is None:
            self._store = await self._bus.client.jetstream(timeout=_API_S).object_store(subjects.OBJECTS_MODELS)
            await spread(self._bus, f"OBJ_{subjects.OBJECTS_MODELS}")
        return self._store

    async def _made(self) -> nats.js.object_store.ObjectStore:
        """The store, made if it is not there. Only those who push may make it."""
        js = self._bus.client.jetstream(timeout=_API_S)
        with mapped("opening the object store"):
            try:
                return await self._open()
            except nats.js.errors.NotFoundError:
                self._store = await replicated(self._bus, lambda count: js.create_object_store(subjects.OBJECTS_MODELS, replicas=count))
        return self._store


def _object_name(file: FileInfo) -> str:
    return f"sha256.{file.sha256}"


def _is_object_of(info: nats.js.api.ObjectInfo, file: FileInfo) -> bool:
    """Whether an object says that it is this file."""
    digest = base64.urlsafe_b64encode(bytes.fromhex(file.sha256)).decode()
    return info.size == file.bytes and info.digest == f"SHA-256={digest}"


def _stored_object(info: nats.js.api.ObjectInfo, file: FileInfo, default_chunk_bytes: int) -> StoredObject:
    """The object of a file from what the store says of it."""
    chunk_bytes = (info.options and info.options.max_chunk_size) or default_chunk_bytes
    bucket = subjects.OBJECTS_MODELS
    return StoredObject(file.name, f"OBJ_{bucket}", f"$O.{bucket}.C.{info.nuid}", info.chunks or 0, chunk_bytes)


def _step(progress: Progress, name: str, before: int, total: int, count: int) -> None:
    progress(name, before + count, total)


class _Meter(io.RawIOBase):
    """A file that says how far it is read."""

    def __init__(self, inner: BinaryIO, progress: Callable[[int], None]) -> None:
        self._inner = inner
        self._progress = progress
        self._count = 0

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        count = self._inner.readinto(buffer)  # type: ignore[attr-defined]
        self._count += count
        self._progress(self._count)
        return int(count)

    def close(self) -> None:
        self._inner.close()
        super().close()


class _Bounded(io.BytesIO):
    """Memory for so many bytes; CorruptModel for the first one more."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if self.tell() + len(data) > self._limit:
            raise CorruptModel(f"the object store holds more than the {self._limit:,} bytes that were announced: push the model again")
        return super().write(data)
