"""Prompts become token ids in processes that can be ended: see prompt_process.

Two lanes, a process each. Short prompts never wait behind long ones. A process that takes longer than `timeout_s` for one prompt, or
dies of it, is replaced, and that prompt alone is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson

from mesh.coordinator.prompt_process import ERROR, LENGTH, MOST_ANSWER_BYTES, TEMPLATE_AS_USUAL, ChatOptions
from mesh.errors import BadRequest, Busy, CorruptModel, MeshError
from mesh.protocol.failures import ErrorReply

__all__ = ["PromptPool"]

log = logging.getLogger("mesh.coordinator")

SHORT_CHARACTERS: Final = 4000
"""A prompt of up to so many characters takes the first lane: a few milliseconds."""
_LONG_NICE: Final = 10
_START_S: Final = 60.0
_MEMORY_BYTES: Final = 2 * 1024**3
"""Of address space; a tokenizer of 150,000 tokens takes some 300 MB of it."""


class PromptPool:
    """Start it with `start`, end it with `stop`. `counters`: prompts, late (ended for their time), died.

    digest: of the manifest that the processes must find in `directory` (None: any).

    timeout_s: for one prompt. queue_limit, long_limit: short and long prompts that may wait. Long prompts give way to everything else
    on the machine's processors.
    """

    def __init__(
        self, directory: Path, *, digest: str | None = None, timeout_s: float = 5.0, queue_limit: int = 256, long_limit: int = 16
    ) -> None:
        self.counters: Counter[str] = Counter()
        command = (str(directory), digest or "")
        short = _Lane(command, timeout_s, queue_limit, self.counters, nice=0)
        self._lanes = (short, _Lane(command, timeout_s, long_limit, self.counters, nice=_LONG_NICE))

    async def start(self) -> None:
        """CorruptModel where the tokenizer cannot be read within its limits of time and memory. The lane of long prompts starts with
        the first one."""
        await self._lanes[0].start()

    async def stop(self) -> None:
        await asyncio.gather(*(lane.stop() for lane in self._lanes))

    async def tokenize(
        self, *, prompt: str | None, messages: list[dict[str, Any]] | None, raw: bool, options: ChatOptions = TEMPLATE_AS_USUAL
    ) -> list[int]:
        """Token ids. BadRequest: the template or the tokenizer refuses it, or takes too long or too much memory. Busy: too many wait."""
        size = len(prompt or "") + sum(len(str(message.get("content") or "")) for message in messages or ())
        lane = self._lanes[size > SHORT_CHARACTERS]
        self.counters["prompts"] += 1
        return await lane.tokenize({"prompt": prompt, "messages": messages, "raw": raw, "options": options})


class _Lane:
    """One process, and the prompts that wait for it. `model`: its directory, and the digest of its manifest or nothing."""

    def __init__(self, model: tuple[str, str], timeout_s: float, queue_limit: int, counters: Counter[str], *, nice: int) -> None:
        self._model = model
        self._timeout_s = timeout_s
        self._queue_limit = queue_limit
        self._counters = counters
        self._nice = nice
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._turn = asyncio.Lock()  # first come, first served
        self._waiting = 0

    async def start(self) -> None:
        command = [sys.executable, "-m", "mesh.coordinator.prompt_process", *self._model, str(_MEMORY_BYTES), str(self._nice)]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}  # threads of its own gain nothing for one text
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno(), env=environment)
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        try:
            async with asyncio.timeout(_START_S):
                answer = await self._receive()
        except (TimeoutError, EOFError) as error:
            await self._end()
            why = "takes too long" if isinstance(error, TimeoutError) else "ends the process that reads it"
            raise CorruptModel(f"the tokenizer or the chat template of {self._model[0]} {why}: import the model again") from None
        if answer[:1] == ERROR:
            await self._end()
            raise CorruptModel(ErrorReply.parse(answer[1:]).message)

    async def stop(self) -> None:
        async with self._turn:
            await self._end()

    async def tokenize(self, request: dict[str, Any]) -> list[int]:
        if self._waiting >= self._queue_limit:
            raise Busy("too many prompts wait to be tokenized: try again in 1 s", retry_after_s=1.0)
        self._waiting += 1
        try:
            async with self._turn:
                answer = await self._ask(orjson.dumps(request), "prompt" if request["messages"] is None else "messages")
        finally:
            self._waiting -= 1
        if answer[:1] == ERROR:
            raise ErrorReply.parse(answer[1:]).error()
        return np.frombuffer(answer, np.int32, offset=1).tolist()

    async def _ask(self, data: bytes, field: str) -> bytes:
        if self._process is None:  # the first prompt of its lane, or the last one ended the process
            try:
                await self.start()
            except MeshError as error:
                raise BadRequest(f"the model's tokenizer does not start: {error}", field=field) from None
        assert self._writer is not None
        try:
            async with asyncio.timeout(self._timeout_s):
                self._writer.write(LENGTH.pack(len(data)) + data)
                await self._writer.drain()
                return await self._receive()
        except TimeoutError:
            self._counters["late"] += 1
            why = f"the model's chat template and tokenizer took longer than {self._timeout_s:g} s for it"
        except (EOFError, ConnectionError):
            self._counters["died"] += 1
            why = "the model's chat template and tokenizer need more memory for it than they may have"
        except asyncio.CancelledError:  # what it still answers would be taken for the next prompt's
            await self._end()
            raise
        log.warning("a prompt of %d bytes is refused: %s", len(data), why)
        await self._end()
        raise BadRequest(f"{why}: shorten it", field=field)

    async def _receive(self) -> bytes:
        """EOFError where the process has ended, or says more than an answer can be."""
        assert self._reader is not None
        (size,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))  # IncompleteReadError is an EOFError
        if size > MOST_ANSWER_BYTES:
            raise EOFError
        return await self._reader.readexactly(size)

    async def _end(self) -> None:
        process, writer = self._process, self._writer
        self._process = self._reader = self._writer = None
        if process is not None:
            process.kill()
        if writer is not None:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        if process is not None:
            await asyncio.to_thread(process.wait)
