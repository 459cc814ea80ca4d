"""What `nats` of the pages does, where the real one is not installed: the same subjects, buckets and bodies, through nats-py.

nats_stand_in.py [-s URL] req SUBJECT BODY [--replies N] [--timeout TIME] | pub SUBJECT BODY | sub SUBJECT [--headers-only]
                 | micro ls | micro stats NAME | kv watch|ls BUCKET | kv get BUCKET KEY [--raw] | stream view NAME | object ls NAME | rtt
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
from typing import Any

import nats
import nats.errors
import nats.js.errors


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


async def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("-s", default=os.environ.get("NATS_URL", ""))
    parser.add_argument("words", nargs="+")
    parser.add_argument("--replies", type=int, default=1)
    parser.add_argument("--timeout", type=seconds, default=5.0)
    parser.add_argument("--raw", action="store_true")
    parser.add_argument("--headers-only", action="store_true")
    args = parser.parse_args(arguments)
    client = await nats.connect(args.s, user=os.environ.get("NATS_USER"), password=os.environ.get("NATS_PASSWORD"), allow_reconnect=False)
    try:
        return await act(client, args.words, args)
    finally:
        await client.close()


async def act(client: Any, words: list[str], args: argparse.Namespace) -> int:
    match words:
        case ["rtt"]:
            print(await client.rtt())
        case ["req", subject, body]:
            return await request(client, subject, body, args)
        case ["pub", subject, body]:
            await client.publish(subject, body.encode())
            await client.flush()
        case ["sub", subject]:
            found = await client.subscribe(subject)
            async for message in found.messages:
                print(message.subject, b"" if args.headers_only else message.data, flush=True)
        case ["micro", "ls"]:
            return await gather(client, "$SRV.PING")
        case ["micro", "stats", name]:
            return await gather(client, f"$SRV.STATS.{name}")
        case ["kv", "get", bucket, key]:
            print((await (await client.jetstream().key_value(bucket)).get(key)).value)
        case ["kv", "ls", bucket]:
            with contextlib.suppress(nats.js.errors.NoKeysError):
                print(await (await client.jetstream().key_value(bucket)).keys())
        case ["kv", "watch", bucket]:
            watcher = await (await client.jetstream().key_value(bucket)).watchall()
            async for entry in watcher:
                print(entry, flush=True)
        case ["stream", "view", name]:
            print((await client.jetstream().stream_info(name)).state.messages)
        case ["object", "ls", name]:
            print(len(await (await client.jetstream().object_store(name)).list()))
        case _:
            print(f"unknown: {words}", file=sys.stderr)
            return 2
    return 0


async def request(client: Any, subject: str, body: str, args: argparse.Namespace) -> int:
    if args.replies == 1:
        answer = await client.request(subject, body.encode(), timeout=args.timeout)
        print(answer.headers or "", answer.data.decode())
        return 0
    inbox = client.new_inbox()
    answers = await client.subscribe(inbox)
    await client.publish(subject, body.encode(), reply=inbox)
    count = 0
    try:
        while True:
            message = await answers.next_msg(timeout=min(args.timeout, 5.0))
            count += 1
            print(message.data.decode())
            if b'"done":true' in message.data:
                break
    except nats.errors.TimeoutError:
        pass
    return 0 if count else 1


async def gather(client: Any, subject: str) -> int:
    inbox = client.new_inbox()
    answers = await client.subscribe(inbox)
    await client.publish(subject, b"", reply=inbox)
    count = 0
    try:
        while True:
            print((await answers.next_msg(timeout=0.5)).data.decode())
            count += 1
    except nats.errors.TimeoutError:
        return 0 if count else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
