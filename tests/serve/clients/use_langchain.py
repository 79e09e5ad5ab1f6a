"""LangChain's `ChatOpenAI`."""

from ask import QUESTION, WEATHER, Depth, run, weather
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI


def chat(url: str, model: str, **options: object) -> ChatOpenAI:
    return ChatOpenAI(base_url=url + "/v1", api_key="none", model=model, max_retries=0, **options)


def text(url: str, model: str) -> str:
    return chat(url, model).invoke(QUESTION).content


def stream(url: str, model: str) -> list[str]:
    return [chunk.content for chunk in chat(url, model).stream(QUESTION)]


def tools(url: str, model: str) -> str:
    bound = chat(url, model).bind_tools([weather])
    messages: list = [HumanMessage(WEATHER)]
    first = bound.invoke(messages)
    messages.append(first)
    for call in first.tool_calls:
        messages.append(ToolMessage(weather(**call["args"]), tool_call_id=call["id"]))
    return bound.invoke(messages).content


def json(url: str, model: str) -> dict[str, object]:
    structured = chat(url, model, max_tokens=64).with_structured_output(Depth)
    return structured.invoke(QUESTION).model_dump()


run(text, stream, tools, json)
