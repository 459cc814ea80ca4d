"""What agents' libraries ask of OpenAI's API, asked of a mesh: does each get what it understands?

    pip install langchain-openai "pydantic-ai-slim[openai]" instructor        # in an environment of their own
    mesh up models/smollm2
    python bench/agents.py http://127.0.0.1:8080/v1 MODEL

Each line is one use of one library: forced calls, a loop of calls and their results, streams, and answers with the form of a pydantic
model. The model decides little: what is asked is that the library reads every answer. The exit code is 1 if one of them did not.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from pydantic import BaseModel, Field


class Trip(BaseModel, extra="forbid"):
    """A trip to a city. A small model would not come to an end of keys that the form leaves open."""

    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


def weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather in a city."""
    return f"{city}: sun"


# -- langchain -----------------------------------------------------------------------------------------------------------


def langchain(base_url: str, model: str) -> dict[str, Callable[[], object]]:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=base_url, api_key="none", model=model, temperature=0, max_tokens=120, max_retries=0)
    forced = chat.bind_tools([tool(weather)], tool_choice="weather")

    def loop() -> object:
        messages: list[Any] = [HumanMessage("What is the weather?")]
        for _ in range(3):
            answer = forced.invoke(messages)
            (call,) = answer.tool_calls
            messages += [answer, ToolMessage(weather(**call["args"]), tool_call_id=call["id"])]
        return chat.bind_tools([tool(weather)], tool_choice="none").invoke(messages).content

    def streamed() -> object:
        pieces = list(forced.stream("What is the weather?"))
        whole = pieces[0]
        for piece in pieces[1:]:
            whole += piece
        (call,) = whole.tool_calls
        return weather(**call["args"])

    async def several() -> object:
        answers = await asyncio.gather(*(forced.ainvoke(f"Weather {number}?") for number in range(4)))
        return [weather(**answer.tool_calls[0]["args"]) for answer in answers]

    return {
        "three calls in a loop, then a text": loop,
        "a call as a stream": streamed,
        "four at once": lambda: asyncio.run(several()),
        "a form, by json_schema": lambda: chat.with_structured_output(Trip, method="json_schema").invoke("Plan a trip."),
        "a form, by a call": lambda: chat.with_structured_output(Trip, method="function_calling").invoke("Plan a trip."),
    }


# -- pydantic-ai -----------------------------------------------------------------------------------------------------------


def pydantic_ai(base_url: str, model: str) -> dict[str, Callable[[], object]]:
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    served = OpenAIChatModel(model, provider=OpenAIProvider(base_url=base_url, api_key="none"))
    settings: Any = {"temperature": 0, "max_tokens": 120}

    async def streamed() -> object:
        async with Agent(served, model_settings=settings).run_stream("What is rain?") as run:
            return "".join([piece async for piece in run.stream_text(delta=True)])

    return {
        "a form, by a call": lambda: Agent(served, output_type=Trip, model_settings=settings).run_sync("Plan a trip.").output,
        "a form, by json_schema": lambda: (
            Agent(served, output_type=NativeOutput(Trip), model_settings=settings).run_sync("Plan a trip.").output
        ),
        "a tool beside a form": lambda: (
            Agent(served, output_type=Trip, tools=[weather], model_settings=settings).run_sync("Plan a trip.").output
        ),
        "a text as a stream": lambda: asyncio.run(streamed()),
    }


# -- instructor ------------------------------------------------------------------------------------------------------------


def instructor(base_url: str, model: str) -> dict[str, Callable[[], object]]:
    import instructor as library
    import openai

    def ask(mode: Any) -> object:
        client = library.from_openai(openai.OpenAI(base_url=base_url, api_key="none", max_retries=0), mode=mode)
        messages: Any = [{"role": "user", "content": "Plan a trip."}]
        return client.chat.completions.create(
            model=model, messages=messages, response_model=Trip, temperature=0, max_tokens=120, max_retries=1
        )

    modes = library.Mode
    return {f"a form, by {mode.name}": partial(ask, mode) for mode in (modes.TOOLS, modes.TOOLS_STRICT, modes.JSON_SCHEMA)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_url")
    parser.add_argument("model")
    args = parser.parse_args()
    failed = 0
    for library in (langchain, pydantic_ai, instructor):
        for name, use in library(args.base_url, args.model).items():
            try:
                print(f"{library.__name__}, {name}: {str(use())[:80]!r}", flush=True)
            except Exception as error:  # whatever a library raises is what it did not understand
                failed += 1
                print(f"{library.__name__}, {name}: FAILED, {error!r}", flush=True)
                traceback.print_exc()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
