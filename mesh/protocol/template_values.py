"""Values of a request for its model's chat template, beside the messages: switches such as Qwen3's `enable_thinking`."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import AfterValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

__all__ = ["TEMPLATE_FIELDS", "TemplateValues"]

TEMPLATE_FIELDS: Final = frozenset({"add_generation_prompt", "continue_final_message", "parse_special", "chat_template_kwargs"})
"""The fields of a request that say how its messages become a prompt, by the names that all APIs have for them."""

MAX_VALUES: Final = 16
MAX_VALUE_CHARACTERS: Final = 1024
_OWN: Final = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "parse_special", "bos_token", "eos_token"}
)
"""What a template has from the rest of a request, and from the model."""


def _scalar(value: Any) -> Any:
    text = isinstance(value, str) and len(value) <= MAX_VALUE_CHARACTERS
    if not text and not isinstance(value, bool | float) and not (isinstance(value, int) and -(2**63) <= value < 2**63):
        most = f"{MAX_VALUE_CHARACTERS:,}"
        raise PydanticCustomError("kind", "should be true, false, a number or a text of at most {most} characters", {"most": most})
    return value


def _of_the_template_alone(values: dict[str, Any]) -> dict[str, Any]:
    own = next((name for name in values if name in _OWN), None)
    if own is not None:
        raise PydanticCustomError("unmet", "has {own}, which the rest of the request or the model says: leave it out", {"own": own})
    return values


TemplateValues = Annotated[
    dict[
        Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$")],
        Annotated[Any, AfterValidator(_scalar), WithJsonSchema({"type": ["boolean", "number", "string"]})],
    ],
    Field(max_length=MAX_VALUES),
    AfterValidator(_of_the_template_alone),
]
"""By the names that the template has for them."""
