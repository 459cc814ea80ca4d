"""One connection to NATS: it reconnects for ever, and every limit is checked before a write.

nats-py compares max_payload with the payload alone. The server counts headers too, and closes the connection over a message that is too
large. Also, nats-py's subscriptions drop messages that come too fast. Here a message that is too large is an error before anything is sent,
and dropped messages are counted. Frames take the short path of transport.py: `post` and `subscribe_direct`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import nats
import nats.aio.client
import nats.aio.msg
import nats.aio.subscription
import nats.errors

from mesh.bus.mapping import is_refusal, mapped, mapped_error
from mesh.bus.options import BusOptions, without_password
from mesh.bus.transport import DirectTransport
from mesh.bus.websocket import WebSocketTransport
from mesh.errors import ConfigError, DeadlineExceeded, Denied, MeshError, MessageRejected, PayloadTooLarge, Unavailable
from mesh.protocol.failures import ErrorReply
from mesh.protocol.generation import public_id
from mesh.protocol.headers import REQUEST_HEADER, SESSION_HEADER
from mesh.protocol.message import Message
from mesh.protocol.subjects import is_inbox
from mesh.protocol.topics import Address
from mesh.settings.units import format_bytes
from mesh.telemetry.seldom import Seldom

__all__ = ["DENIED", "ERROR_CODE_HEADER", "ERROR_HEADER", "Bus", "Received", "Subscription", "end_tasks", "reply_error"]

log = logging.getLogger("mesh.bus")
seldom = Seldom(log)

ERROR_HEADER = "Nats-Service-Error"
ERROR_CODE_HEADER = "Nats-Service-Error-Code"

M = TypeVar("M", bound=Message)
R = TypeVar("R", bound=Message)
T = TypeVar("T")

_PENDING_BYTES = 8 * 1024 * 1024  # so much is kept to be sent after a reconnection; beyond that publishing is Unavailable
_ERROR_CHARACTERS = 2000  # of an error's message and of its field; an error that is too large to be sent would tell nobody anything
_RECONNECT_WAIT_S = 0.25
_FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
_FLUSH_S = 30.0  # longer than it takes to notice a server that stands still and to find another one
_PING_INTERVAL_S = 5  # a connection that leaves two of these unanswered is closed
_LISTEN_S = 0.5
_SILENT_PINGS = 4
"""A connection on which nothing at all arrived for so many intervals of _LISTEN_S is closed, although the server was asked for a sign of
life in each: the server stands still, or the network brings nothing from it any more. What is still written there would look like life
to others."""
_SUBJECT = re.compile(r"[!-~]+")
DENIED = re.compile(r"permissions violation for (publish|subscription) to \"([^\"]+)\"", re.IGNORECASE)
"""The server's error, which comes on its own, for a message or a subscription that this user may not send or have. nats-py has made it
lower-case, and the subject with it."""


@lru_cache(maxsize=1024)
def _is_subject(text: str) -> bool:
    return _SUBJECT.fullmatch(text) is not None


def _line(subject: str, reply: str, size: int, headers: Mapping[str, str] | None = None) -> bytes:
    """The protocol's line of a message with a payload of `size` bytes, and its headers."""
    if headers is None:
        return f"PUB {subject} {reply} {size}\r\n".encode()
    block = "".join(["NATS/1.0\r\n", *(f"{key}: {value}\r\n" for key, value in headers.items()), "\r\n"]).encode()
    return f"HPUB {subject} {reply} {len(block)} {len(block) + size}\r\n".encode() + block


@dataclass(frozen=True, slots=True)
class Received:
    """A message. `reply` is empty if the sender expects no answer."""

    subject: str
    reply: str
    data: bytes
    headers: Mapping[str, str]


Handler = Callable[[Received], Awaitable[None]]


