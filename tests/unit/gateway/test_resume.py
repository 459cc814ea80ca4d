"""The ids of events: what they say comes back as it was, and nothing else is taken."""

from __future__ import annotations

import pytest

from mesh.client import Chunk, Token
from mesh.errors import BadRequest
from mesh.gateway.resume import Progress


def chunk(index: int, *, last: bool = False) -> Chunk:
    return Chunk("", None if last else Token(1), index, 0.0)


def test_an_id_says_what_the_client_has_of_each_choice() -> None:
    first = Progress(2)
    for index in range(3):
        first.take(0, chunk(index))
    first.take(1, chunk(0))
    first.take(1, chunk(1, last=True))
    again = Progress(2, first.id)
    assert again.resumed and not first.resumed
    assert [again.had(choice) for choice in range(2)] == [3, 1]
    assert again.has(0, chunk(2)) and not again.has(0, chunk(3)) and not again.has(0, chunk(3, last=True))
    assert again.has(1, chunk(1, last=True)) and not again.has(1, chunk(1))
    assert again.id == first.id
    assert [again.session(choice) for choice in range(2)] == [first.session(choice) for choice in range(2)]
    assert [again.seed(choice) for choice in range(2)] == [first.seed(choice) for choice in range(2)]
    assert len({first.seed(0), first.seed(1), Progress(1).seed(0)}) == 3
    again.take(0, chunk(0))  # the client has it already
    assert again.id == first.id


@pytest.mark.parametrize(
    "id", ["x", "17", "0" * 32, "0" * 32 + ".", "0" * 32 + ".1-2", "0" * 31 + ".1", "0" * 32 + ".-1", "0" * 32 + ".1e5"]
)
def test_another_id_is_refused(id: str) -> None:
    with pytest.raises(BadRequest) as raised:
        Progress(1, id)
    assert raised.value.field == "Last-Event-ID"


def test_the_generations_of_a_stream_are_those_of_its_owner() -> None:
    mine = Progress(2, owner="team-a")
    assert Progress(2, mine.id, owner="team-a").session(1) == mine.session(1)
    for owner in ("team-b", "", "team-a.", "team"):
        other = Progress(2, mine.id, owner=owner)
        assert other.session(1) != mine.session(1) and other.seed(1) != mine.seed(1)
    assert mine.id.split(".")[0] not in mine.session(0)
