"""Pydantic AI over an OpenAI-compatible provider."""

from ask import QUESTION, WEATHER, Depth, run, weather
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


def agent(url: str, model: str, **options: object) -> Agent:
    provider = OpenAIProvider(base_url=url + "/v1", api_key="none")
    return Agent(OpenAIChatModel(model, provider=provider), **options)


def text(url: str, model: str) -> str:
    return agent(url, model).run_sync(QUESTION).output


async def stream(url: str, model: str) -> list[str]:
    async with agent(url, model).run_stream(QUESTION) as result:
        return [part async for part in result.stream_text(delta=True, debounce_by=None)]


def tools(url: str, model: str) -> str:
    return agent(url, model, tools=[weather]).run_sync(WEATHER).output


def json(url: str, model: str) -> dict[str, object]:
    settings = {"max_tokens": 64}
    by_tool = agent(url, model, output_type=Depth, model_settings=settings).run_sync(QUESTION)
    native = agent(url, model, output_type=NativeOutput(Depth), model_settings=settings)
    assert isinstance(native.run_sync(QUESTION).output, Depth)
    return by_tool.output.model_dump()


run(text, stream, tools, json)
