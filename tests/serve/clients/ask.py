"""What every client is asked, and the way its answer goes back to the test.

A script beside this one is run as `python use_CLIENT.py WHAT URL MODEL`, in the environment that
has the client. It prints one line of JSON: what the function of that name returned.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel

QUESTION = "How deep is the sea?"
WEATHER = "What is the weather in Oslo?"
TOOL = {
    "name": "weather",
    "description": "The weather of a city now.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}


class Depth(BaseModel):
    """The form of a JSON answer; few texts fit it, so that a small model is quick."""

    kind: Literal["sea", "lake"]
    is_deep: bool


def weather(city: str) -> str:
    """The weather of a city now.

    Args:
        city: its name
    """
    assert city == "Oslo", city
    return "11 degrees"


def run(*functions: Callable[[str, str], Any]) -> None:
    """Calls the function that the command line names and prints what it gave."""
    what, url, model = sys.argv[1:]
    function = next(each for each in functions if each.__name__ == what)
    answer = function(url, model)
    if inspect.isawaitable(answer):
        answer = asyncio.run(_wait(answer))
    print(json.dumps(answer))


async def _wait(answer: Any) -> Any:
    return await answer
