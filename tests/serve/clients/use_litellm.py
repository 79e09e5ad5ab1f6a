"""LiteLLM, as an OpenAI-compatible endpoint."""

import json as json_module

import litellm
from ask import QUESTION, TOOL, WEATHER, Depth, run


def ask(url: str, model: str, messages: list, **options: object):
    return litellm.completion(
        model=f"openai/{model}",
        api_base=url + "/v1",
        api_key="none",
        messages=messages,
        num_retries=0,
        **options,
    )


def text(url: str, model: str) -> str:
    reply = ask(url, model, [{"role": "user", "content": QUESTION}])
    return reply.choices[0].message.content


def stream(url: str, model: str) -> list[str]:
    chunks = ask(url, model, [{"role": "user", "content": QUESTION}], stream=True)
    return [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]


def tools(url: str, model: str) -> str:
    messages: list = [{"role": "user", "content": WEATHER}]
    tool = {"type": "function", "function": TOOL}
    for _ in range(2):
        message = ask(url, model, messages, tools=[tool]).choices[0].message
        messages.append(message.model_dump())
        for call in message.tool_calls or []:
            assert json_module.loads(call.function.arguments) == {"city": "Oslo"}
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "11 degrees"})
    return message.content


def json(url: str, model: str) -> dict[str, object]:
    messages = [{"role": "user", "content": QUESTION}]
    reply = ask(url, model, messages, response_format=Depth, max_tokens=64)
    return Depth.model_validate_json(reply.choices[0].message.content).model_dump()


run(text, stream, tools, json)
