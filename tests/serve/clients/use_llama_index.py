"""LlamaIndex's `OpenAILike`."""

from ask import QUESTION, WEATHER, Depth, run, weather
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike


def llm(url: str, model: str, **options: object) -> OpenAILike:
    return OpenAILike(
        model=model,
        api_base=url + "/v1",
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        max_retries=0,
        **options,
    )


def text(url: str, model: str) -> str:
    return llm(url, model).chat([ChatMessage(role="user", content=QUESTION)]).message.content


def stream(url: str, model: str) -> list[str]:
    chunks = llm(url, model).stream_chat([ChatMessage(role="user", content=QUESTION)])
    return [chunk.delta or "" for chunk in chunks]


def tools(url: str, model: str) -> str:
    tool = FunctionTool.from_defaults(weather)
    asked = llm(url, model)
    history = [ChatMessage(role="user", content=WEATHER)]
    first = asked.chat_with_tools([tool], chat_history=history)
    history.append(first.message)
    for call in asked.get_tool_calls_from_response(first):
        output = weather(**call.tool_kwargs)
        extra = {"tool_call_id": call.tool_id}
        history.append(ChatMessage(role="tool", content=output, additional_kwargs=extra))
    return asked.chat_with_tools([tool], chat_history=history).message.content


def json(url: str, model: str) -> dict[str, object]:
    structured = llm(url, model, max_tokens=64).as_structured_llm(Depth)
    return structured.complete(QUESTION).raw.model_dump()


run(text, stream, tools, json)
