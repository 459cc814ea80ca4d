"""What a million tokens cost: the hosts' list prices an hour, the speed that you measured, and how much of the day the mesh is busy.

    mesh bench --json ...                                      # says tokens a second under your load
    python bench/cost.py --host 3x0.09 --host 2x0.09 --host 6x0.15 --tokens-per-second 120 --busy 0.4

Nothing is looked up: every number is yours.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

SECONDS = 3600.0


@dataclass(frozen=True)
class Hosts:
    """`price`: of one, an hour."""

    count: int
    price: float

    @classmethod
    def parse(cls, text: str) -> Hosts:
        count, times, price = text.partition("x")
        try:
            made = cls(int(count), float(price)) if times else cls(1, float(text))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: give COUNTxPRICE, such as 6x0.15") from None
        if made.count < 1 or made.price < 0:
            raise argparse.ArgumentTypeError(f"{text}: a count of 1 or more, and a price of 0 or more")
        return made


def per_million(hosts: list[Hosts], tokens_per_second: float, busy: float, *, traffic: float = 0.0) -> float:
    """The price of a million tokens. `busy`: the part of the time in which the mesh generates at `tokens_per_second`. `traffic`: what a
    million tokens cost in transfer between zones, if that is paid."""
    if tokens_per_second <= 0 or not 0 < busy <= 1:
        raise ValueError("tokens a second are more than 0, and busy is more than 0 and at most 1")
    an_hour = sum(each.count * each.price for each in hosts)
    return an_hour / (tokens_per_second * SECONDS * busy) * 1e6 + traffic


def traffic_price(hops: int, hidden_bytes: int, price_per_gb: float) -> float:
    """What the hidden states of a million decoded tokens cost between hosts: `hops` times `hidden_bytes` each."""
    return hops * hidden_bytes * 1e6 / 1e9 * price_per_gb


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--host", action="append", required=True, type=Hosts.parse, metavar="COUNTxPRICE", help="hosts, and the price of one an hour"
    )
    parser.add_argument("--tokens-per-second", required=True, type=float, help="measured, of all requests together")
    parser.add_argument("--busy", type=float, default=1.0, help="the part of the time in which there is such a load (default 1)")
    parser.add_argument("--hops", type=int, default=0, help="how often a hidden state crosses a zone")
    parser.add_argument("--hidden-bytes", type=int, default=0, help="of one token: hidden size x 4, or x 2 with --bf16-wire")
    parser.add_argument("--price-per-gb", type=float, default=0.0, help="of traffic between zones, both directions")
    args = parser.parse_args()
    traffic = traffic_price(args.hops, args.hidden_bytes, args.price_per_gb)
    price = per_million(args.host, args.tokens_per_second, args.busy, traffic=traffic)
    an_hour = sum(each.count * each.price for each in args.host)
    print(f"{price:.2f} a million tokens, of which {traffic:.2f} is traffic between zones; {an_hour:.2f} an hour")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
