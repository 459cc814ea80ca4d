"""Which lengths of the cache have programs of their own."""

from __future__ import annotations

import pytest

from mesh.runtime import buckets
from mesh.runtime.buckets import Buckets


@pytest.mark.parametrize(
    ("in_blocks", "context", "lengths"),
    [
        (True, 100, (100,)),
        (True, 8192, (8192,)),
        (True, 131072, (8192, 32768, 131072)),
        (False, 100, (100,)),
        (False, 1024, (128, 256, 512, 1024)),
        (False, 8192, (128, 256, 512, 2048, 8192)),
        (False, 131072, (128, 256, 512, 2048, 8192, 32768, 131072)),
    ],
)
def test_lengths_are_few_where_attention_reads_in_blocks(
    monkeypatch: pytest.MonkeyPatch, in_blocks: bool, context: int, lengths: tuple[int, ...]
) -> None:
    monkeypatch.setattr(buckets, "in_blocks", lambda: in_blocks)
    assert Buckets.plan(rows=4, context=context, chunk=64).lengths == lengths
