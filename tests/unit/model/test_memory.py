"""The figures of a range, against sums written out by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import BadLayerRange, PlanError
from mesh.model.manifest import BlockInfo, CacheInfo, HiddenInfo, Manifest, WeightsInfo, block_name
from mesh.model.memory import CACHE_SLACK, BlockShape, MemoryNeed, ModelShape, predict, stored_bytes
from mesh.runtime.cache import SLACK
from mesh.types import LayerRange

D, V, KV, DK, DV = 64, 1000, 2, 16, 8
PARAMETERS = [40_000, 50_000, 60_000, 70_000]


def _manifest(bits: int = 32) -> Manifest:
    def block(name: str, parameters: int) -> BlockInfo:
        return BlockInfo(name=name, files=(), weight_bytes=parameters * bits // 8, parameters=parameters)

    return Manifest(
        name="tiny",
        architecture="any",
        source="onnx",
        layers=4,
        vocab_size=V,
        context_length=128,
        hidden=HiddenInfo(size=D, dtype="float32"),
        cache=tuple(CacheInfo(kv_heads=KV, key_dim=DK, value_dim=DV, window=16 if i % 2 else None) for i in range(4)),
        cache_dtype="float16",
        weights=WeightsInfo(bits=bits),  # type: ignore[arg-type]
        blocks=(block("embed", V * D), *(block(block_name(i), n) for i, n in enumerate(PARAMETERS)), block("head", V * D + D)),
    )


def test_weights_and_cache_of_a_range_are_exact() -> None:
    need = predict(_manifest(), LayerRange(1, 3), embed=False, head=False, rows=3, context=100, chunk=10)
    assert need.weights_bytes == 4 * (50_000 + 60_000)
    # a sliding window does not shrink the cache, which is addressed by absolute position
    assert need.cache_bytes == 2 * 3 * (100 + CACHE_SLACK) * KV * (DK + DV) * 2


def test_embedding_and_head_are_counted_where_they_are_held() -> None:
    bare = predict(_manifest(), LayerRange(0, 4), embed=False, head=False, rows=3, context=100, chunk=10)
    full = predict(_manifest(), LayerRange(0, 4), embed=True, head=True, rows=3, context=100, chunk=10)
    assert full.weights_bytes - bare.weights_bytes == 4 * (V * D + V * D + D)
    assert full.workspace_bytes - bare.workspace_bytes == 3 * (8 * V + 100 + CACHE_SLACK) * 4


def test_attention_in_blocks_holds_neither_scores_nor_what_it_reads() -> None:
    width = (70_000 - D * (D // DK + KV) * (DK + DV)) // (2 * D)
    need = predict(_manifest(), LayerRange(3, 4), embed=False, head=False, rows=3, context=100, chunk=40, in_blocks=True)
    assert need.workspace_bytes == 40 * (4 * D + 3 * width) * 4


def test_workspace_is_that_of_the_larger_step() -> None:
    heads = D // DK
    width = (70_000 - D * (heads + KV) * (DK + DV)) // (2 * D)
    token = (4 * D + 3 * width) * 4 + 2 * heads * 100 * 4
    read = 100 * KV * (DK + DV) * 4
    for rows, chunk, expected in ((3, 40, 40 * token + read), (300, 40, 300 * (token + read)), (3, 1, CACHE_SLACK * token + read)):
        need = predict(_manifest(), LayerRange(3, 4), embed=False, head=False, rows=rows, context=100, chunk=chunk)
        assert need.workspace_bytes == expected


def test_the_slack_is_the_runtimes() -> None:
    assert SLACK == CACHE_SLACK


def test_narrow_weights_need_room_to_be_widened_in_where_there_are_no_kernels() -> None:
    def need(bits: int, *, widens: bool) -> MemoryNeed:
        return predict(_manifest(bits), LayerRange(0, 4), embed=True, head=True, rows=1, context=64, widens=widens)

    narrow, wide = need(16, widens=True), need(32, widens=True)
    assert narrow.weights_bytes * 2 == wide.weights_bytes and need(16, widens=False).workspace_bytes == wide.workspace_bytes
    assert narrow.workspace_bytes - wide.workspace_bytes == D * V * 4  # the head's is the largest matrix


def test_without_a_cache_the_input_of_every_row_is_kept_and_the_cache_of_one() -> None:
    def need(first: bool, *, on: bool) -> MemoryNeed:
        layers = LayerRange(0 if first else 1, 4)
        return predict(_manifest(), layers, embed=first, head=True, rows=8, context=100, chunk=10, kv_cache=on)

    for first in (True, False):
        kept, none = need(first, on=True), need(first, on=False)
        one_row = kept.cache_bytes // 8
        assert none.cache_bytes == one_row + 8 * 100 * (4 if first else 4 + 4 * _manifest().hidden.size)
        assert none.weights_bytes == kept.weights_bytes and none.workspace_bytes <= kept.workspace_bytes


@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 64), st.integers(1, 128), st.integers(1, 300))
def test_a_range_never_needs_less_than_one_inside_it(start: int, length: int, rows: int, context: int, chunk: int) -> None:
    stop = min(4, start + length)
    inner, outer = (
        predict(_manifest(16), LayerRange(a, b), embed=a == 0, head=b == 4, rows=rows, context=context, chunk=chunk)
        for a, b in ((start, stop), (max(0, start - 1), min(4, stop + 1)))
    )
    assert inner.total_bytes <= outer.total_bytes
    assert inner.total_bytes == inner.weights_bytes + inner.cache_bytes + inner.workspace_bytes + inner.process_bytes


def test_a_process_takes_a_base_and_the_programs_of_its_shapes() -> None:
    def process(rows: int, *, head: bool = False) -> int:
        return predict(_manifest(), LayerRange(0, 1), embed=False, head=head, rows=rows, context=100).process_bytes

    assert process(1) > 250e6 and process(8) == process(5) > process(4) > process(1)
    assert process(4, head=True) > process(4)


def test_gpt3_is_recovered_from_its_size_alone() -> None:
    shape = ModelShape.hypothetical(name="GPT-3", parameters=175 * 10**9, layers=96, vocab_size=50257, context_length=2048)
    assert shape.hidden_size == 12288
    assert shape.query_heads[0] == 96
    assert abs(shape.widths[0] - 4 * 12288) < 128
    assert shape.weights_bytes == 350 * 10**9
    assert shape.parameters == 175 * 10**9


def test_the_parameters_of_a_hypothetical_model_add_up() -> None:
    shape = ModelShape.hypothetical(name="odd", parameters=1_000_003, layers=7, vocab_size=101, context_length=64, hidden_size=96)
    assert shape.parameters == 1_000_003
    assert len({block.parameters for block in shape.layers}) == 2


def test_a_model_smaller_than_its_vocabulary_is_refused() -> None:
    with pytest.raises(PlanError, match="total_parameters"):
        ModelShape.hypothetical(name="no", parameters=1000, layers=2, vocab_size=50_000, context_length=64, hidden_size=64)


def test_fewer_bits_take_fewer_bytes_scales_included() -> None:
    sizes = [stored_bytes(32_000, bits, 320) for bits in (32, 16, 8, 4)]
    assert sizes == [128_000, 64_000, 32_000 + 4 * 100, 16_000 + 4 * 1000]
    assert all(more > fewer for more, fewer in pairwise(sizes))


def test_other_bits_leave_the_imported_model_behind() -> None:
    shape = ModelShape.of(_manifest(16))
    assert shape.with_bits(16) is shape
    other = shape.with_bits(8)
    assert shape.model_hash is not None and other.model_hash is None
    assert other.layers[0] == BlockShape(stored_bytes(PARAMETERS[0], 8, D), PARAMETERS[0])
    assert "estimated" in other.notes[-1]


@pytest.mark.parametrize("layers", [LayerRange(0, 5), LayerRange(-1, 2), LayerRange(2, 2), LayerRange(3, 1)])
def test_a_range_outside_the_model_is_refused(layers: LayerRange) -> None:
    with pytest.raises(BadLayerRange, match="<= 4"):
        predict(_manifest(), layers, embed=False, head=False, rows=1, context=8)
