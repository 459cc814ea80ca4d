"""Settings of a shard's process that must be made before JAX is."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CORES = """
import os
from mesh.shard.process import limit_threads
limit_threads({count}, turn={turn})
print(sorted(os.sched_getaffinity(0)))
"""
GPU = """
from mesh.errors import ConfigError
from mesh.shard.process import choose_device
import jax
try:
    choose_device(gpu={gpu})
except ConfigError as error:
    print("refused", error)
else:
    print(jax.default_backend())
"""


def said(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300).stdout.strip()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not let a process choose its cores")
def test_worker_threads_are_cores_and_another_shard_takes_others() -> None:
    cores = sorted(os.sched_getaffinity(0))
    assert said(CORES.format(count=None, turn=0)) == str(cores)
    if len(cores) > 1:
        assert said(CORES.format(count=1, turn=0)) == str(cores[:1])
        assert said(CORES.format(count=1, turn=1)) == str(cores[1:2])
    assert said(CORES.format(count=len(cores) + 1, turn=0)) == str(cores)


def test_enable_gpu_chooses_the_device_and_says_what_is_missing() -> None:
    assert said(GPU.format(gpu=False)) == "cpu"
    with_gpu = said(GPU.format(gpu=True))
    assert with_gpu == "gpu" or with_gpu.startswith("refused resources.enable_gpu: JAX finds no GPU")
    assert "\n" not in with_gpu
