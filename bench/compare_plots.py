"""The figures of bench/compare.py as pictures: one SVG for each width, without a library.

    python bench/compare.py MODEL.gguf ... --out results.json
    python bench/compare_plots.py results.json FOLDER      # FOLDER/q8_0.svg, FOLDER/q4_0.svg, ...

A panel for each kind and size of work: tokens a second of each engine, the median over the rounds, and a whisker from the slowest round to
the fastest. The dashed line is the floor: what reading the weights once a step would allow, where the panel has one.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from compare import rate
from compare_engines import Figures

COLOURS = ("#2563eb", "#f59e0b", "#10b981", "#a855f7", "#64748b", "#ef4444")
NAMES = {"decode": "{} rows", "prefill": "prompt of {}", "depth": "at {:,}"}
PANEL, BARS, GAP, TOP, MOST = 190, 150, 34, 64, 6
"""Width of a panel, height of its bars, the space below them and above, and panels side by side, in pixels."""


def text(x: float, y: float, what: str, *, size: int = 11, anchor: str = "start", colour: str = "#334155") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">{escape(what)}</text>'


def panel(x: float, y: float, title: str, rates: dict[str, Sequence[float]], colours: dict[str, str], floor: float | None) -> list[str]:
    """Bars from `rates`, tokens a second of each round by engine, with the upper left corner at x, y."""
    most = max([max(each) for each in rates.values()] + ([floor] if floor else []))
    height = lambda value: BARS * value / most  # noqa: E731
    wide = (PANEL - 24) / max(len(rates), 1)
    drawn = [text(x + PANEL / 2, y - 18, title, anchor="middle", size=12)]
    for place, (name, each) in enumerate(rates.items()):
        left, middle = x + 12 + place * wide, statistics.median(each)
        top, centre = y + BARS - height(middle), x + 12 + (place + 0.5) * wide
        drawn.append(
            f'<rect x="{left + 2:.1f}" y="{top:.1f}" width="{wide - 4:.1f}" height="{height(middle):.1f}" fill="{colours[name]}">'
            f"<title>{escape(name)}: {middle:.1f} tokens/s</title></rect>"
        )
        ends = (y + BARS - height(max(each)), y + BARS - height(min(each)))
        drawn.append(f'<path d="M{centre:.1f} {ends[0]:.1f}V{ends[1]:.1f}" stroke="#0f172a"/>')
        drawn.append(text(centre, min(top, ends[0]) - 3, f"{middle:.0f}", anchor="middle", size=10))
    drawn.append(f'<path d="M{x + 8:.1f} {y + BARS:.1f}H{x + PANEL - 8:.1f}" stroke="#94a3b8"/>')
    if floor:
        at = y + BARS - height(floor)
        drawn.append(f'<path d="M{x + 8:.1f} {at:.1f}H{x + PANEL - 8:.1f}" stroke="#ef4444" stroke-dasharray="4 3"/>')
    return drawn


def picture(title: str, found: dict[str, Any]) -> str:
    """The SVG of one width, with `title` above it, whose figures are `found`: `engines`, the rounds of each, and `floor_s`."""
    engines = {name: [Figures.of(each) for each in rounds] for name, rounds in found["engines"].items()}
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(engines)}
    cells = sorted({cell for rounds in engines.values() for each in rounds for cell in each.cells()})
    lines = -(-len(cells) // MOST)
    wide, high = 20 + PANEL * max(min(len(cells), MOST), 3), TOP + lines * (BARS + GAP + 24)
    drawn = [text(12, 20, title, size=14)]
    for place, (name, colour) in enumerate(colours.items()):
        drawn.append(f'<rect x="{12 + 110 * place}" y="30" width="10" height="10" fill="{colour}"/>' + text(26 + 110 * place, 39, name))
    for place, cell in enumerate(cells):
        kind, size = cell
        rates = {name: [rate(cell, each.cells()[cell]) for each in rounds if cell in each.cells()] for name, rounds in engines.items()}
        title = "1 row" if cell == ("decode", 1) else NAMES[kind].format(size)
        floor = rate(cell, found["floor_s"]) if cell == ("decode", 1) or kind == "depth" else None
        x, y = 10 + PANEL * (place % MOST), TOP + 20 + (place // MOST) * (BARS + GAP + 24)
        drawn += panel(x, y, title, {name: each for name, each in rates.items() if each}, colours, floor)
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-family="system-ui, sans-serif">'
    return "\n".join([frame, f'<rect width="{wide}" height="{high}" fill="#ffffff"/>', *drawn, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what bench/compare.py wrote with --out")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    results = json.loads(args.results.read_bytes())
    args.folder.mkdir(parents=True, exist_ok=True)
    for width, found in results["widths"].items():
        path = args.folder / f"{width}.svg"
        machine = results["machine"].split(",")[0]  # without its instruction sets
        path.write_text(picture(f"{results['model']}, {width}: tokens a second, {machine}, {results['threads']} threads", found))
        print(path)


if __name__ == "__main__":
    main()
