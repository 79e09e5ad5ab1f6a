"""The official `openai` package."""

from ask import QUESTION, TOOL, WEATHER, Depth, run
from openai import OpenAI


def client(url: str) -> OpenAI:
    return OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)


def text(url: str, model: str) -> str:
    messages = [{"role": "user", "content": QUESTION}]
    reply = client(url).chat.completions.create(model=model, messages=messages)
    return reply.choices[0].message.content


def stream(url: str, model: str) -> list[str]:
    messages = [{"role": "user", "content": QUESTION}]
    chunks = client(url).chat.completions.create(model=model, messages=messages, stream=True)
    return [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]


def tools(url: str, model: str) -> str:
    messages = [{"role": "user", "content": WEATHER}]
    tool = {"type": "function", "function": TOOL}
    for _ in range(2):
        reply = client(url).chat.completions.create(model=model, messages=messages, tools=[tool])
        message = reply.choices[0].message
        messages.append(message.model_dump())
        for call in message.tool_calls or []:
            assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Oslo"}')
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "11 degrees"})
    return message.content


def json(url: str, model: str) -> dict[str, object]:
    messages = [{"role": "user", "content": QUESTION}]
    reply = client(url).chat.completions.parse(
        model=model, messages=messages, response_format=Depth, max_tokens=64
    )
    return reply.choices[0].message.parsed.model_dump()


run(text, stream, tools, json)
