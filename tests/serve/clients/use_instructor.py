"""Instructor, which makes objects of answers: by tools and by a JSON schema."""

import instructor
from ask import QUESTION, Depth, run
from openai import OpenAI


def ask(url: str, model: str, mode: instructor.Mode) -> Depth:
    client = OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
    return instructor.from_openai(client, mode=mode).chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        response_model=Depth,
        max_retries=0,
        max_tokens=64,
    )


def tools(url: str, model: str) -> dict[str, object]:
    return ask(url, model, instructor.Mode.TOOLS).model_dump()


def json(url: str, model: str) -> dict[str, object]:
    return ask(url, model, instructor.Mode.JSON_SCHEMA).model_dump()


def stream(url: str, model: str) -> list[dict[str, object]]:
    client = OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
    parts = instructor.from_openai(client).chat.completions.create_partial(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        response_model=Depth,
        max_tokens=64,
    )
    return [part.model_dump() for part in parts]


run(tools, json, stream)
