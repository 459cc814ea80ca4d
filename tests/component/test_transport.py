"""The direct transport below nats-py, on real servers and with every split of the byte stream."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import TypeVar

import hypothesis.strategies as st
import pytest
from hypothesis import given
from running import Run
from serving import connect

from mesh.bus import Bus, BusOptions, Received
from mesh.bus.transport import Incoming, _Short
from mesh.errors import PayloadTooLarge
from mesh.local.nats_server import NatsServer

T = TypeVar("T")


async def take(queue: asyncio.Queue[T], count: int) -> list[T]:
    return [await queue.get() for _ in range(count)]


def test_direct_messages_of_every_size_come_whole_in_order_between_all_others(run: Run, server: NatsServer) -> None:
    async def work() -> None:
        async with await connect(server) as here, await connect(server) as there:
            direct: asyncio.Queue[bytes] = asyncio.Queue()
            other: asyncio.Queue[Received] = asyncio.Queue()

            await there.subscribe_direct("t.direct", direct.put_nowait)
            await there.subscribe("t.other", other.put)
            await there.flush()
            sizes = [0, 1, 17, 2304, 65_536, 300_001, here.max_payload - 24, 5]
            payloads = [b"\r\nMSG t.direct 1 3\r\n"[:size].ljust(size, b"x") for size in sizes]
            for data in payloads:
                await here.publish("t.direct", data)
                await here.publish("t.other", data)
                await here.publish("t.direct", data, headers={"Key": "value"})  # by nats-py, and still here
            assert sorted(await take(direct, 2 * len(payloads))) == sorted(payloads * 2)
            assert [received.data for received in await take(other, len(payloads))] == payloads

    run(work())


@pytest.mark.parametrize("direct", [True, False])
def test_a_subject_without_listeners_is_known_before_any_later_answer(run: Run, server: NatsServer, direct: bool) -> None:
    async def work() -> None:
        options = BusOptions(urls=(server.url,))
        async with await Bus.connect(options, name="here", direct=direct) as here, await connect(server) as there:
            order: asyncio.Queue[object] = asyncio.Queue()

            async def answer(received: Received) -> None:
                await there.publish("t.answers", received.data)

            await here.subscribe_unheard("t.unheard.*", order.put_nowait)
            await here.subscribe_direct("t.answers", order.put_nowait)
            await there.subscribe("t.asked", answer)
            await there.flush()
            for index in range(50):
                await here.publish("t.nobody", b"", reply=f"t.unheard.{index}")
                await here.publish("t.asked", str(index).encode())
            await here.publish("t.unheard.x", b"no word of the server's")
            got = await take(order, 100)
            if direct:
                for index in range(50):
                    assert got.index(f"t.unheard.{index}") < got.index(str(index).encode())
            assert sorted(map(str, got)) == sorted([*(f"t.unheard.{i}" for i in range(50)), *(str(str(i).encode()) for i in range(50))])

    run(work())


def test_a_post_goes_out_at_once_and_keeps_its_order_with_published_messages(run: Run, server: NatsServer) -> None:
    async def work() -> None:
        async with await connect(server) as here, await connect(server) as there:
            got: asyncio.Queue[Received] = asyncio.Queue()

            await there.subscribe("t.post", got.put)
            await there.flush()
            assert here.post("t.post", b"0")
            await here.publish("t.post", b"1", headers={"Key": "value"})
            assert not here.post("t.post", b"2")  # what was published with headers is still to be written
            await here.publish("t.post", b"2")
            await here.flush()
            assert here.post("t.post", b"3")
            assert [received.data for received in await take(got, 4)] == [b"0", b"1", b"2", b"3"]
            with pytest.raises(PayloadTooLarge):
                here.post("t.post", bytes(here.max_payload + 1))
            assert not here.post("no subject", b"")

    run(work())


def test_a_flush_asks_the_server_after_all_that_was_sent_before_it(run: Run, server: NatsServer) -> None:
    async def work() -> None:
        async with await connect(server) as bus:
            transport = bus.client._transport
            assert transport is not None
            written = bytearray()
            write, writelines = transport.write, transport.writelines

            def one(data: bytes) -> None:
                written.extend(data)
                write(data)

            def many(data: list[bytes]) -> None:
                written.extend(b"".join(data))
                writelines(data)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(transport, "write", one)
                patch.setattr(transport, "writelines", many)
                await bus.subscribe("t.flush", lambda received: asyncio.sleep(0))
                await bus.flush()
            assert 0 <= written.find(b"SUB t.flush") < written.find(b"PING")

    run(work())


def test_nothing_is_posted_without_a_connection_and_direct_subscriptions_are_back_with_it(run: Run, tmp_path: Path) -> None:
    async def work() -> None:
        server = NatsServer.start()
        try:
            async with await connect(server) as bus:
                got: asyncio.Queue[bytes] = asyncio.Queue()
                changes: asyncio.Queue[bool] = asyncio.Queue()
                bus.on_change(changes.put_nowait)
                subscription = await bus.subscribe_direct("t.back", got.put_nowait)
                server.stop()
                assert await changes.get() is False
                assert not bus.post("t.back", b"lost")
                await bus.publish("t.back", b"kept")
                server = NatsServer.start(port=server.port)
                assert await changes.get() is True
                assert await got.get() == b"kept"
                await bus.publish("t.back", b"again")
                assert await got.get() == b"again"
                await subscription.stop()
                await bus.publish("t.back", b"unheard")
                await bus.flush()
                assert got.empty()
        finally:
            server.stop()

    run(work())


def test_an_error_in_a_direct_handler_ends_nothing(run: Run, server: NatsServer) -> None:
    async def work() -> None:
        async with await connect(server) as bus:
            got: asyncio.Queue[bytes] = asyncio.Queue()

            def handler(data: bytes) -> None:
                if data == b"bad":
                    raise ValueError("bad")
                got.put_nowait(data)

            await bus.subscribe_direct("t.bad", handler)
            for data in (b"bad", b"good"):
                await bus.publish("t.bad", data)
            assert await got.get() == b"good"
            assert bus.counters["handler_errors"] == 1 and bus.connected

    run(work())


def test_a_reader_that_does_not_read_stops_posts_and_not_the_loop(run: Run) -> None:
    """The socket takes nothing more. nats-py would queue without end; posts are refused."""

    async def work() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        loop = asyncio.get_running_loop()
        listener.setblocking(False)

        async def serve() -> socket.socket:
            peer, _ = await loop.sock_accept(listener)
            await loop.sock_sendall(peer, b'INFO {"server_id":"x","version":"2.15.0","max_payload":1048576,"headers":true}\r\n')
            for _ in range(2):  # the connection asks twice: to begin, and once it listens to its inbox
                while b"PING" not in await loop.sock_recv(peer, 65536):
                    pass
                await loop.sock_sendall(peer, b"PONG\r\n")
            return peer

        serving = asyncio.ensure_future(serve())
        bus = await Bus.connect(BusOptions((f"nats://127.0.0.1:{listener.getsockname()[1]}",)), name="test")
        peer = await serving
        try:
            data = bytes(512 * 1024)
            assert any(not bus.post("t.full", data) for _ in range(64))
        finally:
            peer.close()
            listener.close()
            await bus.close()

    run(work())


def test_a_cancelled_flush_leaves_the_connection_alone(run: Run, server: NatsServer) -> None:
    async def work() -> None:
        async with await connect(server) as bus:
            got: asyncio.Queue[Received] = asyncio.Queue()

            await bus.subscribe("t.flush", got.put)
            flushing = asyncio.ensure_future(bus.flush())
            while not bus.client._pongs:  # until its question is on the way
                await asyncio.sleep(0)
            flushing.cancel()
            await asyncio.gather(flushing, return_exceptions=True)
            await bus.flush()  # its own answer, after the one to nobody
            await bus.publish("t.flush", b"heard")
            assert (await got.get()).data == b"heard"
            assert bus.connected and bus.counters["reconnects"] == 0

    run(work())


_PAYLOADS = st.lists(
    st.tuples(st.sampled_from(["direct", "other", "headers", "unheard", "answered", "ping"]), st.binary(max_size=40)), max_size=12
)


@given(_PAYLOADS, st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_the_stream_may_be_cut_anywhere(messages: list[tuple[str, bytes]], cuts: list[int]) -> None:
    direct: list[bytes] = []
    unheard: list[str] = []
    protocol = Incoming({b"7": direct.append}, {b"9": unheard.append}, {})
    stream, rest = bytearray(), bytearray()
    for kind, data in messages:
        if kind == "direct":
            stream += b"MSG a.b 7 %s%d\r\n%s\r\n" % (b"reply " if len(data) % 2 else b"", len(data), data)
            continue
        if kind == "headers":  # the handler gets the payload alone, and in order with the others
            head = b"NATS/1.0\r\nMesh-Frame: 1.0\r\n\r\n"
            stream += b"HMSG a.b 7 %d %d\r\n%s%s\r\n" % (len(head), len(head) + len(data), head, data)
            continue
        if kind == "unheard":
            stream += b"HMSG a.b.%d 9 16 16\r\nNATS/1.0 503\r\n\r\n\r\n" % len(data)
            continue
        if kind == "other":
            one = b"MSG a.c 8 %d\r\n%s\r\n" % (len(data), data)
        elif kind == "answered":
            one = b"MSG a.b 9 %d\r\n%s\r\n" % (len(data), data)
        else:
            one = b"PING\r\n"
        stream += one
        rest += one
    at, turn = 0, 0
    while at < len(stream):
        count = cuts[turn % len(cuts)]
        protocol.data_received(bytes(stream[at : at + count]))
        at, turn = at + count, turn + 1
    assert direct == [data for kind, data in messages if kind in ("direct", "headers")]
    assert unheard == [f"a.b.{len(data)}" for kind, data in messages if kind == "unheard"]
    assert b"".join(protocol._rest) == bytes(rest) and protocol._rest_bytes == len(rest) and not protocol._partial


@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.binary(max_size=60)), min_size=1, max_size=8),
    st.lists(st.integers(1, 30), min_size=1),
)
def test_what_is_too_large_is_dropped_as_it_arrives(messages: list[tuple[bool, bool, bytes]], cuts: list[int]) -> None:
    protocol = Incoming({}, {}, {b"5": lambda: 20})
    stream, expected, head = bytearray(), bytearray(), b"NATS/1.0\r\nMesh-Session: s\r\n\r\n"
    for answered, headers, data in messages:
        to, block = b"a.b 5 _INBOX.x" if answered else b"a.b 5", head if headers else b""
        sizes = b"%d %d" % (len(block), len(block) + len(data)) if headers else b"%d" % len(data)
        whole = b"%s %s %s\r\n%s%s\r\n" % (b"HMSG" if headers else b"MSG", to, sizes, block, data)
        stream += whole
        if (size := len(data)) <= 20:
            expected += whole
        else:
            left = (head[:-2] if headers else b"NATS/1.0\r\n") + b"Mesh-Unread: %d\r\n\r\n" % size
            expected += b"HMSG %s %d %d\r\n%s\r\n" % (to, len(left), len(left), left)
    stream += b"PING\r\n"
    expected += b"PING\r\n"
    at, turn, most = 0, 0, 0
    while at < len(stream):
        count = cuts[turn % len(cuts)]
        protocol.data_received(bytes(stream[at : at + count]))
        at, turn, most = at + count, turn + 1, max(most, protocol._partial_bytes)
    assert b"".join(protocol._rest) == bytes(expected) and not protocol._partial
    assert most <= len(head) + 60  # nothing of what is dropped is kept meanwhile


@pytest.mark.parametrize(
    "data",
    [b"MSG a 1 -20\r\n", b"HMSG a 1 0 -20\r\n", b"MSG a 1 1" + b"0" * 18 + b"\r\n", b"x" * (1024 * 1024 + 1), b"MSG a 1 " + b"9" * 5000],
    ids=["negative", "negative with headers", "an exabyte", "a line without end", "a number without end"],
)
def test_bytes_that_are_no_message_end_the_connection(data: bytes) -> None:
    """A message of a negative size would be read again for ever; one of any size, or a line without end, would be kept whole."""

    class Transport:
        aborted = False

        def abort(self) -> None:
            self.aborted = True

    transport = Transport()
    protocol = Incoming({}, {}, {})
    protocol.connection_made(transport)  # type: ignore[arg-type]
    protocol.data_received(data)
    protocol.data_received(b"\r\n")
    assert transport.aborted


def test_messages_sent_from_other_threads_arrive_whole_between_all_others(run: Run, server: NatsServer) -> None:
    async def work() -> None:
        async with await connect(server) as here, await connect(server) as there:
            direct: asyncio.Queue[bytes] = asyncio.Queue()
            other: asyncio.Queue[Received] = asyncio.Queue()
            await there.subscribe_direct("t.now", direct.put_nowait)
            await there.subscribe("t.other", other.put)
            await there.flush()
            size, count, threads = 200_000, 40, 3
            behind: list[bytes] = []

            def send(thread: int) -> None:
                for index in range(count):
                    data = f"{thread} {index} ".encode().ljust(size, b"x")
                    if not here.post_now("t.now", data):  # the socket is full, or what it did not take of another is not written yet
                        behind.append(data)

            sending = asyncio.gather(*(asyncio.to_thread(send, thread) for thread in range(threads)))
            index = 0
            while not sending.done():
                await here.publish("t.other", str(index).encode())
                index += 1
                await asyncio.sleep(0)
            for data in behind:
                await here.publish("t.now", data)
            got = await take(direct, threads * count)
            assert sorted(got) == sorted(f"{t} {i} ".encode().ljust(size, b"x") for t in range(threads) for i in range(count))
            assert [int(received.data) for received in await take(other, index)] == list(range(index))

    run(work())


def test_bytes_that_the_socket_did_not_take_go_before_all_later_bytes(run: Run) -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        theirs.setblocking(False)
        transport, protocol = await loop.create_connection(lambda: Incoming({}, {}, {}), sock=ours)
        short = protocol.short = _Short(transport, loop)
        big, small = b"1" * 1_000_000, b"2" * 10
        assert await asyncio.to_thread(short.send, (big,))
        assert not await asyncio.to_thread(short.send, (small,)), "something is still to be written"
        short.write((small, small))
        got = b""
        while len(got) < len(big) + 20:
            got += await loop.sock_recv(theirs, 65536)
        assert got == big + small + small
        assert await asyncio.to_thread(short.send, (b"3",))
        assert await loop.sock_recv(theirs, 10) == b"3"
        transport.close()
        await protocol.closed.wait()
        assert not short.send((b"4",)), "the descriptor is given back"
        theirs.close()

    run(work())
