"""The completion routes, token routes and models, through the official client.

Oracle: the fake engine's script, the tokenizer, and closed forms of the log-probabilities.
"""

from __future__ import annotations

from typing import Any

import pytest
import web
from fake_engine import DEFAULT, FakeEngine, logprob_of
from live import Live
from openai import OpenAI
from served import CONTEXT, make_model

from rorqual.serve.completion_job import check_lengths
from rorqual.serve.errors import ApiError
from rorqual.serve.prompts import completion_prompts
from rorqual.serve.schemas_completions import CompletionRequest
from rorqual.tokenizer import Tokenizer
from rorqual.tokenizer.special import FIM_BEGIN, FIM_END, FIM_HOLE

pytestmark = pytest.mark.concurrency


def complete(client: OpenAI, prompt: Any, **fields: Any) -> Any:
    return client.completions.create(model="sei", prompt=prompt, **fields)


def test_a_text_gets_a_begin_of_sentence(
    client: OpenAI, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    reply = complete(client, "The whale")
    assert reply.object == "text_completion"
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == (DEFAULT, "stop")
    assert engine.requests[-1].prompt_ids == tokenizer.encode("The whale", bos=True)


def test_special_names_in_a_text_are_text(client: OpenAI, engine: FakeEngine) -> None:
    complete(client, "<｜User｜>hello")
    ids = engine.requests[-1].prompt_ids
    assert not set(ids[1:]) & set(engine.tokenizer.special_ids.values())


def test_ids_are_taken_as_they_are(client: OpenAI, engine: FakeEngine) -> None:
    complete(client, [5, 6, 7])
    assert engine.requests[-1].prompt_ids == [5, 6, 7]


def test_many_prompts_and_choices_keep_their_order(client: OpenAI, engine: FakeEngine) -> None:
    num_before = len(engine.requests)
    reply = complete(client, ["count up", "hello"], n=2, seed=3, max_tokens=4)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    first, second, third, fourth = (choice.text for choice in reply.choices)
    assert first == second == "0 1 "
    assert third == fourth
    assert DEFAULT.startswith(third)
    assert [request.params.seed for request in engine.requests[num_before:]] == [3, 4, 3, 4]
    lists = complete(client, [[5, 6], [7]])
    assert len(lists.choices) == 2
    assert lists.usage.prompt_tokens == 3


def test_a_stream_of_several_prompts(client: OpenAI) -> None:
    texts = {0: "", 1: ""}
    chunks = list(
        complete(client, ["count up", "hello"], stream=True, stream_options={"include_usage": True})
    )
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {0: " ".join(map(str, range(200))), 1: DEFAULT}
    assert chunks[-1].usage.completion_tokens > 0


@pytest.mark.parametrize("path", ["/v1", "/beta", ""])
def test_fill_in_the_middle(
    live: Live, engine: FakeEngine, tokenizer: Tokenizer, path: str
) -> None:
    client = OpenAI(base_url=live.url + path, api_key="none")
    assert complete(client, "The whale", suffix="sea.").choices[0].text == DEFAULT
    text = tokenizer.decode(engine.requests[-1].prompt_ids)
    assert text == f"{tokenizer.bos_token}{FIM_BEGIN}The whale{FIM_HOLE}sea.{FIM_END}"


def test_texts_that_cannot_fit_are_refused_before_they_are_tokenised(tokenizer: Tokenizer) -> None:
    """However they are tokenised; the others' characters are counted, the suffix among them."""
    model = make_model(tokenizer, max_positions=10)
    most = "x" * (9 * tokenizer.longest_token)
    for field in ("prompt", "suffix"):
        body = CompletionRequest.model_validate({"prompt": ["a", "b"]} | {field: most})
        assert check_lengths(body, model) == len(most) + 2 * (field == "suffix")
        body = CompletionRequest.model_validate({"prompt": "a"} | {field: most + "x"})
        with pytest.raises(ApiError) as caught:
            check_lengths(body, model)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", field)
    assert check_lengths(CompletionRequest(prompt=[[1, 2], [3]]), model) == 0


def test_a_suffix_is_tokenised_once_for_all_prompts(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    end, seen = tokenizer.encode("sea."), []
    encode = Tokenizer.encode

    def noted(own: Tokenizer, text: str, *args: Any, **fields: Any) -> list[int]:
        seen.append(text)
        return encode(own, text, *args, **fields)

    monkeypatch.setattr(Tokenizer, "encode", noted)
    body = CompletionRequest(prompt=["a", "b", "c"], suffix="sea.")
    prompts = completion_prompts(body, tokenizer)
    assert [prompt.ids[-1 - len(end) : -1] for prompt in prompts] == [end] * 3
    assert seen.count("sea.") == 1


def test_echo(client: OpenAI) -> None:
    assert complete(client, "The whale", echo=True).choices[0].text == "The whale" + DEFAULT
    streamed = complete(client, "The whale", echo=True, stream=True)
    assert "".join(c.choices[0].text for c in streamed) == "The whale" + DEFAULT
    scored = complete(client, "The whale", echo=True, max_tokens=0)
    assert scored.choices[0].text == "The whale"
    assert scored.usage.completion_tokens == 0


def test_integer_logprobs(client: OpenAI, tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode(DEFAULT), tokenizer.eos_id]
    got = complete(client, "hello", logprobs=2).choices[0].logprobs
    assert got.token_logprobs == [logprob_of(i, 0).logprob for i in ids]
    assert got.tokens[:-1] == [tokenizer.decode([i]) for i in ids[:-1]]
    assert all(len(top) >= 2 for top in got.top_logprobs)
    # What `lm-eval` asks of each entry: the chosen token's value is among them.
    for value, top in zip(got.token_logprobs, got.top_logprobs, strict=True):
        assert value in top.values()
    assert complete(client, "hello").choices[0].logprobs is None
    assert complete(client, "hello", logprobs=0).choices[0].logprobs.top_logprobs is None


def test_the_prompts_logprobs_come_with_echo(client: OpenAI, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("The whale sings.")
    got = complete(client, prompt, logprobs=1, echo=True, max_tokens=1).choices[0].logprobs
    assert len(got.tokens) == len(prompt) + 1
    assert got.token_logprobs[0] is None
    assert got.token_logprobs[1:-1] == [logprob_of(i, 0).logprob for i in prompt[1:]]
    assert "".join(got.tokens[:-1]) == "The whale sings."
    for offset, token in zip(got.text_offset[:-1], got.tokens[:-1], strict=True):
        assert "The whale sings."[offset:].startswith(token)


def test_a_texts_hidden_first_token_is_not_reported(client: OpenAI, tokenizer: Tokenizer) -> None:
    got = complete(client, "The whale", logprobs=1, echo=True, max_tokens=1).choices[0].logprobs
    assert got.tokens[:-1] == [tokenizer.decode([i]) for i in tokenizer.encode("The whale")]
    assert None not in got.token_logprobs


def test_streamed_logprobs_are_those_of_the_whole(client: OpenAI) -> None:
    fields: Any = {"logprobs": 1, "echo": True, "max_tokens": 8}
    whole = complete(client, "wide characters", **fields).choices[0].logprobs
    tokens, offsets = [], []
    for chunk in complete(client, "wide characters", stream=True, **fields):
        tokens += chunk.choices[0].logprobs.tokens
        offsets += chunk.choices[0].logprobs.text_offset
    assert tokens == whole.tokens
    assert offsets == whole.text_offset


def test_half_characters_have_a_name(client: OpenAI, tokenizer: Tokenizer) -> None:
    got = complete(client, "wide characters", logprobs=0).choices[0].logprobs
    assert "bytes:\\xf0" in got.tokens  # the first of the four bytes of a whale


def test_models(client: OpenAI, live: Live) -> None:
    assert [model.id for model in client.models.list()] == ["sei", "minke"]
    assert client.models.retrieve("minke").model_extra["max_model_len"] == CONTEXT
    assert [m["id"] for m in web.get(live.url + "/models").json()["data"]] == ["sei", "minke"]


def test_tokenize_and_back(live: Live, tokenizer: Tokenizer) -> None:
    def post(path: str, body: dict[str, Any]) -> Any:
        return web.post(live.url + path, json=body).json()

    ids = tokenizer.encode("The whale 🐋", bos=True)
    got = post("/tokenize", {"prompt": "The whale 🐋", "return_token_strs": True})
    assert got["tokens"] == ids
    assert got["count"] == len(ids) == len(got["token_strs"])
    assert got["max_model_len"] == CONTEXT
    bare = post("/tokenize", {"prompt": "The whale 🐋", "add_special_tokens": False})
    assert bare["tokens"] == ids[1:]
    assert post("/detokenize", {"tokens": ids[1:]}) == {"prompt": "The whale 🐋"}
    messages = [{"role": "user", "content": "hello"}]
    assert post("/tokenize", {"messages": messages})["tokens"] == tokenizer.encode_chat(messages)
    assert post("/detokenize", {"tokens": [10**9]})["error"]["param"] == "tokens"


def test_health(live: Live) -> None:
    assert web.get(live.url + "/health").json() == {"status": "ok", "device": "cpu"}
    assert web.get(live.url + "/ready").json() == {"status": "ready"}
