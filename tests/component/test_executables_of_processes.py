"""Compiled programs that one process kept are found by another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_TOKENS = """
import sys
from pathlib import Path
from mesh.runtime.device import prepare
prepare()
import jax
traced = []
jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: traced.append(event))
from mesh.runtime.generate import Pipeline
from mesh.runtime.sampling import SamplingParams
pipeline = Pipeline.load(Path(sys.argv[1]), shards=2, chunk=16)
loaded = len(traced)
pipeline.warm_up()
print(sum("jaxpr_trace" in event for event in traced[loaded:]), pipeline.stages[0].programs.compiled)
params = SamplingParams(temperature=0.8, seed=3, repetition_penalty=1.1)
print([pipeline.complete([5, 17, 33], each, max_tokens=12).ids for each in (params, SamplingParams(temperature=0))])
"""


@pytest.mark.slow
def test_another_process_traces_nothing_and_generates_the_same(model: Path, tmp_path: Path) -> None:
    said = []
    for _ in range(2):
        environment = {**os.environ, "MESH_CACHE_DIR": str(tmp_path)}
        ran = subprocess.run([sys.executable, "-c", _TOKENS, str(model)], env=environment, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr
        said.append(ran.stdout.splitlines())
    (first, programs), (second, again) = (map(int, lines[0].split()) for lines in said)
    assert first >= programs == again > 4
    assert second == 0
    assert said[0][1] == said[1][1]
