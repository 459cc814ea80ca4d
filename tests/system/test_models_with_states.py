"""A model whose layers carry states, on a mesh of processes that are killed: every answer is transformers' own greedy one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checked_load import TOKENS, counted, load, options
from running import Run
from system_tools import all_rows_free
from tiny_models import make_model, torch

from mesh.importer.run import import_model
from mesh.local.mesh import LocalMesh

CONVOLUTIONS: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 768,
    "layer_types": ["conv", "full_attention", "conv", "conv"],
    "pad_token_id": None,
    "eos_token_id": 95,
}
PROMPTS = [[5, 17, 33], list(range(1, 30)), [(7 * place) % 96 for place in range(300)]]
"""The last one has a checkpoint of its states before its end, and is computed in several pieces."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """The model, imported, and transformers' greedy tokens for each prompt."""
    folder = tmp_path_factory.mktemp("states")
    model = make_model("Lfm2", CONVOLUTIONS, folder / "source")
    import_model(folder / "source", folder / "tiny", name="tiny")
    return folder / "tiny", [greedy(model, prompt) for prompt in PROMPTS]


def greedy(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS, eos_token_id=None)
    return [int(token) for token in out[0, len(prompt) :]]


@pytest.fixture(scope="module", params=["balance", "mirror"])
def mesh(request: pytest.FixtureRequest, source: tuple[Path, list[list[int]]]) -> Iterator[LocalMesh]:
    with LocalMesh(options(source[0], context=768, mode=request.param)) as running:
        yield running


@pytest.mark.slow
def test_a_shard_of_each_range_is_killed_and_no_token_differs(mesh: LocalMesh, source: tuple[Path, list[list[int]]], run: Run) -> None:
    async def disturb() -> None:
        async with load(mesh, source[1], PROMPTS) as (running, client):
            before = await counted(client, "failovers")
            for first_of_its_range in ("shard-1", "shard-3"):
                killed = mesh.processes[first_of_its_range]
                killed.kill()
                killed.wait()
                await running.more(120)
            finished = running.finished
            while running.finished < finished + 2 * len(PROMPTS):
                await running.more(60)
            assert await counted(client, "failovers") > before
            assert await counted(client, "failed") == 0
        await all_rows_free(mesh)

    run(disturb())
