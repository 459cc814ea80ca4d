"""Compiled programs on disk, found by names that need no tracing.

JAX keeps compiled programs as well, but finds them by their lowered form, so a process that starts again traces and lowers every
program: half of its start. Here the name of a program is a digest of what it is made from: the block's signature, the shapes and types
of its arguments, and the environment. The environment is the code of this package that takes part, the versions of JAX, the processor,
and XLA's options.

    CACHE/executables/ENVIRONMENT/PROGRAM    SHA-256 of the rest, then a pickle of the executable as JAX serialises it

A program that is damaged or cannot be loaded here is compiled again. If a file cannot be written, the program is just not kept. After a
failed computation, the files that were loaded are removed (`forget_loaded`), so that the next process does not fail in the same way.
Of several processes that want the same program, the shards of one machine, one compiles it and the others wait and load it.
A program is code, and JAX's own form of it is a pickle. So only files are loaded that belong to this user and that no other user may
write to. A program never comes from a model, from NATS or from another machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import shutil
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import jax
import jaxlib.version
from jax.experimental import serialize_executable

import mesh
from mesh.host.locks import try_lock
from mesh.host.paths import cache_directory
from mesh.host.processor import processor_features
from mesh.kernels.library import kernels
from mesh.runtime.device import keeps_programs

__all__ = ["Executables", "forget_loaded"]

log = logging.getLogger("mesh.runtime")

_CODE: Final = ("kernels", "lowering", "runtime", "protocol")  # the protocol says which columns the sampler reads
_ENVIRONMENTS: Final = 4
"""How many are kept, those used last: a new version of anything begins an empty one."""
_DIGEST_BYTES: Final = 32
_PATIENCE_S: Final = 120.0
"""How long another process's compilation is waited for: that process may be suspended."""

_loaded: set[Path] = set()


def forget_loaded() -> None:
    """Remove every file that this process has loaded a program from."""
    for path in _loaded:
        with contextlib.suppress(OSError):
            path.unlink()
    _loaded.clear()


class Executables:
    """The programs of one environment, in `directory`, which is created when the first one is kept."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @classmethod
    def of_this_process(cls) -> Executables | None:
        """The programs of this process's environment; None if nothing is to be kept."""
        return cls(cache_directory() / "executables" / _environment()) if keeps_programs() else None

    def get(self, key: object, jitted: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """`jitted`, compiled for `args` (arrays, or their shapes and types) with XLA's `options`. `key` distinguishes programs of equal
        shapes; its repr must be the same in every process."""
        path = self.directory / _program(key, args)
        found = self._load(path)
        if found is not None:
            return found
        with _alone(path) as waited:
            return (waited and self._load(path)) or self._make(path, jitted, args, options)

    def _load(self, path: Path) -> Any:
        try:
            with path.open("rb") as file:
                trusted = _only_ours(os.fstat(file.fileno()))
                data = file.read() if trusted else b""
        except OSError:
            return None
        if not trusted:
            log.warning("%s belongs to another user, or others may write to it: compiling it again", path)
            return None
        if hashlib.sha256(data[_DIGEST_BYTES:]).digest() != data[:_DIGEST_BYTES]:
            log.warning("%s is damaged: compiling it again", path)
            return None
        try:
            program = serialize_executable.deserialize_and_load(*pickle.loads(data[_DIGEST_BYTES:]))
        except Exception as error:  # from JAX, XLA or pickle: in any case compiling again repairs it
            log.warning("%s cannot be loaded (%r): compiling it again", path, error)
            return None
        _loaded.add(path)
        return program

    def _make(self, path: Path, jitted: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        compiled = jitted.lower(*args).compile(compiler_options=options)
        try:
            data = pickle.dumps(serialize_executable.serialize(compiled))
        except Exception as error:  # a backend that cannot serialise
            log.debug("%s is not kept: %r", path.name, error)
            return compiled
        part = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.part")
        with contextlib.suppress(OSError):
            _begin(path.parent)
            part.touch(mode=0o600)
            part.write_bytes(hashlib.sha256(data).digest() + data)
            part.replace(path)
        return compiled


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Keep other processes from compiling this program meanwhile. True: one of them did, and this one has waited for it."""
    waited = False
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a cache that cannot be written keeps nobody from compiling
            _begin(path.parent)
            lock = path.with_suffix(".lock")
            file = stack.enter_context(lock.open("wb"))
            until = time.monotonic() + _PATIENCE_S
            while not (locked := try_lock(file)) and time.monotonic() < until:
                waited = True
                time.sleep(0.02)
            if locked:
                stack.callback(lock.unlink, missing_ok=True)
        yield waited


def _begin(environment: Path) -> None:
    if not environment.exists():
        environment.mkdir(mode=0o700, parents=True, exist_ok=True)
        _forget_old(environment.parent)


def _only_ours(found: os.stat_result) -> bool:
    """Whether nobody but this user and root can have written the file: loading a program runs what it says."""
    return not hasattr(os, "getuid") or (found.st_uid in (os.getuid(), 0) and not found.st_mode & 0o022)


def _program(key: object, args: tuple[Any, ...]) -> str:
    leaves, tree = jax.tree.flatten(args)
    shapes = [(leaf.shape, str(leaf.dtype)) for leaf in leaves]
    return hashlib.sha256(repr((key, str(tree), shapes)).encode()).hexdigest()[:40]


@cache
def _environment() -> str:
    """A digest of what programs depend on besides their key and arguments."""
    digest = hashlib.sha256()
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    set_here: Any = jax.config  # its attributes are made as it is imported
    told = (os.environ.get("XLA_FLAGS", ""), set_here.jax_default_matmul_precision, set_here.jax_enable_x64, kernels().digest)
    versions = (jax.__version__, jaxlib.version.__version__, device.client.platform_version)
    digest.update(repr((versions, device.platform, device.device_kind, os.cpu_count(), cores, told, processor_features())).encode())
    root = Path(mesh.__file__).parent
    for folder in _CODE:
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(f"{file.relative_to(root)}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _forget_old(directory: Path) -> None:
    """Keep the environments that were begun last, and remove the others."""
    found = sorted((path for path in directory.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found[_ENVIRONMENTS:]:
        shutil.rmtree(path, ignore_errors=True)
