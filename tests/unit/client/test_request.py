"""The arguments of the client: typed, complete, and named in errors as the caller knows them."""

from __future__ import annotations

import pytest

from mesh.client.request import _OWN, RequestArguments, message_of
from mesh.errors import BadRequest
from mesh.protocol.generation import Generate


def test_the_typed_arguments_are_the_fields_of_a_request() -> None:
    assert RequestArguments.__annotations__.keys() == Generate.model_fields.keys() - _OWN - {"prompt"}


def test_an_unknown_argument_is_named_with_the_right_one() -> None:
    with pytest.raises(BadRequest, match=r"max_token is no argument of a request: did you mean max_tokens\?") as caught:
        message_of("Rain?", {"max_token": 5})
    assert caught.value.field == "max_token"
    with pytest.raises(BadRequest, match="there are prompt, messages") as caught:
        message_of("Rain?", {"zzz": 5})
    assert not any(name in str(caught.value) for name in ("attempt", "given", "epoch", "waited_s"))
