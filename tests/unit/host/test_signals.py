"""The first signal drains, the second one ends."""

from __future__ import annotations

import asyncio
import os
import signal

from mesh.host.signals import on_signals, run_loop


def test_the_first_signal_drains_and_later_ones_end() -> None:
    calls: list[str] = []

    async def main() -> str:
        two = asyncio.Event()

        def end() -> None:
            calls.append("end")
            two.set()

        first = asyncio.Event()

        def drain() -> None:
            calls.append("drain")
            first.set()

        on_signals(drain, end)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(first.wait(), 5)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.wait_for(two.wait(), 5)
        return "ended"

    assert run_loop(main) == "ended"
    assert calls == ["drain", "end"]


def test_without_a_second_function_every_signal_calls_the_first() -> None:
    calls: list[int] = []

    async def main() -> None:
        called = asyncio.Semaphore(0)

        def stop() -> None:
            calls.append(1)
            called.release()

        on_signals(stop)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(called.acquire(), 5)

    run_loop(main)
    assert len(calls) == 2
