"""What a gateway keeps of one subject's responses is bounded by number and size."""

from __future__ import annotations

import zlib

import pytest

from mesh.gateway.kept_responses import OWNER_BYTES, OWNER_RESPONSES, KeptResponse, _key, _Owned, pack, unpack


def test_the_oldest_are_forgotten_beyond_the_number() -> None:
    owned = _Owned()
    over = [old for number in range(OWNER_RESPONSES + 3) for old in owned.add(str(number), 10)]
    assert over == ["0", "1", "2"] and len(owned.entries) == OWNER_RESPONSES and owned.size == 10 * OWNER_RESPONSES


def test_the_oldest_are_forgotten_beyond_the_size() -> None:
    owned = _Owned()
    assert owned.add("a", OWNER_BYTES // 2) == owned.add("b", OWNER_BYTES // 2) == []
    assert owned.add("c", OWNER_BYTES // 2 + 1) == ["a", "b"] and owned.size == OWNER_BYTES // 2 + 1


def test_a_response_that_is_kept_again_is_not_forgotten() -> None:
    """A stream that is resumed keeps its response once more."""
    owned = _Owned()
    owned.add("a", OWNER_BYTES // 2)
    assert owned.add("a", OWNER_BYTES // 2 + 1) == []


def test_keys_of_subjects_differ_and_say_nothing() -> None:
    assert _key("ann", "resp_1") != _key("bob", "resp_1") and "ann" not in _key("ann", "resp_1")


def test_what_is_kept_is_read_again() -> None:
    kept = KeptResponse({"id": "resp_1"}, [{"role": "user", "content": "a"}])
    assert unpack(pack(kept)) == kept


@pytest.mark.parametrize("document", ["", "{", "[]", "{}", '{"response": [], "messages": []}', '{"response": {}, "messages": [1]}'])
def test_what_another_program_wrote_is_nothing(document: str) -> None:
    assert unpack(document.encode()) is None and unpack(zlib.compress(document.encode())) is None
