"""Anthropic's SDK on `/v1/messages`."""

from anthropic import Anthropic
from ask import QUESTION, TOOL, WEATHER, Depth, run


def client(url: str) -> Anthropic:
    return Anthropic(base_url=url, api_key="none", max_retries=0)


def text(url: str, model: str) -> str:
    reply = client(url).messages.create(
        model=model, max_tokens=100, messages=[{"role": "user", "content": QUESTION}]
    )
    return reply.content[0].text


def stream(url: str, model: str) -> list[str]:
    messages = [{"role": "user", "content": QUESTION}]
    with client(url).messages.stream(model=model, max_tokens=100, messages=messages) as parts:
        return list(parts.text_stream)


def _tool() -> dict[str, object]:
    return {
        "name": TOOL["name"],
        "description": TOOL["description"],
        "input_schema": TOOL["parameters"],
    }


def tools(url: str, model: str) -> str:
    messages: list = [{"role": "user", "content": WEATHER}]
    for _ in range(2):
        reply = client(url).messages.create(
            model=model, max_tokens=100, messages=messages, tools=[_tool()]
        )
        messages.append({"role": "assistant", "content": reply.content})
        outputs = []
        for block in reply.content:
            if block.type == "tool_use":
                assert (block.name, block.input) == ("weather", {"city": "Oslo"})
                output = {"type": "tool_result", "tool_use_id": block.id, "content": "11 degrees"}
                outputs.append(output)
        messages.append({"role": "user", "content": outputs})
    return reply.content[0].text


def json(url: str, model: str) -> dict[str, object]:
    tool = {"name": "depth", "input_schema": Depth.model_json_schema()}
    reply = client(url).messages.create(
        model=model,
        max_tokens=64,
        messages=[{"role": "user", "content": QUESTION}],
        tools=[tool],
        tool_choice={"type": "tool", "name": "depth"},
    )
    return Depth.model_validate(reply.content[0].input).model_dump()


run(text, stream, tools, json)
