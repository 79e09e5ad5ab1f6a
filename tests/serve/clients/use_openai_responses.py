"""The official `openai` package on `/v1/responses`."""

from ask import QUESTION, TOOL, WEATHER, Depth, run
from openai import OpenAI


def client(url: str) -> OpenAI:
    return OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)


def text(url: str, model: str) -> str:
    return client(url).responses.create(model=model, input=QUESTION).output_text


def stream(url: str, model: str) -> list[str]:
    with client(url).responses.stream(model=model, input=QUESTION) as events:
        parts = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert "".join(parts) == events.get_final_response().output_text
    return parts


def tools(url: str, model: str) -> str:
    tool = {"type": "function", "strict": False, **TOOL}
    first = client(url).responses.create(model=model, input=WEATHER, tools=[tool])
    outputs = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "11 degrees"}
        for item in first.output
        if item.type == "function_call" and item.arguments == '{"city": "Oslo"}'
    ]
    second = client(url).responses.create(
        model=model, input=outputs, tools=[tool], previous_response_id=first.id
    )
    return second.output_text


def json(url: str, model: str) -> dict[str, object]:
    reply = client(url).responses.parse(
        model=model, input=QUESTION, text_format=Depth, max_output_tokens=64
    )
    return reply.output_parsed.model_dump()


run(text, stream, tools, json)
