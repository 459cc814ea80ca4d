"""How long an import takes, and the most memory that it has.

    python bench/import_memory.py SOURCE OUT [--every 0.05] [--dtype T] [--bits N] [--traced]

SOURCE is what `mesh import` takes, such as a directory that bench/random_llama.py writes; --traced traces what a family builds too. Two
peaks of the import and all that it starts: resident memory that is its own (what has to be there: pages of files that it maps can be
dropped), looked at every so many seconds and summed over the processes, and what the system counts as resident in the largest process,
mapped files included. Each step of the import has its own. Linux only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from resident import memory

GB = 1e9


def tree(root: int) -> Iterator[int]:
    """The process `root` and all that it has started."""
    yield root
    for task in Path(f"/proc/{root}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:  # it has ended meanwhile
            continue
        for child in children:
            yield from tree(int(child))


def resident(pid: int) -> tuple[int, int]:
    """Bytes that are its own, and all of them with mapped files; zeros where it has ended."""
    anonymous, shared, mapped = memory(pid, "RssAnon", "RssShmem", "RssFile")
    return anonymous + shared, anonymous + shared + mapped


class Steps:
    """The peaks of each step, whose name is the last thing that the import has said."""

    def __init__(self) -> None:
        self.name, self.peaks = "begin", dict[str, tuple[int, int]]()

    def saw(self, own: int, largest: int) -> None:
        before = self.peaks.get(self.name, (0, 0))
        self.peaks[self.name] = max(before[0], own), max(before[1], largest)

    def follow(self, output: Iterator[str]) -> None:
        for line in output:
            self.name = line.strip()


def measure(given: argparse.Namespace) -> tuple[float, Steps]:
    """Seconds, and the most bytes of each step."""
    began, steps = time.monotonic(), Steps()
    process = subprocess.Popen([sys.executable, *sys.argv, "--inside"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    reader = threading.Thread(target=steps.follow, args=(iter(process.stdout),), daemon=True)
    reader.start()
    while process.poll() is None:
        found = [resident(pid) for pid in tree(process.pid)]
        steps.saw(sum(own for own, _ in found), max(whole for _, whole in found))
        time.sleep(given.every)
    if process.returncode:
        raise SystemExit(f"mesh import ended with {process.returncode}")
    return time.monotonic() - began, steps


def inside(given: argparse.Namespace) -> None:
    """The import, as `mesh import` does it; says each step that it begins."""
    from mesh.host.process import give_memory_back
    from mesh.importer.options import ImportOptions
    from mesh.importer.run import import_model
    from mesh.importer.sources import safetensors
    from mesh.runtime.device import prepare

    if given.traced:
        safetensors.has_family = lambda directory: False
    give_memory_back()
    prepare()
    told: set[tuple[str, int]] = set()

    def progress(what: str, done: int, total: int) -> None:
        if (what, done) not in told:
            told.add((what, done))
            print(f"{what} {done} of {total}", flush=True)

    import_model(given.source, given.out, ImportOptions(dtype=given.dtype, bits=given.bits), force=True, progress=progress)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--every", type=float, default=0.05, metavar="S", help="how often memory is looked at")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--bits", type=int)
    parser.add_argument("--traced", action="store_true")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        inside(given)
        return
    seconds, steps = measure(given)
    for name, (own, whole) in steps.peaks.items():
        print(f"  {name}: {own / GB:.2f} GB its own, {whole / GB:.2f} GB resident")
    most = [max(peak[each] for peak in steps.peaks.values()) / GB for each in (0, 1)]
    print(f"{given.source.name}: {seconds:.0f} s, at most {most[0]:.2f} GB its own, {most[1]:.2f} GB resident with mapped files")


if __name__ == "__main__":
    main()
