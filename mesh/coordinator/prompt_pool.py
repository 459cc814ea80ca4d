"""Prompts become token ids, token ids a text, and forms of answers grammars, in processes that can be ended: see prompt_process.

Three lanes, a process each: short prompts never wait behind long ones, nor behind grammars. A process that takes longer than `timeout_s`
for one prompt, or dies of it, is replaced, and that prompt alone is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import orjson

from mesh.coordinator.prompt_process import ERROR, FORM_FIELD, LENGTH, MOST_ANSWER_BYTES, TEMPLATE_AS_USUAL, ChatOptions
from mesh.errors import BadRequest, Busy, CorruptModel, MeshError
from mesh.protocol.failures import ErrorReply
from mesh.protocol.structured import MAX_GRAMMAR_BYTES, MAX_SCHEMA_BYTES, StructuredOutputs

__all__ = ["PromptPool"]

log = logging.getLogger("mesh.coordinator")

SHORT_CHARACTERS: Final = 4000
"""A prompt of up to so many characters takes the first lane: a few milliseconds."""
SHORT_TOKENS: Final = 4000
_LONG_NICE: Final = 10
_START_S: Final = 60.0
_GRAMMAR_S: Final = 2.0
"""For one grammar. The limits of mesh.model.grammar end nearly all of them within 0.1 s."""
_GRAMMARS_WAITING: Final = 64
_GRAMMARS_KEPT: Final = 256
_MEMORY_BYTES: Final = 2 * 1024**3
"""Of address space; a tokenizer of 150,000 tokens takes some 300 MB of it."""


class _What(NamedTuple):
    """What a lane is asked about, in words for errors."""

    one: str
    many: str
    done: str
    work: str
    remedy: str


_PROMPT: Final = _What("prompt", "prompts", "tokenized", "the model's chat template and tokenizer", "shorten it")
_TOKENS: Final = _What("list of tokens", "lists of tokens", "read", "the model's tokenizer", "send fewer at a time")
_FORM: Final = _What("form of an answer", "forms of answers", "checked", "the check of the form of the answer", "ask for a simpler one")


class PromptPool:
    """Start it with `start`, end it with `stop`. `counters`: prompts, grammars (those not known yet), late (ended for their time), died.

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
        self._grammar_lane = _Lane(command, _GRAMMAR_S, _GRAMMARS_WAITING, self.counters, nice=0)
        self._grammars: OrderedDict[bytes, str] = OrderedDict()  # by the form that was asked for

    async def start(self) -> None:
        """CorruptModel where the tokenizer cannot be read within its limits of time and memory. The lane of long prompts starts with
        the first one."""
        await self._lanes[0].start()

    async def stop(self) -> None:
        await asyncio.gather(*(lane.stop() for lane in (*self._lanes, self._grammar_lane)))

    async def tokenize(
        self,
        *,
        prompt: str | None,
        messages: list[dict[str, Any]] | None,
        raw: bool,
        options: ChatOptions = TEMPLATE_AS_USUAL,
        special: bool = True,
        trailing: bool = False,
    ) -> list[int]:
        """Token ids. BadRequest: the template or the tokenizer refuses it, or takes too long or too much memory. Busy: too many wait."""
        size = len(prompt or "") + sum(len(str(message.get("content") or "")) for message in messages or ())
        lane = self._lanes[size > SHORT_CHARACTERS]
        self.counters["prompts"] += 1
        request = {"prompt": prompt, "messages": messages, "raw": raw, "options": options, "special": special, "trailing": trailing}
        answer = await lane.ask(request, _PROMPT, "prompt" if messages is None else "messages")
        return np.frombuffer(answer, np.int32, offset=1).tolist()

    async def text(self, tokens: Sequence[int]) -> str:
        """The text of token ids, control tokens included. BadRequest: the tokenizer refuses them, or takes too much time or memory. Busy:
        too many wait."""
        text: str = await self._decode(tokens, names=False)
        return text

    async def names(self, tokens: Sequence[int]) -> list[str]:
        """Each token as the vocabulary has it; errors as of `text`."""
        names: list[str] = await self._decode(tokens, names=True)
        return names

    async def _decode(self, tokens: Sequence[int], *, names: bool) -> Any:
        lane = self._lanes[len(tokens) > SHORT_TOKENS]
        answer = await lane.ask({"decode": tokens, "names": names}, _TOKENS, "tokens")
        return orjson.loads(answer[1:])

    async def grammar(self, form: StructuredOutputs) -> str:
        """The grammar of a form of answers. BadRequest: it is not supported, contradicts itself, or takes too much time or memory. Busy:
        too many wait."""
        wanted = orjson.dumps(form.request())
        if len(wanted) > 2 * MAX_SCHEMA_BYTES:
            what = f"the form of the answer has {len(wanted):,} bytes: at most {MAX_SCHEMA_BYTES:,} are taken"
            raise BadRequest(what, field=FORM_FIELD)
        return await self._grammar("form", wanted, FORM_FIELD)

    async def tool_grammar(self, calls: dict[str, Any]) -> str | None:
        """The grammar of an answer that may call tools; None where it needs none. `calls`: the fields of Generate about them. Errors as of
        `grammar`."""
        wanted = orjson.dumps(calls)
        if len(wanted) > MAX_GRAMMAR_BYTES:
            raise BadRequest(f"the tools have {len(wanted):,} bytes: at most {MAX_GRAMMAR_BYTES:,} are taken", field="tools")
        return await self._grammar("calls", wanted, "tools") or None

    async def _grammar(self, kind: str, wanted: bytes, field: str) -> str:
        known = self._grammars.get(wanted)
        if known is None:
            self.counters["grammars"] += 1
            known = (await self._grammar_lane.ask({kind: orjson.Fragment(wanted)}, _FORM, field))[1:].decode()
            self._grammars[wanted] = known
            while len(self._grammars) > _GRAMMARS_KEPT:
                self._grammars.popitem(last=False)
        return known


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

    async def ask(self, request: dict[str, Any], what: _What, field: str) -> bytes:
        """The answer to `request`, which is about the field `field`. Raises the error that it is."""
        if self._waiting >= self._queue_limit:
            raise Busy(f"too many {what.many} wait to be {what.done}: try again in 1 s", retry_after_s=1.0)
        self._waiting += 1
        try:
            async with self._turn:
                answer = await self._ask(orjson.dumps(request), what, field)
        finally:
            self._waiting -= 1
        if answer[:1] == ERROR:
            raise ErrorReply.parse(answer[1:]).error()
        return answer

    async def _ask(self, data: bytes, what: _What, field: str) -> bytes:
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
            why = f"{what.work} took longer than {self._timeout_s:g} s for it"
        except (EOFError, ConnectionError):
            self._counters["died"] += 1
            why = f"{what.work} needed more memory for it than there is for that"
        except asyncio.CancelledError:  # what it still answers would be taken for the next prompt's
            await self._end()
            raise
        log.warning("a %s of %d bytes is refused: %s", what.one, len(data), why)
        await self._end()
        raise BadRequest(f"{why}: {what.remedy}", field=field)

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