class Subscription:
    """A subscription, made by Bus.subscribe. `stop` ends it; messages that have arrived are still handled."""

    def __init__(self, inner: nats.aio.subscription.Subscription, ended: Callable[[], object] = lambda: None) -> None:
        self._inner = inner
        self._ended = ended

    async def stop(self) -> None:
        try:
            await self._inner.drain()
        except (nats.errors.ConnectionClosedError, nats.errors.BadSubscriptionError):
            return  # it has ended already
        except nats.errors.Error as error:
            log.debug("ending a subscription: %s", error)
        finally:
            self._ended()


class _Client(nats.aio.client.Client):
    """nats-py's client, which answers to inboxes alone, with two faults repaired. It stops reading when the answer to a flush arrives that
    was given up meanwhile. And its pings overtake messages that were sent before: a flush would report a subscription that the server
    does not have yet.

    A request whose answer would go to another subject than an inbox is dropped here, before any handler has it, and counted in
    `refused_replies`. Messages that come to an inbox of this connection are answers, and JetStream's deliveries; these may carry any
    reply subject.

    It also closes a connection that is silent, much sooner than by the answers to its pings alone: those wait behind whatever the server
    sends, so that a slow network needs patience. A connection on which anything arrives is not silent.
    """

    refused_replies = 0
    make_tls: Callable[[], ssl.SSLContext | None] | None = None
    _tls: ssl.SSLContext | None = None
    wants_tls = False

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        """Also refuses a server without TLS where this side is to have it: nats-py would go on in plain text."""
        if initial_connection and self.wants_tls and not info.get("tls_required"):
            raise nats.errors.SecureConnWantedError
        await super()._process_info(info, initial_connection)

    @property
    def ssl_context(self) -> ssl.SSLContext:
        """Of the next handshake: made from the files as they are now, so that a certificate may be renewed while this process runs. Files
        that are wrong now, such as a certificate whose key is still being written, leave the context as it was."""
        try:
            made = None if self.make_tls is None else self.make_tls()
        except MeshError as error:
            if self._tls is None:
                raise
            log.warning("TLS files cannot be used, those before serve on: %s", error)
        else:
            self._tls = super().ssl_context if made is None else made
        return self._tls

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        if reply and not self._may_answer(sid, reply):
            self.refused_replies += 1
            log.debug("dropped a request on %r, whose answer would go to %r", subject, reply)
            return
        await super()._process_msg(sid, subject, reply, data, headers)

    def _may_answer(self, sid: int, reply: bytes) -> bool:
        subscription = self._subs.get(sid)
        mine = subscription is not None and subscription.subject.startswith(f"{self._inbox_prefix.decode()}.")
        return mine or is_inbox(reply.decode("utf-8", "replace"))

    async def _ping_interval(self) -> None:
        direct = self._transport if isinstance(self._transport, DirectTransport) else None
        ticks = silent = 0
        read = -1
        while True:
            await asyncio.sleep(_LISTEN_S if direct is not None else _PING_INTERVAL_S)
            if not self.is_connected:
                continue
            ticks += 1
            due = direct is None or ticks % round(_PING_INTERVAL_S / _LISTEN_S) == 0
            if direct is not None:
                silent, read = (silent + 1 if direct.reads == read and not direct.holding else 0), direct.reads
            self._pings_outstanding += due
            if silent > _SILENT_PINGS or self._pings_outstanding > self.options["max_outstanding_pings"]:
                if direct is not None:
                    direct.abort()  # nothing that is still to be written would ever be taken
                await self._process_op_err(nats.errors.StaleConnectionError())
                return
            try:
                if due or silent:
                    await self._send_ping()
            except (RuntimeError, AttributeError):  # it ends; nats-py does the same
                return

    async def _send_ping(self, future: asyncio.Future[Any] | None = None) -> None:
        if self.is_connected and self._transport and self._pending_data_size:
            self._transport.writelines(self._pending)
            self._pending, self._pending_data_size = [], 0
        await super()._send_ping(future)

    async def _process_pong(self) -> None:
        if self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()  # takes the answer to the flush that was given up
        await super()._process_pong()


