"""What the shards of one machine may take, and the context that this leaves room for."""

from __future__ import annotations

import pytest

from mesh.errors import DoesNotFit
from mesh.local.sizing import ALL, Demand, size_together
from mesh.model.manifest import BlockInfo, CacheInfo, HiddenInfo, Manifest, WeightsInfo
from mesh.model.memory import SHARED_BYTES
from mesh.types import even_ranges

GB = 10**9
LAYERS = 30


def smollm2() -> Manifest:
    """The demo model's sizes: 651 MB of weights, a context of 8,192."""
    layer, table = BlockInfo(name="layer_000", files=(), weight_bytes=14_160_000, parameters=3_540_000), 113_000_000
    blocks = tuple(layer.model_copy(update={"name": f"layer_{i:03}"}) for i in range(LAYERS))
    return Manifest(
        name="smollm2",
        architecture="llama",
        source="gguf",
        layers=LAYERS,
        vocab_size=49_152,
        context_length=8_192,
        hidden=HiddenInfo(size=576, dtype="float32"),
        cache=(CacheInfo(kv_heads=3, key_dim=64, value_dim=64),) * LAYERS,
        cache_dtype="float32",
        weights=WeightsInfo(bits=32),
        blocks=(
            BlockInfo(name="embed", files=(), weight_bytes=table, parameters=table // 4),
            *blocks,
            BlockInfo(name="head", files=(), weight_bytes=table, parameters=table // 4),
        ),
    )


def sized(free: int, *, context: int | None = None, replicas: int = 1, rows: int = 8) -> tuple[int, int]:
    (found,) = size_together([Demand(smollm2(), even_ranges(LAYERS, 3), replicas, rows, context)], available_bytes=free)
    if found.allowed_bytes is not None:
        alone = replicas * sum(allowed - SHARED_BYTES for allowed in found.allowed_bytes)
        assert SHARED_BYTES + alone <= free, "the shards share what is free"
    return found.context, found.needed_bytes


def test_a_small_machine_gets_a_shorter_context_and_a_large_one_the_model_s() -> None:
    contexts = [sized(free * GB)[0] for free in (2, 4, 8, 16, 32, 64)]
    assert contexts == sorted(contexts) and contexts[0] < 1024 and contexts[-1] == 8_192
    for free in (4, 8, 16, 32, 64):
        fixed = 0.651 * GB + 3 * 0.22 * GB + 0.15 * GB
        assert sized(free * GB)[1] <= fixed + free * GB / 8 + 0.05 * GB, "beside weights and processes, an eighth of what is free"


def test_a_context_that_was_asked_for_is_used_if_it_fits_and_refused_with_a_better_one_if_not() -> None:
    assert sized(16 * GB, context=8_192)[0] == 8_192
    with pytest.raises(DoesNotFit, match=r"3 GB are free on this machine: give --context (4096|2048|1024)"):
        sized(3 * GB, context=8_192)
    with pytest.raises(DoesNotFit, match="fewer --rows or --replicas"):
        sized(GB // 2)


def test_replicas_share_the_machine_too() -> None:
    assert sized(8 * GB, replicas=2)[0] < sized(8 * GB)[0]


def test_without_figures_of_the_system_the_model_s_context_is_used() -> None:
    assert sized(0)[0] == 8_192


def together(free: int, *contexts: int | None) -> list[int]:
    """The contexts of so many models on one machine."""
    found = size_together([Demand(smollm2(), even_ranges(LAYERS, 3), 1, 8, each) for each in contexts], available_bytes=free)
    allowed = [share - SHARED_BYTES for sizing in found for share in sizing.allowed_bytes or ()]
    assert SHARED_BYTES + sum(allowed) <= ALL * free, "all shards of all models share what is free"
    assert all(sum(sizing.allowed_bytes or ()) >= sizing.needed_bytes for sizing in found)
    return [sizing.context for sizing in found]


def test_several_models_share_the_memory_of_the_machine() -> None:
    alone, beside = sized(8 * GB)[0], together(8 * GB, None, None)
    assert max(beside) <= alone and beside[0] in (beside[1], beside[1] // 2, beside[1] * 2)
    assert together(64 * GB, None, None) == [8_192, 8_192]
    asked, shorter = together(8 * GB, 4_096, None)
    assert asked == 4_096 and shorter < 4_096, "a context that was asked for is not shortened for another model"


def test_models_that_do_not_fit_together_are_refused_by_name() -> None:
    with pytest.raises(DoesNotFit, match=r"the shards of smollm2 and smollm2 need .* give fewer models"):
        together(3 * GB // 2, None, None)
