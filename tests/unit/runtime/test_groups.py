"""Which layers of a stage share a program."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.lowering import Lowered
from mesh.runtime.loading import Block
from mesh.runtime.programs import grouped
from mesh.runtime.step import GROUP_LAYERS


def programs(pattern: str) -> list[str]:
    """The layers of each program, where a letter stands for a kind of layer."""
    unused = Lowered.__new__(Lowered)
    layers = [Block(str(index), kind, unused, {}, unused) for index, kind in enumerate(pattern)]
    groups = list(grouped(layers))
    assert [layer.name for group in groups for layer in group.blocks] == [layer.name for layer in layers]
    assert [group.first for group in groups] == [int(group.blocks[0].name) for group in groups]
    return ["".join(group.signature) for group in groups]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a", ["a"]),
        ("a" * 30, ["a" * 6] * 5),
        ("a" * 8, ["aaaa", "aaaa"]),
        ("aaaaabaaaaab", ["aaaaab", "aaaaab"]),  # a window in five layers of six
        ("b" + "a" * 12, ["b", "aaaaaa", "aaaaaa"]),  # a dense layer before those of experts
        # --bits 4 of 30 layers: short runs do not become programs of two layers because a long one is among them
        ("aaabbabbabbabbabbc" + "b" * 9 + "aaa", ["aaabba", "bbabba", "bbabbc", "bbbbb", "bbbb", "aaa"]),
    ],
)
def test_programs_are_full_and_few(pattern: str, expected: list[str]) -> None:
    assert programs(pattern) == expected


@given(st.text("ab", min_size=1, max_size=60))
def test_a_program_is_never_too_long_and_long_runs_stand_alone(pattern: str) -> None:
    found = programs(pattern)
    assert max(map(len, found)) <= GROUP_LAYERS
    long_runs = sum(len(list(run)) >= GROUP_LAYERS for _, run in groupby(pattern))
    assert len(found) <= len(pattern) // GROUP_LAYERS + 2 * long_runs + 1
