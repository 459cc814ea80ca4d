"""What the gateway refuses by its length, with what it knows of the model."""

from __future__ import annotations

import pytest

from mesh.errors import BadRequest, PromptTooLong
from mesh.gateway.generation import check_length
from mesh.gateway.settings import Limits


@pytest.mark.parametrize("fields", [{"prompt": "a" * 101}, {"messages": [{"content": "a" * 51}, {"content": "a" * 50}]}])
def test_a_prompt_that_cannot_fit_is_refused_before_it_is_sent(fields: dict[str, object]) -> None:
    with pytest.raises(PromptTooLong, match="101 characters: no prompt of more than 100 fits"):
        check_length(fields, Limits(), 100)
    check_length(fields, Limits(), None)
    check_length(fields, Limits(), 101)


def test_the_number_of_tokens_is_not_a_number_of_characters() -> None:
    check_length({"tokens": [1] * 101}, Limits(), 100)
    with pytest.raises(BadRequest, match="ids"):
        check_length({"tokens": [1] * 101}, Limits(max_prompt_chars=100), 100)
