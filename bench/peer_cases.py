"""The cases of other servers' own test suites, asked of a gateway: what passes, and what is answered in its place where it does not.

    python bench/peer_cases.py http://127.0.0.1:8080 MODEL
    python bench/peer_cases.py http://127.0.0.1:8080 MODEL --only "vLLM, tools"

Each case is a request that a suite sends, in words of its own, and what the suite then expects. What depends on the suite's model (which
words it says) is left out. A case whose expectation this project does not share has its reason in peer_asking.REASONS. The run ends with
status 1 where a case fails without a reason, or passes with one, and where any answer is a fault of the server or never comes.

    peer_asking.py      cases, requests, streams
    peer_checks.py      what an answer of each API must be
    peer_llama_cpp.py peer_vllm_chat.py peer_vllm_more.py peer_sglang.py    the suites
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator

import httpx
import peer_llama_cpp
import peer_sglang
import peer_vllm_chat
import peer_vllm_more
from peer_asking import REASONS, Case, Peer

WRONG = (AssertionError, AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError)
"""What a check raises where an answer has not the form that it looks into."""


def cases() -> Iterator[Case]:
    for suite in (peer_llama_cpp, peer_vllm_chat, peer_vllm_more, peer_sglang):
        yield from suite.suites()


def passes(peer: Peer, case: Case) -> bool:
    try:
        return bool(case.run(peer))
    except WRONG:
        return False


def report(counts: Counter[tuple[str, str]]) -> None:
    """The tables of bench/results/peers-2core.md."""
    print("\n| suite | cases | pass | do not, each with its reason |\n|---|---|---|---|")
    names = list(dict.fromkeys(suite for suite, _ in counts))
    for name in names:
        passed, every = counts[name, ""], sum(count for (suite, _), count in counts.items() if suite == name)
        print(f"| {name} | {every} | {passed} | {every - passed} |")
    passed, every = sum(counts[name, ""] for name in names), counts.total()
    print(f"| together | {every} | {passed} | {every - passed} |\n\n| why not | cases |\n|---|---|")
    why = Counter(reason for (_, reason), count in counts.items() if reason for _ in range(count))
    for reason, count in why.most_common():
        print(f"| {reason}: {REASONS.get(reason, '?')} | {count} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--only", default="", metavar="TEXT", help="the cases whose suite or name has this text")
    args = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    wrong = 0
    with httpx.Client(base_url=args.url, timeout=300) as http:
        peer = Peer(http, args.model)
        for case in cases():
            if args.only not in f"{case.suite}: {case.name}":
                continue
            good = passes(peer, case)
            counts[case.suite, "" if good else case.reason or "?"] += 1
            if good == bool(case.reason):
                wrong += 1
                what = f"passes, and has a reason for not passing: {case.reason}" if good else peer.last
                print(f"{case.suite}: {case.name}: {what}", flush=True)
    for fault in peer.faults:
        print(f"fault: {fault}")
    report(counts)
    print(f"\n{peer.requests} requests, {len(peer.faults)} of them answered by a fault of the server or not at all")
    return 1 if wrong or peer.faults else 0


if __name__ == "__main__":
    sys.exit(main())
