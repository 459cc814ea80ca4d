"""Coverage-guided fuzzing of every decoder of data from elsewhere, with libFuzzer through atheris.

    make fuzz
    python bench/fuzz.py [--only NAME,...] [--runs N] [--whole] [--workers N] [--report FILE]

Each decoder runs in a process of its own. An input may give a result or one of the errors that the decoder declares. Any other exception,
a crash, a hang of SLOW_S seconds, or memory beyond the bound is a finding: the input is kept and the exit code is 1. The seeds are valid
inputs; libFuzzer changes them and keeps what reaches new branches of our Python code. Needs the extra `fuzz` (Linux).
"""

from __future__ import annotations

import argparse
import re
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUNS = 1_000_000
SLOW_S = 10
GROWTH_MB = 256
"""How much memory a decoder's process may gain over all its inputs, libFuzzer's own corpus and tables included."""


def main() -> int:
    import fuzz_targets  # no decoder is imported here: the processes import them instrumented

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME,...", help=f"some of {', '.join(fuzz_targets.TARGETS)}")
    parser.add_argument("--runs", type=int, default=RUNS, help="inputs for each cheap decoder; the others get fewer (default: a million)")
    parser.add_argument("--whole", action="store_true", help="as many inputs for the slow decoders too; hours on two cores")
    parser.add_argument("--workers", type=int, default=1, help="processes that share a decoder's inputs, each with a seed of its own")
    parser.add_argument("--report", type=Path, help="write the table here as well")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return run_one(args.one, args.rest)
    names = args.only.split(",") if args.only else list(fuzz_targets.TARGETS)
    lines = ["| decoder | inputs | seconds | branches | corpus | memory gained | findings |", "|---|---|---|---|---|---|---|"]
    failed = False
    print("\n".join(lines), flush=True)
    for name in names:
        runs = args.runs if args.whole else max(args.runs // fuzz_targets.TARGETS[name].cost, 1)
        line, well = measure(name, runs, args.workers)
        failed |= not well
        lines.append(line)
        print(line, flush=True)
    if args.report:
        args.report.write_text("\n".join(lines) + "\n")
    return int(failed)


@dataclass(frozen=True)
class Found:
    """What one process did. `gained_mb` None: it ended before it could say."""

    well: bool
    inputs: int
    branches: int
    corpus: int
    gained_mb: int | None


def measure(name: str, runs: int, workers: int) -> tuple[str, bool]:
    """Run one decoder for `runs` inputs in all. Returns its line of the table, and whether nothing was found."""
    began = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(lambda seed: attempt(name, -(-runs // workers), seed), range(1, workers + 1)))
    seconds, well = time.perf_counter() - began, all(one.well for one in found)
    gained = [one.gained_mb for one in found]
    memory = "?" if None in gained else f"{max(one for one in gained if one is not None)} MB"
    counts = f"{sum(one.inputs for one in found):,} | {seconds:.0f} | {max(one.branches for one in found)}"
    return f"| {name} | {counts} | {max(one.corpus for one in found)} | {memory} | {'none' if well else 'SEE ABOVE'} |", well


def attempt(name: str, runs: int, seed: int) -> Found:
    """One process, whose changes of the inputs follow from `seed`."""
    import fuzz_targets

    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        (Path(folder) / "work").mkdir()
        for index, data in enumerate(fuzz_targets.seeds(name)):
            (corpus / f"seed-{index:03d}").write_bytes(data)
        kept = Path(tempfile.gettempdir()) / f"fuzz-finding-{name}-"
        options = [f"-runs={runs}", f"-timeout={SLOW_S}", "-max_len=4096", "-len_control=0", "-print_final_stats=1", f"-seed={seed}"]
        command = [sys.executable, __file__, "--one", name, "--", *options, f"-artifact_prefix={kept}", str(corpus)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=Path(folder) / "work", check=False)
    text = done.stdout.decode(errors="replace")
    covered = re.findall(r"cov: (\d+) ft: \d+ corp: (\d+)/", text)
    tried = re.search(r"number_of_executed_units: (\d+)", text)
    before, peak = re.search(r"memory before: (\d+)", text), re.search(r"peak_rss_mb: +(\d+)", text)
    gained = max(int(peak[1]) - int(before[1]), 0) if before and peak else None
    well = done.returncode == 0 and gained is not None and gained <= GROWTH_MB
    if not well:
        print(text[-6000:], file=sys.stderr)
    branches, corpus_size = covered[-1] if covered else (0, 0)
    return Found(well, int(tried[1]) if tried else 0, int(branches), int(corpus_size), gained)


def run_one(name: str, options: list[str]) -> int:
    """The process of one decoder. libFuzzer ends it."""
    import logging

    import atheris

    logging.disable()

    with atheris.instrument_imports(include=["mesh", "jinja2"], enable_loader_override=False):
        import fuzz_targets

        target: Any = fuzz_targets.TARGETS[name].make()
    for seed in fuzz_targets.seeds(name):
        target(seed)
    print(f"memory before: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MB", flush=True)
    atheris.Setup([sys.argv[0], *options], target)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
