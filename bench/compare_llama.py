"""llama.cpp beside us: how it is built, and what its own benchmarks measure.

It is built from the source distribution of llama-cpp-python, for the processor it runs on (ggml's default), with RPC:

    python bench/compare_llama.py build FOLDER [--jobs 2] [--without-amx]

`--without-amx`: for processors on which its AMX path dies.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from compare_engines import peak_bytes

TOOLS = ("llama-bench", "llama-batched-bench", "llama-quantize", "ggml-rpc-server")
PACKAGE = "llama-cpp-python>=0.3.16"


# -- building --------------------------------------------------------------------------------------------------------------


def build(folder: Path, jobs: int, *, amx: bool = True) -> None:
    """Leave the tools in folder/bin. Needs pip, cmake and a C++ compiler; takes ten minutes of two cores."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python", "-d", work, PACKAGE]
        subprocess.run(fetch, check=True, stdout=sys.stderr)
        (archive,) = Path(work).glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
    (source,) = folder.glob("llama_cpp_python-*/vendor/llama.cpp")
    flags = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_RPC=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DBUILD_SHARED_LIBS=OFF"]
    flags += [] if amx else [f"-DGGML_AMX_{kind}=OFF" for kind in ("TILE", "INT8", "BF16")]
    subprocess.run(["cmake", "-S", str(source), "-B", str(folder / "build"), *flags], check=True, stdout=sys.stderr)
    subprocess.run(["cmake", "--build", str(folder / "build"), "-j", str(jobs), "--target", *TOOLS], check=True, stdout=sys.stderr)
    (folder / "bin").unlink(missing_ok=True)
    (folder / "bin").symlink_to("build/bin")


# -- running -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Llama:
    """The tools in `bin`, with `threads` threads each. `servers`: of RPC, as host:port; none: the model in one process."""

    bin: Path
    threads: int
    servers: tuple[str, ...] = ()

    def _run(self, tool: str, *arguments: str) -> tuple[str, str, int]:
        """(stdout, stderr, peak resident bytes)"""
        rpc = ["--rpc", ",".join(self.servers), "-ngl", "99"] if self.servers else []
        command = [str(self.bin / tool), "-t", str(self.threads), *rpc, *arguments]
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = subprocess.Popen(command, stdout=out, stderr=err)
            peak = 0
            while process.returncode is None:
                peak = max(peak, peak_bytes(process.pid))
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
            out.seek(0), err.seek(0)
            said = out.read(), err.read()
        if process.returncode:
            raise RuntimeError(f"{tool} ended with {process.returncode}: {said[1][-400:]}")
        return *said, peak

    def prefill(self, gguf: Path, lengths: Sequence[int]) -> dict[int, float]:
        """Seconds for a prompt of each length, by llama-bench."""
        wanted = ",".join(map(str, lengths))
        out, _, _ = self._run("llama-bench", "-m", str(gguf), "-p", wanted, "-n", "0", "-r", "1", "-o", "json")
        return {int(test["n_prompt"]): test["avg_ns"] / 1e9 for test in json.loads(out)}

    def at_depth(self, gguf: Path, depths: Sequence[int], steps: int) -> dict[int, float]:
        """Seconds of a step of one row behind so many positions, by llama-bench."""
        wanted = ",".join(map(str, depths))
        out, _, _ = self._run("llama-bench", "-m", str(gguf), "-p", "0", "-n", str(steps), "-d", wanted, "-r", "1", "-o", "json")
        return {int(test["n_depth"]): test["avg_ns"] / 1e9 / steps for test in json.loads(out)}

    def decode(self, gguf: Path, rows: Sequence[int], prompt: int, steps: int) -> tuple[dict[int, dict[str, float]], int]:
        """({rows: {"prefill": seconds of all prompts, "step": seconds of a step of all rows}}, peak bytes), by llama-batched-bench."""
        size = str(max(rows) * (prompt + steps) + 64)
        shape = ["-npp", str(prompt), "-ntg", str(steps), "-npl", ",".join(map(str, rows))]
        out, err, peak = self._run("llama-batched-bench", "-m", str(gguf), "-c", size, "-b", "2048", *shape, "--output-format", "jsonl")
        tests = [json.loads(line) for line in (out + err).splitlines() if line.startswith("{")]
        return {test["pl"]: {"prefill": test["t_pp"], "step": test["t_tg"] / steps} for test in tests}, peak

    def path_taken(self, gguf: Path) -> str:
        """How it holds the weights, by the buffers that it says it fills: for AMX, repacked for this processor, or generic."""
        out, err, _ = self._run("llama-bench", "-m", str(gguf), "-p", "0", "-n", "1", "-r", "1", "-v")
        sizes: dict[str, float] = {}
        for buffer, size in re.findall(r"(\S+) model buffer size\s*=\s*([\d.]+) MiB", out + err):
            path = "AMX" if "AMX" in buffer else "repacked" if "REPACK" in buffer else "generic"
            sizes[path] = sizes.get(path, 0) + float(size)
        return ", ".join(f"{path} {size:.0f} MiB" for path, size in sizes.items()) or "it did not say"

    def quantize(self, source: Path, out: Path, kind: str) -> None:
        command = [str(self.bin / "llama-quantize"), str(source), str(out), kind, str(self.threads)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@contextmanager
def rpc_servers(folder: Path, count: int, threads: int) -> Iterator[tuple[str, ...]]:
    """So many servers of RPC on loopback. They share the processor's `threads`."""
    ports = [_free_port() for _ in range(count)]
    servers = [
        subprocess.Popen(
            [str(folder / "ggml-rpc-server"), "-H", "127.0.0.1", "-p", str(port), "-t", str(threads)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for port in ports
    ]
    try:
        for port in ports:
            _wait_for(port)
        yield tuple(f"127.0.0.1:{port}" for port in ports)
    finally:
        for server in servers:
            server.terminate()
            server.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _wait_for(port: int) -> None:
    until = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["build"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--without-amx", action="store_true")
    args = parser.parse_args()
    build(args.folder, args.jobs, amx=not args.without_amx)


if __name__ == "__main__":
    main()
