"""OpenAI's Agents SDK, over chat completions and over responses."""

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from ask import QUESTION, WEATHER, Depth, run, weather
from openai import AsyncOpenAI

set_tracing_disabled(True)


def agent(
    url: str, model: str, kind: type = OpenAIChatCompletionsModel, **options: object
) -> Agent:
    client = AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
    return Agent("asker", model=kind(model, client), **options)


def text(url: str, model: str) -> str:
    return Runner.run_sync(agent(url, model), QUESTION).final_output


async def stream(url: str, model: str) -> list[str]:
    result = Runner.run_streamed(agent(url, model), QUESTION)
    return [
        event.data.delta
        async for event in result.stream_events()
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]


def tools(url: str, model: str) -> str:
    return Runner.run_sync(agent(url, model, tools=[function_tool(weather)]), WEATHER).final_output


def json(url: str, model: str) -> dict[str, object]:
    settings = ModelSettings(max_tokens=64)
    asked = agent(url, model, output_type=Depth, model_settings=settings)
    return Runner.run_sync(asked, QUESTION).final_output.model_dump()


def responses_text(url: str, model: str) -> str:
    return Runner.run_sync(agent(url, model, OpenAIResponsesModel), QUESTION).final_output


def responses_tools(url: str, model: str) -> str:
    asked = agent(url, model, OpenAIResponsesModel, tools=[function_tool(weather)])
    return Runner.run_sync(asked, WEATHER).final_output


run(text, stream, tools, json, responses_text, responses_tools)
