"""LangChain's `ChatAnthropic` on `/v1/messages`."""

from ask import QUESTION, WEATHER, run, weather
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, ToolMessage


def chat(url: str, model: str) -> ChatAnthropic:
    return ChatAnthropic(base_url=url, api_key="none", model=model, max_tokens=100, max_retries=0)


def text(url: str, model: str) -> str:
    return chat(url, model).invoke(QUESTION).content


def stream(url: str, model: str) -> list[str]:
    return [chunk.text for chunk in chat(url, model).stream(QUESTION)]


def tools(url: str, model: str) -> str:
    bound = chat(url, model).bind_tools([weather])
    messages: list = [HumanMessage(WEATHER)]
    first = bound.invoke(messages)
    messages.append(first)
    for call in first.tool_calls:
        messages.append(ToolMessage(weather(**call["args"]), tool_call_id=call["id"]))
    return bound.invoke(messages).content


run(text, stream, tools)