class Bus:
    """A connection. Its methods raise errors of mesh/errors.py: Unavailable, DeadlineExceeded, Denied, PayloadTooLarge, ...

    `counters`: reconnects, dropped (messages that came faster than they were handled), handler_errors, task_failures (of tasks that
    `keep` began again), and rejected.
    """

    def __init__(self, client: nats.aio.client.Client, options: BusOptions, direct: DirectTransport | None = None) -> None:
        self.client = client
        self._options = options
        self._direct = direct
        self.counters: Counter[str] = Counter()
        self._watchers: list[Callable[[bool], None]] = []
        self._error_watchers: list[Callable[[Exception], None]] = []
        self._deaf: list[str] = []  # subjects that the server refused to give to this user
        self._tasks: set[asyncio.Task[Any]] = set()
        self._flushes: set[asyncio.Future[Any]] = set()  # those that wait for the server's answer
        self._closing = False
        self._connected_once = False
        self._said_last = ""

    @classmethod
    async def connect(cls, options: BusOptions, *, name: str, timeout_s: float | None = 10.0, direct: bool = True) -> Bus:
        """Connect to any one of the servers, trying for `timeout_s` (None: for ever). After that the connection reconnects for ever.
        Without `direct` everything takes nats-py's own path.

        Unavailable: no server answered in that time. Denied: a server answered and refused. ConfigError: TLS or credentials files.
        """
        client = _Client()
        web = any(url.startswith(("ws://", "wss://")) for url in options.urls)
        if web and not all(url.startswith(("ws://", "wss://")) for url in options.urls):
            raise ConfigError("nats.urls: servers are reached either by ws:// and wss://, or by nats:// and tls://: give one kind")
        transport = WebSocketTransport() if web else DirectTransport() if direct else None
        client._transport = transport
        client.make_tls, client.wants_tls = options.ssl_context, options.wants_tls
        bus = cls(client, options, transport)
        refused: list[Exception] = []

        async def on_error(error: Exception) -> None:
            if not client.is_connected and is_refusal(error):
                refused.append(error)
            bus._note(error)

        async def on_lost() -> None:
            bus._deaf.clear()  # the next connection has every subscription anew
            bus._changed(False)

        async def on_back() -> None:
            bus.counters["reconnects"] += 1
            bus._changed(True)
            for answered in list(bus._flushes):  # nats-py forgets pings of the connection before
                if not answered.done():
                    await client._send_ping(answered)

        arguments: dict[str, Any] = {
            **options.arguments(),
            "name": name,
            "error_cb": on_error,
            "disconnected_cb": on_lost,
            "reconnected_cb": on_back,
            "max_reconnect_attempts": -1,
            "reconnect_time_wait": _RECONNECT_WAIT_S,
            "connect_timeout": 2,
            "ping_interval": _PING_INTERVAL_S,
            "pending_size": _PENDING_BYTES,
        }
        where = ", ".join(without_password(url) for url in options.urls)
        with mapped(f"connecting to {where}"):
            connecting = asyncio.ensure_future(client.connect(**arguments))
            deadline = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
            while not connecting.done() and not refused:
                left = None if deadline is None else deadline - asyncio.get_running_loop().time()
                if left is not None and left <= 0:
                    break
                await asyncio.wait([connecting], timeout=0.1 if left is None else min(left, 0.1))
            if not connecting.done():
                connecting.cancel()
                await asyncio.gather(connecting, return_exceptions=True)
                await client.close()
                if refused:
                    raise refused[0]
                raise Unavailable(f"no NATS server answers at {where}: start one, or give its address with nats.urls or --nats")
            connecting.result()
        bus._connected_once = True
        try:
            with mapped(f"connecting to {where}"):
                await client._init_request_sub()
            await bus.require_subscriptions(name, timeout_s=_FLUSH_S if timeout_s is None else min(timeout_s, _FLUSH_S))
        except BaseException:
            await bus.close()
            raise
        url = client.connected_url
        log.debug("%s is connected to %s", name, where if url is None else without_password(url.geturl()))
        return bus

    async def another(self, name: str) -> Bus:
        """One more connection to the same servers as the same user, for what may come in any amount and must not hold up this one."""
        return await Bus.connect(self._options, name=name)

    # -- state ---------------------------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        return self.client.is_connected

    @property
    def max_payload(self) -> int:
        """The largest size of a message in bytes, headers included."""
        return self.client.max_payload

    @property
    def server_version(self) -> tuple[int, int]:
        """Of the server that this connection has now; (0, 0) where it says nothing that can be read."""
        version = self.client.connected_server_version
        try:
            return version.major, version.minor
        except ValueError:
            return 0, 0

    @property
    def refused_replies(self) -> int:
        """Requests that were dropped because their answers would have gone to another subject than an inbox."""
        return getattr(self.client, "refused_replies", 0)

    def on_change(self, call: Callable[[bool], None]) -> None:
        """Call `call(connected)` whenever the connection is lost or is back."""
        self._watchers.append(call)

    @contextlib.contextmanager
    def hearing_errors(self, call: Callable[[Exception], None]) -> Iterator[None]:
        """Within the block, `call(error)` is called with each error that the server reports on its own, such as a refused publication,
        and none of them is logged."""
        self._error_watchers.append(call)
        try:
            yield
        finally:
            self._error_watchers.remove(call)

    def limit(self, sid: int, most_bytes: Callable[[], int]) -> None:
        """Drop the payloads of longer messages of this subscription as they arrive. Its handler gets them without, with UNREAD_HEADER."""
        if self._direct is not None:
            self._direct.limits[str(sid).encode()] = most_bytes

    def unlimit(self, sid: int) -> None:
        if self._direct is not None:
            self._direct.limits.pop(str(sid).encode(), None)

    # -- sending -------------------------------------------------------------------------------------------------------

    async def publish(self, subject: str, data: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None) -> None:
        """Send one message. PayloadTooLarge: before anything is written. Unavailable: disconnected, and the buffer is full."""
        if headers is None and self.post(subject, data, reply=reply):
            return
        self._require_size(subject, len(data) + _headers_size(headers))
        with mapped(f"publishing to {subject}"):
            await self.client.publish(subject, data, reply=reply, headers=None if headers is None else dict(headers))

    def post(self, subject: str, data: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None) -> bool:
        """Write one message together with everything else that this turn of the event loop writes. Returns False if that is not possible
        now (no connection, or earlier messages still wait): call `publish` then. PayloadTooLarge as for publish. Call it in the event
        loop's thread. `headers`: of this program alone, for what is in them is not checked."""
        direct = self._short_way(subject, len(data), reply, headers)
        return direct is not None and direct.send(_line(subject, reply, len(data), headers), data)

    def post_now(self, subject: str, data: bytes, *, headers: Mapping[str, str] | None = None) -> bool:
        """Write one message at once, from any thread; for urgent messages. Returns False as `post` does, and under TLS:
        call `post` then."""
        direct = self._short_way(subject, len(data), "", headers)
        return direct is not None and direct.send_now(_line(subject, "", len(data), headers), data)

    def _short_way(self, subject: str, size: int, reply: str, headers: Mapping[str, str] | None) -> DirectTransport | None:
        client = self.client
        if not client.is_connected or client._pending_data_size or client.is_draining_pubs:
            return None
        self._require_size(subject, size + _headers_size(headers))
        # nats-py reports what is wrong with any other subject
        return self._direct if _is_subject(subject) and (not reply or _SUBJECT.fullmatch(reply)) else None

    def _require_size(self, subject: str, size: int) -> None:
        limit = self.client.max_payload
        if size > limit > 0:
            raise PayloadTooLarge(
                f"{subject}: a message of {format_bytes(size)} where the server takes {format_bytes(limit)}: "
                "raise max_payload in the server's configuration, or send less at a time",
                size_bytes=size,
                limit_bytes=limit,
            )

    async def send(self, to: Address[M, Any], message: M, *, reply: str = "", headers: Mapping[str, str] | None = None) -> None:
        """Publish a message. It waits for no answer; answers go to the subject `reply`, if one is given."""
        await self.publish(to.subject, message.to_bytes(), reply=reply, headers=headers)

    async def request(self, to: Address[M, R], message: M, *, timeout_s: float) -> R:
        """Send a request and wait for its reply. An error of the other side is raised here; Unavailable: there is no listener."""
        assert to.topic.reply is not None, f"{to} has no reply"
        answer = await self.ask(to.subject, message.to_bytes(), timeout_s=timeout_s)
        return to.topic.reply.parse(answer.data)

    async def ask(self, subject: str, data: bytes, *, timeout_s: float, headers: Mapping[str, str] | None = None) -> Received:
        """A request in bytes, for services of NATS itself. JSON of the mesh goes through `request`."""
        size = len(data) + _headers_size(headers)
        if size > self.client.max_payload > 0:
            raise PayloadTooLarge(f"{subject}: a request of {format_bytes(size)}", size_bytes=size, limit_bytes=self.client.max_payload)
        try:
            with mapped(subject):
                message = await self.client.request(subject, data, timeout=timeout_s, headers=None if headers is None else dict(headers))
        except DeadlineExceeded:
            raise DeadlineExceeded(f"{subject}: no answer within {timeout_s:g} s") from None
        received = _received(message)
        raise_error(received)
        return received

    async def gather(self, subject: str, data: bytes = b"", *, first_s: float = 1.0, quiet_s: float = 0.15) -> list[Received]:
        """Every answer to a question that any number of processes hear: until none came for `quiet_s`, or for `first_s` in all."""
        answers: asyncio.Queue[Received] = asyncio.Queue()
        inbox = self.new_inbox()
        subscription = await self.subscribe(inbox, answers.put)
        found: list[Received] = []
        try:
            await self.publish(subject, data, reply=inbox)
            while True:
                async with asyncio.timeout(quiet_s if found else first_s):
                    answer = await answers.get()
                if answer.headers.get("Status") == "503":
                    break
                found.append(answer)
        except TimeoutError:
            pass
        finally:
            await subscription.stop()
        return found

    async def flush(self, timeout_s: float = _FLUSH_S) -> None:
        """Wait until the server has every subscription, and the messages that were sent. Where the connection is lost meanwhile, the
        server that is found instead is asked; it has the subscriptions. DeadlineExceeded: no server answered in that time."""
        answered = asyncio.get_running_loop().create_future()
        self._flushes.add(answered)
        try:
            with mapped("flushing"):
                if self.client.is_closed:
                    raise nats.errors.ConnectionClosedError
                if self.connected:
                    await self.client._send_ping(answered)
                async with asyncio.timeout(timeout_s):
                    await answered
        finally:
            self._flushes.discard(answered)

    async def require_subscriptions(self, who: str, *, timeout_s: float = _FLUSH_S) -> None:
        """Wait until the server has every subscription. Denied: it refused some since the last call; the error names their subjects, and
        `who` it is that cannot work without them: a role, or a program."""
        await self.flush(timeout_s)
        deaf, self._deaf = self._deaf, []
        if deaf:
            subjects = ", ".join(dict.fromkeys(deaf))
            raise Denied(
                f"this NATS user may not subscribe to {subjects}, and {who} hears nothing without: connect as a user of that role "
                "(`mesh nats users` makes them, with --nats-inbox-prefix where the subject is an inbox), and see `mesh doctor`"
            )

    def new_inbox(self) -> str:
        """A subject that no other process uses."""
        return self.client.new_inbox()

    # -- receiving -----------------------------------------------------------------------------------------------------

    async def subscribe(
        self,
        to: Address[Any, Any] | str,
        handler: Handler,
        *,
        queue: str = "",
        pending_messages: int = 4096,
        pending_bytes: int = 256 * 1024 * 1024,
    ) -> Subscription:
        """Call `handler` with each message, one after the other. Its errors are logged and counted; the subscription goes on.

        A subject that is a text is an inbox, or one of NATS itself.
        """
        subject = str(to)

        async def call(message: nats.aio.msg.Msg) -> None:
            try:
                await handler(_received(message))
            except Exception as error:
                self._not_handled(message.subject, error)

        with mapped(f"subscribing to {subject}"):
            inner = await self.client.subscribe(
                subject, queue=queue, cb=call, pending_msgs_limit=pending_messages, pending_bytes_limit=pending_bytes
            )
        return Subscription(inner)

    async def subscribe_direct(self, to: Address[Any, Any] | str, handler: Callable[[bytes], None]) -> Subscription:
        """Call `handler` with the payload of each message as soon as its bytes arrive. Messages of other subscriptions may be handled later
        although they came earlier. The handler itself limits what it keeps. Its errors are logged and counted; the subscription continues.
        """
        return await self._subscribe_short(
            str(to), handler, lambda message: message.data, None if self._direct is None else self._direct.direct
        )

    async def subscribe_unheard(self, subject: str, handler: Callable[[str], None]) -> Subscription:
        """Call `handler` with the reply subject of each published message that no process listened to, as the server reports it. It is
        called as soon as the report arrives, before messages of `subscribe_direct` that came after it. Other messages are ignored."""

        def unheard(message: nats.aio.msg.Msg) -> str | None:
            return message.subject if (message.headers or {}).get("Status") == "503" else None

        return await self._subscribe_short(subject, handler, unheard, None if self._direct is None else self._direct.unheard)

    async def _subscribe_short(
        self,
        subject: str,
        handler: Callable[[T], None],
        of: Callable[[nats.aio.msg.Msg], T | None],
        calls: dict[bytes, Callable[[T], None]] | None,
    ) -> Subscription:
        """`of`: what the handler gets of a message that nats-py has received. `calls`: the transport's table of direct handlers; None:
        everything takes nats-py's path."""

        def call(what: T) -> None:
            try:
                handler(what)
            except Exception as error:
                self._not_handled(subject, error)

        async def from_client(message: nats.aio.msg.Msg) -> None:
            what = of(message)
            if what is not None:
                call(what)

        with mapped(f"subscribing to {subject}"):
            inner = await self.client.subscribe(subject, cb=from_client)
        if calls is None:
            return Subscription(inner)
        sid = str(inner._id).encode()
        calls[sid] = call
        return Subscription(inner, lambda: calls.pop(sid, None))

    async def respond(self, to: Received, message: Message) -> None:
        """Answer a request; with an error, if the answer is larger than the server takes. Does nothing if no answer is expected."""
        if not to.reply:
            return
        try:
            await self.publish(to.reply, message.to_bytes())
        except PayloadTooLarge as error:
            await self.respond_error(to, error)

    async def respond_error(self, to: Received, error: MeshError) -> None:
        """Answer a request with an error: headers as NATS's convention has them, and a body from which the other side makes the same
        error. The error of a generation names its request."""
        if to.reply:
            data, headers = reply_error(error)
            if SESSION_HEADER in to.headers:
                headers[REQUEST_HEADER] = public_id(to.headers[SESSION_HEADER])
            await self.publish(to.reply, data, headers=headers)

    # -- ending --------------------------------------------------------------------------------------------------------

    def spawn(self, work: Awaitable[Any], name: str) -> asyncio.Task[Any]:
        """Run a task that this bus keeps until it is done. Its errors are logged, and `close` cancels it."""

        async def run() -> Any:
            try:
                return await work
            except asyncio.CancelledError:
                raise
            except MeshError as error:
                self.counters["handler_errors"] += 1
                log.warning("%s: %s", name, error)
            except Exception as error:
                self.counters["handler_errors"] += 1
                seldom.error(name, error)

        task = asyncio.get_running_loop().create_task(run(), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def keep(self, work: Callable[[], Awaitable[None]], name: str) -> asyncio.Task[Any]:
        """Run `work`, which is meant to go on for ever, as `spawn` does. Where it fails unexpectedly it is begun again, after a pause that
        doubles up to LONGEST_PAUSE_S. It ends where `work` returns."""

        async def run() -> None:
            pause_s = _FIRST_PAUSE_S
            while True:
                began = time.monotonic()
                try:
                    return await work()
                except Exception as error:
                    self.counters["task_failures"] += 1
                    seldom.error(f"{name} failed, and is begun again", error)
                if time.monotonic() - began > LONGEST_PAUSE_S:  # it has worked meanwhile
                    pause_s = _FIRST_PAUSE_S
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

        return self.spawn(run(), name)

    async def close(self) -> None:
        """Send what is left, then end. Never raises because of a server that is gone."""
        self._closing = True
        await end_tasks(*self._tasks)
        try:
            if self.client.is_connected:
                await self.client.flush(timeout=1)
        except (TimeoutError, nats.errors.Error, OSError):
            pass
        try:
            await self.client.close()
        except OSError:  # nats-py could not send what was left and stopped half-way: close the rest as well
            self.client._status = nats.aio.client.Client.DISCONNECTED
            with contextlib.suppress(OSError):
                await self.client.close()

    async def __aenter__(self) -> Bus:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _changed(self, connected: bool) -> None:
        if self._closing or not self._connected_once:
            return
        self._said_last = ""
        log.info("NATS %s", "connected again" if connected else "connection lost")
        for call in self._watchers:
            call(connected)

    def _not_handled(self, subject: str, error: Exception) -> None:
        self.counters["rejected" if isinstance(error, MessageRejected) else "handler_errors"] += 1
        if isinstance(error, MeshError):
            log.warning("%s: %s", subject, error)
        else:
            seldom.error(f"handling a message on {subject}", error)

    def _note(self, error: Exception) -> None:
        if self._error_watchers:
            for call in self._error_watchers:
                call(error)
            return
        refused = DENIED.search(str(error))
        if refused is not None and refused[1].lower() == "subscription":
            subscriptions = (subscription.subject for subscription in self.client._subs.values())
            self._deaf.append(next((subject for subject in subscriptions if subject.lower() == refused[2]), refused[2]))
        if isinstance(error, nats.errors.SlowConsumerError):
            self.counters["dropped"] += 1
        ours = mapped_error(error, "NATS")
        said = repr(error) if ours is None else str(ours)
        news = self._connected_once and said != self._said_last  # each attempt to connect fails in the same way
        self._said_last = said
        log.log(logging.WARNING if news else logging.DEBUG, "%s", said)


async def end_tasks(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait for their ends. Cancels again where needed: nats-py swallows a cancellation that comes while it flushes."""
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=0.1)


def reply_error(error: MeshError) -> tuple[bytes, dict[str, str]]:
    """(body, headers) of an error reply."""
    reply = ErrorReply.of(error)
    if len(reply.message) > _ERROR_CHARACTERS or len(reply.field or "") > _ERROR_CHARACTERS:  # it quotes what was sent
        field = None if reply.field is None else reply.field[:_ERROR_CHARACTERS]
        reply = reply.model_copy(update={"message": reply.message[:_ERROR_CHARACTERS], "field": field})
    message = " ".join(reply.message.split())  # a header is one line
    return reply.to_bytes(), {ERROR_HEADER: message, ERROR_CODE_HEADER: str(reply.status)}


def raise_error(message: Received) -> None:
    """Raise the error that a reply carries. Does nothing for any other message."""
    described = message.headers.get(ERROR_HEADER)
    if described is None:
        return
    try:
        error = ErrorReply.parse(message.data).error()
    except MessageRejected:  # another service's error has only the headers
        raise MeshError(described) from None
    raise error


def _received(message: nats.aio.msg.Msg) -> Received:
    return Received(message.subject, message.reply, message.data, message.headers or {})


def _headers_size(headers: Mapping[str, str] | None) -> int:
    """The bytes that the server counts for headers: NATS/1.0 and one line for each."""
    if not headers:
        return 0
    return 12 + sum(len(key.encode()) + len(value.encode()) + 4 for key, value in headers.items())
