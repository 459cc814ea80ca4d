"""How a line of the log looks, and that every key of `logging` takes effect."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mesh.errors import ConfigError
from mesh.settings.schema import LoggingSection
from mesh.telemetry.log_context import log_context, note
from mesh.telemetry.logs import CONTENT, JsonFormatter, TextFormatter, readable, setup_logging

log = logging.getLogger("mesh.test")


@pytest.fixture(autouse=True)
def the_log_as_it_was() -> Iterator[None]:
    """These tests set up the log of the process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:], root.level = handlers, level
    CONTENT.disabled = True


def to_file(tmp_path: Path, **keys: Any) -> Path:
    file = tmp_path / "logs" / "shard.log"
    setup_logging(LoggingSection(file=str(file), **keys), role="shard", name="shard-1")
    return file


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_line_of_a_file_is_one_json_object(tmp_path: Path) -> None:
    file = to_file(tmp_path)
    with log_context(request="abc", trace="0af7651916cd43dd8448eb211c80319c", shard=None):
        log.info("took %d\nrows", 3, extra={"fields": {"rows": 3, "level": "not this one"}})
    (line,) = lines(file)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line == {
        "level": "info",
        "logger": "mesh.test",
        "message": "took 3\nrows",
        "role": "shard",
        "name": "shard-1",
        "pid": os.getpid(),
        "request": "abc",
        "trace": "0af7651916cd43dd8448eb211c80319c",
        "rows": 3,
    }


def test_an_exception_is_fields_of_its_line(tmp_path: Path) -> None:
    file = to_file(tmp_path)
    try:
        raise OverflowError("planted")
    except OverflowError:
        log.exception("computing")
    (line,) = lines(file)
    assert (line["level"], line["message"], line["error_type"], line["error"]) == ("error", "computing", "OverflowError", "planted")
    assert "test_logs.py" in line["traceback"]


def test_format_text_is_a_line_for_people_also_in_a_file(tmp_path: Path) -> None:
    file = to_file(tmp_path, format="text")
    with log_context(request="abc"):
        log.warning("late")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} WARNING mesh\.test: late \[request abc\]\n", file.read_text())


class Terminal:
    """Standard error, as a terminal."""

    def __init__(self, terminal: bool) -> None:
        self.said = ""
        self._terminal = terminal

    def write(self, text: str) -> None:
        self.said += text

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return self._terminal


@pytest.mark.parametrize(("terminal", "chosen", "is_json"), [(True, "auto", False), (False, "auto", True), (True, "json", True)])
def test_the_format_follows_the_terminal_unless_it_is_chosen(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, chosen: Any, is_json: bool
) -> None:
    out = Terminal(terminal)
    monkeypatch.setattr(sys, "stderr", out)
    setup_logging(LoggingSection(format=chosen), role="gateway")
    log.info("here")
    assert out.said.startswith("{") is is_json and "here" in out.said


def test_the_level_decides(tmp_path: Path) -> None:
    file = to_file(tmp_path, level="warning")
    log.info("no")
    log.warning("yes")
    assert [line["message"] for line in lines(file)] == ["yes"]


def test_a_full_file_is_renamed_and_only_so_many_are_kept(tmp_path: Path) -> None:
    file = to_file(tmp_path, max_bytes=2000, backups=2)
    for number in range(100):
        log.info("line %d", number)
    kept = sorted(path.name for path in file.parent.iterdir())
    assert kept == ["shard.log", "shard.log.1", "shard.log.2"]
    assert all(path.stat().st_size <= 2000 for path in file.parent.iterdir())
    assert lines(file)[-1]["message"] == "line 99"


def test_a_file_that_another_program_renames_is_opened_anew(tmp_path: Path) -> None:
    file = to_file(tmp_path, max_bytes=0)
    log.info("before")
    file.rename(file.with_suffix(".old"))
    log.info("after")
    assert [line["message"] for line in lines(file)] == ["after"]


def test_texts_of_prompts_are_logged_only_if_asked_for(tmp_path: Path) -> None:
    file = to_file(tmp_path, level="debug")
    assert not CONTENT.isEnabledFor(logging.INFO)
    CONTENT.info("a prompt")
    assert lines(file) == []
    file = to_file(tmp_path, level="debug", content=True)
    CONTENT.info("a prompt")
    assert [line["message"] for line in lines(file)] == ["a prompt"]


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"logging\.file"):
        setup_logging(LoggingSection(file=str(tmp_path / "file" / "x.log")), role="shard")


def test_the_fields_of_a_request_stay_in_its_task() -> None:
    seen: dict[str, Any] = {}

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen[record.getMessage()] = json.loads(JsonFormatter("test").format(record)).get("request")

    from mesh.telemetry.log_context import ContextFilter

    handler = Keep()
    handler.addFilter(ContextFilter())
    log.addHandler(handler)

    async def one(name: str) -> None:
        with log_context(http_request=name):
            await asyncio.gather(asyncio.create_task(below(name)))
            log.warning("end of %s", name)

    async def below(name: str) -> None:
        await asyncio.sleep(0)
        note(request=f"id-{name}")

    async def both() -> None:
        await asyncio.gather(one("a"), one("b"))
        note(request="outside")
        log.warning("after")

    try:
        asyncio.run(both())
    finally:
        log.removeHandler(handler)
    assert seen == {"end of a": "id-a", "end of b": "id-b", "after": None}


def test_a_json_line_can_be_read_by_people() -> None:
    record = logging.LogRecord("mesh.shard", logging.ERROR, "x.py", 1, "step %d", (3,), None)
    assert readable(JsonFormatter("shard").format(record)) == "error mesh.shard: step 3"
    assert readable("mesh: no such file") == "mesh: no such file"
    assert readable("{broken") == "{broken"
    assert "step 3" in TextFormatter(colours=True).format(record)
