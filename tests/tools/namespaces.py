"""A host of its own on this machine: a network namespace, and the line to it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

__all__ = ["Host", "host_of_its_own", "hosts_on_one_network"]

_NAME = re.compile(r"mesh(\d+)(?:s|h\d+)?")
"""`mesh`, the process that made it, and for several on one network the switch or the host."""


@dataclass(frozen=True)
class Host:
    """A network namespace, and the line to it."""

    name: str

    def cut(self) -> None:
        ip("-n", self.name, "link", "set", "mesh1", "down")

    def heal(self) -> None:
        ip("-n", self.name, "link", "set", "mesh1", "up")

    def command(self, *words: str) -> list[str]:
        """The command, run there."""
        return [str(shutil.which("ip")), "netns", "exec", self.name, *words]

    def listening(self) -> set[str]:
        """The addresses on which a TCP port of this host is open, as the kernel writes them."""
        found = subprocess.run(self.command("cat", "/proc/net/tcp", "/proc/net/tcp6"), capture_output=True, text=True, check=True).stdout
        rows = [line.split() for line in found.splitlines()]
        return {row[1].partition(":")[0] for row in rows if len(row) > 3 and row[3] == "0A"}


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def made() -> list[str]:
    """The namespaces of this machine that have a name, and other words."""
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.split()


def remove_leftovers() -> None:
    """Namespaces of test runs that were killed: their lines have the address that this one needs."""
    for name in made():
        found = _NAME.fullmatch(name)
        if found and not Path(f"/proc/{found[1]}").exists():
            ip("netns", "del", name)


def make_first(name: str) -> None:
    """Make the first namespace of a test, which is skipped where none can be made."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        pytest.skip("network namespaces are made with Linux's ip, which is not here")
    if os.geteuid() != 0:
        pytest.skip("only root may make a network namespace")
    remove_leftovers()
    try:
        ip("netns", "add", name)
    except OSError as error:
        pytest.skip(f"this root may not make a network namespace ({error})")


@contextmanager
def host_of_its_own(here: str, there: str) -> Iterator[Host]:
    """A host whose address is `there`; this machine is `here` for it. The test is skipped where namespaces cannot be made."""
    name = f"mesh{os.getpid()}"
    line = f"{name}a"[-15:]
    make_first(name)
    try:
        ip("link", "add", line, "type", "veth", "peer", "name", "mesh1", "netns", name)
        try:
            ip("addr", "add", f"{here}/30", "dev", line)
            ip("link", "set", line, "up")
            ip("-n", name, "addr", "add", f"{there}/30", "dev", "mesh1")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "mesh1", "up")
            yield Host(name)
        finally:
            ip("link", "del", line)  # a namespace that is removed loses it only some time later
    finally:
        ip("netns", "del", name)


@contextmanager
def hosts_on_one_network(*addresses: str) -> Iterator[list[Host]]:
    """A host for each address, all on one line of their own; nothing else reaches them."""
    switch = f"mesh{os.getpid()}s"
    hosts = [Host(f"mesh{os.getpid()}h{index}") for index in range(len(addresses))]
    make_first(switch)
    try:
        try:
            ip("-n", switch, "link", "add", "line", "type", "bridge")
        except OSError as error:
            pytest.skip(f"no bridge can be made here ({error})")
        ip("-n", switch, "link", "set", "line", "up")
        for index, (host, address) in enumerate(zip(hosts, addresses, strict=True)):
            ip("netns", "add", host.name)
            ip("-n", switch, "link", "add", f"port{index}", "type", "veth", "peer", "name", "mesh1", "netns", host.name)
            ip("-n", switch, "link", "set", f"port{index}", "master", "line", "up")
            ip("-n", host.name, "addr", "add", f"{address}/24", "dev", "mesh1")
            for link in ("lo", "mesh1"):
                ip("-n", host.name, "link", "set", link, "up")
        yield hosts
    finally:
        listed = made()
        for name in (*(host.name for host in hosts), switch):
            if name in listed:
                ip("netns", "del", name)
