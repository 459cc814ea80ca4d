"""What a process asks of its system and its interpreter: children that end with it, memory that is returned, no garbage collector pauses.

On Linux the kernel ends a child when its parent is gone, however the parent ended (PR_SET_PDEATHSIG). A small Python program sets this
and then becomes the child's program, because setting it between fork and exec is not safe in a process with threads. On other systems
a child ends only if its parent ends in an orderly way.
"""

from __future__ import annotations

import ctypes
import gc
import os
import select
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

__all__ = ["die_with_parent", "dying_with_parent", "give_memory_back", "give_way", "no_core_dumps", "settle", "trim", "wait_for_end"]

_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGE_BYTES = 256 * 1024
_POLL_S = 0.2
_GIVES_WAY = 15

_WRAPPER = """\
import ctypes, os, sys
parent, number, *command = sys.argv[1:]
ctypes.CDLL(None).prctl(1, int(number), 0, 0, 0)
if os.getppid() != int(parent):
    sys.exit(0)
os.execv(command[0], command)
"""


def dying_with_parent(command: Sequence[str], *, sig: signal.Signals = signal.SIGKILL) -> list[str]:
    """`command` (its program an absolute path) in a form that gets `sig` when the thread that starts it ends.

    Start it from a thread that lives as long as the process: the main one.
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-S", "-I", "-c", _WRAPPER, str(os.getpid()), str(int(sig)), *command]


def die_with_parent(sig: signal.Signals = signal.SIGKILL) -> None:
    """Get `sig` when the parent of this process ends. Call it early. If the parent is gone already, the process ends here."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(sig), 0, 0, 0)
        if os.getppid() == 1 and os.environ.get("MESH_PARENT") not in (None, "1"):
            sys.exit(0)


def wait_for_end(children: Iterable[int], timeout_s: float | None) -> None:
    """Wait until one of these child processes has ended (and was not waited for yet), or until the time is over. May return early."""
    if sys.platform != "linux":
        time.sleep(_POLL_S if timeout_s is None else min(timeout_s, _POLL_S))
        return
    ended = select.poll()
    with ExitStack() as stack:
        for pid in children:
            handle = os.pidfd_open(pid)
            stack.callback(os.close, handle)
            ended.register(handle, select.POLLIN)
        ended.poll(None if timeout_s is None else timeout_s * 1000)


def no_core_dumps() -> None:
    """Write no image of this process when it crashes: its memory has keys, prompts and answers."""
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def give_way() -> None:
    """Compute only with what other processes of this machine leave over. There is no way back without privileges."""
    if sys.platform != "win32":
        os.nice(_GIVES_WAY)


def give_memory_back() -> None:
    """Make glibc return freed memory to the system at once. By default it keeps freed blocks of up to 32 MB and a heap for each thread;
    work that goes through weights block by block would then hold several blocks. Costs a system call for each large array. Does nothing
    with another C library."""
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    for option, value in ((_M_MMAP_THRESHOLD, _LARGE_BYTES), (_M_TRIM_THRESHOLD, _LARGE_BYTES), (_M_ARENA_MAX, 2)):
        mallopt(option, value)


def trim() -> None:
    """Return the memory that has been freed to the system. Does nothing with a C library that has no way to do so."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def settle() -> None:
    """Tell the garbage collector that all objects so far will stay, so that it does not visit them again. A full visit takes 0.14 s in a
    shard, and every thread, and so every token, waits for it. What the start has freed, compilers' memory above all, is returned to the
    system."""
    gc.collect()
    gc.freeze()
    trim()
