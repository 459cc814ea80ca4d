"""A file of a model that grows in a directory until it is whole and right."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Final

from mesh.errors import ConfigError, CorruptModel
from mesh.host.paths import open_inside
from mesh.model.manifest import FileInfo

__all__ = ["PartFile", "size_of", "writing"]

_COPY_BYTES: Final = 4 * 1024 * 1024


class PartFile:
    """A file that grows, and the checksum of what is in it. Its methods block: call them in a thread. ConfigError: it cannot be written."""

    def __init__(self, file: IO[bytes], wanted: FileInfo) -> None:
        self._file = file
        self._path = Path(file.name)
        self._wanted = wanted
        self._digest = hashlib.sha256()
        self.size = size_of(self._path)

    def __enter__(self) -> PartFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with writing(self._path):  # what a full disk did not take is tried once more
            self._file.close()

    def keep(self, size: int) -> None:
        """Drop what is behind `size` bytes."""
        with writing(self._path):
            self._file.truncate(size)
            self._file.seek(0)
            self._digest = hashlib.sha256()
            while piece := self._file.read(_COPY_BYTES):
                self._digest.update(piece)
        self.size = size

    def append(self, chunks: list[bytes]) -> None:
        """CorruptModel: that is more than the file has."""
        for chunk in chunks:
            self.size += len(chunk)
            if self.size > self._wanted.bytes:
                raise CorruptModel(
                    f"{self._wanted.name}: the object store holds more than the {self._wanted.bytes:,} bytes that were announced: "
                    "push the model again"
                )
            self._digest.update(chunk)
            with writing(self._path):
                self._file.write(chunk)

    def copy(self, source: Path) -> bool:
        """Fill it from another file. False, and nothing is in it: that one has another content."""
        self.keep(0)
        with suppress(OSError, CorruptModel), open_inside(source.parent, source.name) as file:
            while piece := file.read(_COPY_BYTES):
                self.append([piece])
        if self.is_right():
            return True
        self.keep(0)
        return False

    def is_right(self) -> bool:
        """Whether it is the file that is wanted. All of it is in the system's hands then."""
        with writing(self._path):
            self._file.flush()
        return self.size == self._wanted.bytes and self._digest.hexdigest() == self._wanted.sha256


def size_of(path: Path) -> int:
    """Bytes; 0 where there is no such file."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the system about `path` as ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}): make room, or give another directory") from None
