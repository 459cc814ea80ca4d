"""Which layer range a joining shard takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import DoesNotFit
from mesh.shard.join import Held, choose_range
from mesh.types import LayerRange


def per_layer(layers: LayerRange) -> int:
    return 10 * len(layers)


def with_head(total: int) -> Callable[[LayerRange], int]:
    return lambda layers: 10 * len(layers) + (100 if layers.stop == total else 0)


def held(*ranges: tuple[int, int], load: float = 0.0) -> list[Held]:
    return [Held(f"s{i}", LayerRange(*r), load) for i, r in enumerate(ranges)]


def test_an_empty_mesh_gets_its_first_layers() -> None:
    assert choose_range(12, [], per_layer, 60) == LayerRange(0, 6)


def test_the_first_gap_is_filled_and_not_beyond() -> None:
    assert choose_range(12, held((0, 4), (8, 12)), per_layer, 1000) == LayerRange(4, 8)


def test_the_heads_weight_shortens_the_last_range() -> None:
    assert choose_range(12, held((0, 4)), with_head(12), 90) == LayerRange(4, 11)
    assert choose_range(12, held((0, 11)), with_head(12), 110) == LayerRange(11, 12)


def test_where_nothing_is_lacking_the_poorest_range_gets_a_replica() -> None:
    assert choose_range(12, held((0, 4), (4, 8), (8, 12), (0, 4), (8, 12)), per_layer, 1000) == LayerRange(4, 8)


def test_of_equally_poor_ranges_the_busiest_is_helped() -> None:
    mesh = [*held((0, 6)), Held("x", LayerRange(6, 12), 0.9)]
    assert choose_range(12, mesh, per_layer, 1000) == LayerRange(6, 12)


def test_a_range_that_does_not_fit_is_passed_over() -> None:
    assert choose_range(12, held((0, 8), (8, 12), (8, 12)), per_layer, 50) == LayerRange(8, 12)


def test_nothing_that_fits_is_an_error_with_the_figures() -> None:
    for mesh in ([], held((0, 12))):
        with pytest.raises(DoesNotFit) as caught:
            choose_range(12, mesh, per_layer, 5)
        assert caught.value.allowed_bytes == 5 and caught.value.needed_bytes >= 10


@given(st.integers(1, 30), st.integers(10, 200))
def test_machines_that_join_one_after_the_other_complete_the_mesh(total: int, memory: int) -> None:
    mesh: list[Held] = []
    while {layer for item in mesh for layer in item.layers} != set(range(total)):
        mesh.append(Held(str(len(mesh)), choose_range(total, mesh, per_layer, memory)))
        assert len(mesh) <= total
    assert sum(len(item.layers) for item in mesh) == total
