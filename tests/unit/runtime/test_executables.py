"""Compiled programs are kept in files and found again without tracing. Whatever is wrong with a file costs a compilation."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import serialize_executable

from mesh.host.locks import try_lock
from mesh.runtime import executables
from mesh.runtime.executables import Executables


class Traced:
    """A function that counts how often it is traced. `meanwhile` is called then."""

    def __init__(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.times = 0
        self._meanwhile = meanwhile

    def jitted(self) -> Any:
        """As another process would have it: JAX remembers nothing of it."""

        def double(state: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            self.times += 1
            self._meanwhile()
            return state + 1, 2 * x

        return jax.jit(double, donate_argnums=0)

    def compiled(self, kept: Executables, key: object = "double", size: int = 3) -> None:
        """Get it, and see that it computes."""
        shape = jax.ShapeDtypeStruct((size,), np.float32)
        run = kept.get(key, self.jitted(), (shape, shape), {})
        state = jnp.zeros(size)
        counted, doubled = run(state, np.ones(size, np.float32))
        assert counted.tolist() == [1] * size and doubled.tolist() == [2] * size
        assert state.is_deleted()


@pytest.fixture
def kept(tmp_path: Path) -> Executables:
    return Executables(tmp_path / "executables" / "here")


def test_a_program_is_traced_once(kept: Executables) -> None:
    traced = Traced()
    for _ in range(3):
        traced.compiled(kept)
    assert traced.times == 1
    assert len(list(kept.directory.iterdir())) == 1


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_program_that_others_may_write_to_is_not_loaded(kept: Executables, mode: int) -> None:
    traced = Traced()
    traced.compiled(kept)
    (file,) = kept.directory.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(mode)
    traced.compiled(kept)
    assert traced.times == 2
    assert next(kept.directory.iterdir()).stat().st_mode & 0o777 == 0o600


def test_other_keys_and_other_shapes_are_other_programs(kept: Executables) -> None:
    traced = Traced()
    for key, size in (("double", 3), ("double", 4), ("other", 3)):
        traced.compiled(kept, key, size)
    assert traced.times == 3 == len(list(kept.directory.iterdir()))


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: b""])
def test_a_damaged_file_is_made_again(kept: Executables, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture) -> None:
    traced = Traced()
    traced.compiled(kept)
    (path,) = kept.directory.iterdir()
    good = path.read_bytes()
    path.write_bytes(damage(good))
    traced.compiled(kept)
    assert traced.times == 2 and "damaged" in caplog.text
    traced.compiled(kept)
    assert traced.times == 2
    assert path.stat().st_size > 100


def test_a_program_that_cannot_be_loaded_here_is_compiled_again(kept: Executables, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = Traced()
    traced.compiled(kept)

    def refuse(*_: object) -> None:
        raise RuntimeError("built for another processor")

    monkeypatch.setattr(serialize_executable, "deserialize_and_load", refuse)
    traced.compiled(kept)
    assert traced.times == 2


def test_one_compiles_and_the_others_wait_and_load(kept: Executables, monkeypatch: pytest.MonkeyPatch) -> None:
    compiles, waits, may_end = threading.Event(), threading.Event(), threading.Event()

    def trace_slowly() -> None:
        compiles.set()
        assert may_end.wait(60)

    def tried(file: Any) -> bool:
        locked = try_lock(file)
        if not locked:
            waits.set()
        return locked

    monkeypatch.setattr(executables, "try_lock", tried)
    slow, other = Traced(trace_slowly), Traced()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(slow.compiled, kept)
        assert compiles.wait(60)
        second = pool.submit(other.compiled, kept)
        assert waits.wait(60)
        may_end.set()
        first.result(), second.result()
    assert (slow.times, other.times) == (1, 0)
    assert [path.suffix for path in kept.directory.iterdir()] == [""]


def test_who_compiles_is_not_waited_for_for_ever(kept: Executables, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executables, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(executables, "try_lock", lambda file: False)
    traced = Traced()
    traced.compiled(kept)
    assert traced.times == 1


def test_loaded_programs_can_be_forgotten(kept: Executables) -> None:
    traced = Traced()
    for key in ("double", "double", "other"):
        traced.compiled(kept, key)
    executables.forget_loaded()
    assert len(list(kept.directory.iterdir())) == 1  # "other" was made here
    traced.compiled(kept)
    assert traced.times == 3


def test_a_directory_that_cannot_be_written_is_not_needed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    traced = Traced()
    traced.compiled(Executables(tmp_path / "file" / "here"))
    assert traced.times == 1


def test_environments_that_are_not_used_any_more_are_removed(tmp_path: Path) -> None:
    traced = Traced()
    for number in range(6):
        kept = Executables(tmp_path / str(number))
        traced.compiled(kept)
        os.utime(kept.directory, (number, number))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3", "4", "5"]
