"""What a request for an embedding says, and the vector that is made of a hidden state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Dimensions", "Embed", "vector_of"]

Dimensions = Annotated[int, Field(ge=1, le=65536)]


class Embed(BaseModel):
    """The answer is a vector, and no token.

    pooling: which hidden state it is: `last`, that of the last token, which alone has seen all others. dimensions: only the first so many
    numbers of it, which says enough with models that were trained for that (None: all). normalize: the vector has the length 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    pooling: Literal["last"] = "last"
    dimensions: Dimensions | None = None
    normalize: bool = True


def vector_of(state: Sequence[float], asked: Embed) -> list[float]:
    """The vector of the hidden state that was asked for. A state of zeros stays as it is."""
    values = list(state[: asked.dimensions])
    length = math.sqrt(math.fsum(value * value for value in values)) if asked.normalize else 1.0
    return [value / length for value in values] if length else values
