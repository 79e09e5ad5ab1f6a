"""smolagents' `OpenAIServerModel`."""

from ask import QUESTION, WEATHER, Depth, run, weather
from smolagents import ChatMessage, OpenAIServerModel, ToolCallingAgent, tool


def served(url: str, model: str, **options: object) -> OpenAIServerModel:
    return OpenAIServerModel(model_id=model, api_base=url + "/v1", api_key="none", **options)


def question() -> list[ChatMessage]:
    return [ChatMessage(role="user", content=[{"type": "text", "text": QUESTION}])]


def text(url: str, model: str) -> str:
    return served(url, model).generate(question()).content


def stream(url: str, model: str) -> list[str]:
    parts = served(url, model).generate_stream(question())
    return [part.content or "" for part in parts]


def tools(url: str, model: str) -> str:
    agent = ToolCallingAgent(
        tools=[tool(weather)], model=served(url, model), max_steps=3, verbosity_level=0
    )
    return agent.run(WEATHER)


def json(url: str, model: str) -> dict[str, object]:
    schema = {"name": "depth", "schema": Depth.model_json_schema()}
    answer = served(url, model, max_tokens=64).generate(
        question(), response_format={"type": "json_schema", "json_schema": schema}
    )
    return Depth.model_validate_json(answer.content).model_dump()


run(text, stream, tools, json)
