"""How soon the first token of a chat's next turn comes, with and without reuse of what the mesh still holds.

    python bench/reuse.py MODEL_DIR [--turns 10] [--history 1500] [--shards 2] [--kill] [--out result.json]

A chat whose first prompt has about `--history` tokens. Each turn is asked twice, one request after the other: in the chat, and with a salt
of its own, so that nothing is reused. Both have the same prompt in the same mesh, and must have the same tokens. With `--kill` each range
has a mirror; after the last turn every shard of the route is killed with SIGKILL, and one more turn is asked, first in the chat.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from mesh.client import AsyncMeshClient, Completion
from mesh.local.mesh import LocalMesh, LocalOptions

ANSWER = 16
NOTICED_S = 0.5
"""After the kill, before the next turn: a person reads before they write."""
SENTENCE = "In the year {0} the keeper of the lighthouse wrote down {1} ships, {2} storms and one long letter to the harbour. "
TOKENS_A_SENTENCE = 32
ASKED = "And what did the keeper write in the year {0}? Answer in one sentence."


async def first_token(client: AsyncMeshClient, messages: list[dict[str, str]], salt: str) -> tuple[float, Completion]:
    """(seconds from the request to the first token, the answer)"""
    began = time.perf_counter()
    first_s = 0.0
    async with client.stream(messages=messages, max_tokens=ANSWER, ignore_eos=True, cache_salt=salt) as stream:
        async for chunk in stream:
            if chunk.token is not None and not first_s:
                first_s = time.perf_counter() - began
    assert stream.completion is not None
    return first_s, stream.completion


async def turn(client: AsyncMeshClient, messages: list[dict[str, str]], number: int, *, chat_first: bool) -> tuple[dict[str, Any], str]:
    """(the figures of a turn, its answer)"""
    found: dict[str, tuple[float, Completion]] = {}
    for salt in ("chat", f"alone-{number}") if chat_first else (f"alone-{number}", "chat"):
        found["chat" if salt == "chat" else "alone"] = await first_token(client, messages, salt)
    (reused_s, chat), (whole_s, alone) = found["chat"], found["alone"]
    assert chat.tokens == alone.tokens, f"turn {number}: the tokens differ"
    assert alone.usage.cached_tokens == 0
    figures = {
        "turn": number,
        "prompt_tokens": chat.usage.prompt_tokens,
        "cached_tokens": chat.usage.cached_tokens,
        "first_token_s": round(reused_s, 4),
        "without_s": round(whole_s, 4),
        "ratio": round(reused_s / whole_s, 4),
    }
    print(json.dumps(figures), file=sys.stderr, flush=True)
    return figures, chat.text or ""


async def measure(mesh: LocalMesh, args: argparse.Namespace) -> dict[str, Any]:
    told = "".join(SENTENCE.format(1800 + n, n * 7 % 90, n * 3 % 40) for n in range(args.history // TOKENS_A_SENTENCE))
    messages = [{"role": "user", "content": told + ASKED.format(1801)}]
    turns: list[dict[str, Any]] = []
    async with AsyncMeshClient(mesh.url, model=mesh.manifest.name) as client:
        await first_token(client, [{"role": "user", "content": "Hello"}], "warm")
        for number in range(1, args.turns + 1):
            figures, answer = await turn(client, messages, number, chat_first=number % 2 == 1)
            turns.append(figures)
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": ASKED.format(1801 + number)}]
        result: dict[str, Any] = {"turns": turns, "median_ratio": statistics.median(each["ratio"] for each in turns[1:])}
        result["worst_ratio"] = max(each["ratio"] for each in turns[1:])
        if args.kill:
            reports = [report for each in (await client.status()).coordinators for report in each.stats.recent]
            prompt = turns[-1]["prompt_tokens"]
            route = next(report.route for report in reports if report.prompt_tokens == prompt)
            for name in route:
                mesh.processes[str(name)].kill()
            await asyncio.sleep(NOTICED_S)
            result["killed"] = list(route)
            result["after_kill"], _ = await turn(client, messages, args.turns + 1, chat_first=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--history", type=int, default=1500)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    options = LocalOptions(
        model=args.model,
        shards=args.shards,
        replicas=2 if args.kill else 1,
        mode="mirror" if args.kill else "balance",
        rows=4,
        context=4096,
        http=False,
    )
    with LocalMesh(options) as mesh:
        result = asyncio.run(measure(mesh, args))
    text = json.dumps(result, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
