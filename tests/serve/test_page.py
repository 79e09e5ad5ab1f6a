"""The chat page in a real headless Chromium: sending, stopping, branches, errors, settings.

Oracle: what a reader sees and what the server received. The server is `page_stub.py`, whose answers
are scripted; the last test goes through the real application. Every test also fails on an uncaught
error, a breach of the Content-Security-Policy or a request elsewhere (`stage.Chat.problems`).
"""

from __future__ import annotations

from typing import Any

import pytest
from stage import PLAYWRIGHT, Chat, Stage, needs_browser

from patience import wait_until

pytest.importorskip("playwright", reason=PLAYWRIGHT)
pytestmark = [needs_browser, pytest.mark.concurrency]

REGENERATE = "[aria-label='Write another answer']"
LONG = "go on for ever"


def test_a_question_is_answered(chat: Chat, stage: Stage) -> None:
    assert chat.page.locator("#empty").is_visible()
    assert chat.ask("hello") == "Answer 1 to: hello"
    assert not chat.page.locator("#empty").is_visible()
    assert chat.page.locator("#chat-title").inner_text() == "hello"
    assert chat.page.title() == "hello · Rorqual"
    assert stage.stub.requests == [
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "hello"}],
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
    ]
    assert chat.ask("and more") == "Answer 1 to: and more"
    roles = [message["role"] for message in stage.stub.requests[1]["messages"]]
    assert roles == ["user", "assistant", "user"]


def test_text_appears_while_it_is_written(chat: Chat) -> None:
    chat.send(LONG)
    chat.until("() => document.body.innerText.includes('word3')")
    assert chat.see("#stop").is_visible()
    assert chat.page.locator(".message.assistant").get_attribute("aria-busy") == "true"
    chat.until("() => document.body.innerText.includes('word9')")
    chat.page.locator("#stop").click()


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stop_keeps_the_text_and_ends_the_request(chat: Chat, stage: Stage, way: str) -> None:
    chat.send(LONG)
    chat.until("() => document.body.innerText.includes('word5')")
    if way == "button":
        chat.page.locator("#stop").click()
    else:
        chat.page.keyboard.press("Escape")
    text = chat.answer()
    assert "word5" in text
    assert chat.see(".note").inner_text() == "Stopped."
    wait_until(lambda: stage.stub.cancelled == [LONG])
    chat.page.wait_for_timeout(300)
    assert chat.answer() == text
    assert chat.page.locator(".notice").count() == 0


def test_stop_before_the_first_word_leaves_the_question(chat: Chat, stage: Stage) -> None:
    chat.send("wait in the queue")
    chat.until("() => document.body.innerText.includes('Waiting in the server')")
    chat.page.keyboard.press("Escape")
    chat.see(".unanswered button")
    stage.stub.has_room.set()
    chat.see(".unanswered button").click()
    assert chat.answer() == "Answer 2 to: wait in the queue"
    assert chat.page.locator(".unanswered").count() == 0


def test_another_answer_stands_beside_the_first(chat: Chat, stage: Stage) -> None:
    chat.ask("again")
    chat.page.locator(REGENERATE).click()
    chat.see(".branches")
    assert chat.answer() == "Answer 2 to: again"
    assert chat.page.locator(".branches").inner_text() == "2/2"
    assert stage.stub.requests[0] == stage.stub.requests[1]
    chat.page.locator("[aria-label='Earlier version']").click()
    assert chat.answer() == "Answer 1 to: again"
    assert chat.ask("next") == "Answer 1 to: next"
    contents = [message["content"] for message in stage.stub.requests[2]["messages"]]
    assert contents == ["again", "Answer 1 to: again", "next"]


def test_an_edited_question_goes_on_from_there(chat: Chat, stage: Stage) -> None:
    chat.ask("first")
    chat.ask("second")
    first = chat.page.locator(".message.user").first
    first.hover()
    first.locator("[aria-label='Edit message']").click()
    area = first.locator("textarea")
    assert area.input_value() == "first"
    area.press("Escape")
    assert area.count() == 0
    assert first.locator(".bubble").inner_text() == "first"
    first.locator("[aria-label='Edit message']").click()
    area.fill("changed")
    area.press("Enter")
    chat.until("() => document.body.innerText.includes('Answer 1 to: changed')")
    chat.answer()
    assert chat.page.locator(".message").count() == 2
    assert stage.stub.requests[-1]["messages"] == [{"role": "user", "content": "changed"}]
    chat.page.locator(".message.user").hover()
    chat.page.locator(".message.user [aria-label='Earlier version']").click()
    assert chat.page.locator(".message.user .bubble").all_inner_texts() == ["first", "second"]


def test_reasoning_is_folded_when_the_answer_begins(chat: Chat, stage: Stage) -> None:
    stage.stub.answers["why"] = ("Because **deep**.\n\n" * 12, "It is so.")
    stage.stub.has_thought.clear()
    chat.send("why")
    chat.until("() => document.querySelector('.reasoning').open")
    assert chat.see(".reasoning strong").inner_text() == "deep"
    stage.stub.has_thought.set()
    chat.until("() => document.body.innerText.includes('It is')")
    chat.until("() => !document.querySelector('.reasoning').open")
    chat.answer()
    assert chat.page.locator(".reasoning summary").inner_text().startswith("Thought for ")
    chat.page.locator(".reasoning summary").click()
    assert chat.page.locator(".reasoning-text").is_visible()
    chat.ask("more")
    sent = stage.stub.requests[-1]["messages"][1]
    assert sent == {"role": "assistant", "content": "It is so."}  # the reasoning stays here


def test_figures_come_from_usage(chat: Chat) -> None:
    chat.ask("hello")
    figures = chat.page.locator(".figures li").all_inner_texts()
    assert " tokens" in figures[0]  # "/s" only where the stub's pieces came one by one
    assert figures[1].startswith("first token ")
    assert figures[2:] == ["67 % of prompt cached", "100 % of drafts accepted"]
    details = [node.get_attribute("title") for node in chat.page.locator(".figures li").all()]
    assert details[2] == "16 of 24 prompt tokens came from the prefix cache"
    assert "position 1: 82 %, position 2: 61 %" in details[3]


@pytest.mark.parametrize(
    ("behind", "said"), [(0, "3 tokens"), (0.0001, "3 tokens"), (0.5, "4.0 tokens/s")]
)
def test_pieces_that_come_together_have_no_speed(chat: Chat, behind: float, said: str) -> None:
    """Two tokens behind the first piece, `behind` seconds later."""
    message = {
        "usage": {"completion_tokens": 3},
        "timing": {"firstTokenSeconds": 1, "totalSeconds": 1 + behind},
    }
    figures = chat.page.evaluate(
        "async message => (await import('/page/stats.js')).figures(message)", message
    )
    assert figures[0]["text"] == said


def test_what_is_cut_off_is_said(chat: Chat) -> None:
    chat.ask("be cut")
    assert chat.see(".note").inner_text().startswith("Cut off")


INJECTION = """<img src=x onerror="window.harmed=1"> <script>window.harmed=1</script>

[click](javascript:window.harmed=1) ![x](javascript:window.harmed=1) <svg onload=window.harmed=1>

<a href="javascript:window.harmed=1">a</a> [fine](https://example.org) <iframe srcdoc="<b>">

```html" onload="window.harmed=1
</code></pre><img src=x onerror=window.harmed=1>
```

| <b>a</b> | b |
|--|--|
| <img src=x onerror=window.harmed=1> | [y](data:text/html,z) |
"""


def test_nothing_written_becomes_markup(chat: Chat, stage: Stage) -> None:
    question = "<img src=x onerror=window.harmed=1>"
    stage.stub.answers[question] = (INJECTION, INJECTION)
    stage.stub.models = ["<b>tiny</b>"]
    chat.open()
    chat.ask(question)
    chat.page.locator(".reasoning summary").click()
    chat.page.wait_for_timeout(200)
    found = chat.page.evaluate(
        """() => ({ harmed: window.harmed,
          strange: document.querySelectorAll(
            "main img, script:not([src]), iframe, [onload], [onerror], b").length,
          links: [...document.querySelectorAll("#messages a")].map((a) => [a.href, a.rel]) })"""
    )
    safe = ["https://example.org/", "noopener noreferrer nofollow"]
    # The page's own <b> holds the model's name.
    assert found == {"harmed": None, "strange": 1, "links": [safe, safe]}
    assert chat.page.locator(".bubble").inner_text() == question
    assert chat.titles() == [question]
    assert chat.page.locator("#empty-model").text_content() == "<b>tiny</b>"


def test_a_key_is_asked_for_once(chat: Chat, stage: Stage) -> None:
    stage.stub.api_key = "right"
    chat.open()
    assert chat.see(".notice strong").inner_text() == "This server asks for an API key"
    chat.page.locator(".notice input").fill("wrong")
    chat.page.locator(".notice input").press("Enter")
    chat.until("() => document.body.innerText.includes('does not know this API key')")
    chat.page.locator(".notice input").fill("right")
    chat.page.locator(".notice button").click()
    chat.see("#model")
    assert chat.page.locator(".notice").count() == 0
    assert chat.ask("hello") == "Answer 1 to: hello"
    stage.stub.api_key = "new"
    chat.send("and now")
    chat.see(".notice input").fill("new")
    assert chat.page.locator(".notice").count() == 1
    chat.page.locator(".notice button").click()
    chat.until("() => document.body.innerText.includes('Answer 1 to: and now')")
    stored = chat.page.evaluate(
        "() => [JSON.stringify(localStorage), JSON.stringify(sessionStorage)]"
    )
    assert "api-key" not in stored[0]
    assert '"rorqual.api-key":"new"' in stored[1]
    chat.page.reload()
    chat.see("#model")


ERRORS = {
    "refuse 422": ("The server refused the request", "Temperature: too hot (found 9)."),
    "refuse 429": ("The server is busy", "The queue is full."),
    "refuse 500": ("The server failed", "The server failed on this request."),
    "break off": (
        "No connection",
        "The server closed the connection before the answer was complete.",
    ),
    "fail midway": ("The server failed", "Out of blocks."),
}


@pytest.mark.parametrize("question", ERRORS)
def test_errors_are_told_in_words(chat: Chat, question: str) -> None:
    chat.send(question)
    title, text = ERRORS[question]
    assert chat.see(".notice strong").inner_text() == title
    assert chat.page.locator(".notice p").inner_text() == text
    assert chat.page.locator(".notice").get_attribute("role") == "alert"
    chat.page.locator("#send").wait_for()
    is_partial = question in ("break off", "fail midway")
    assert chat.page.locator(".message.assistant").count() == is_partial
    if is_partial:
        assert chat.page.locator(".note").inner_text() == "Broken off before its end."
    chat.ask("something else")
    assert chat.page.locator(".notice").count() == 0


WATCH_COUNTDOWN = """() => {
  window.seen = [];
  new MutationObserver(() => {
    const node = document.querySelector(".countdown");
    if (node) window.seen.push(node.textContent);
  }).observe(document.body, { subtree: true, childList: true, characterData: true });
}"""


def test_retry_after_is_shown_and_retry_works(chat: Chat, stage: Stage) -> None:
    stage.stub.num_failures = 1
    chat.page.evaluate(WATCH_COUNTDOWN)
    chat.send("hello")
    chat.until("() => document.body.innerText.includes('Ready to try again')")
    seen = chat.page.evaluate("() => window.seen")
    assert seen[0] == "The server asks for 3 s of patience"
    chat.page.locator(".notice button").click()
    chat.until("() => document.body.innerText.includes('Answer 2 to: hello')")
    assert chat.page.locator(".notice").count() == 0
    assert chat.page.locator(".message").count() == 2


def test_a_dead_server_is_told_and_survived(chat: Chat) -> None:
    chat.page.route("**/v1/chat/completions", lambda route: route.abort())
    chat.send("hello")
    assert chat.see(".notice strong").inner_text() == "No connection"
    chat.page.unroute("**/v1/chat/completions")
    chat.page.locator(".notice button").click()
    chat.until("() => document.body.innerText.includes('Answer 1 to: hello')")


def test_the_queue_is_told(chat: Chat, stage: Stage) -> None:
    chat.send("wait in the queue")
    chat.until(
        "() => document.querySelector('.note')?.innerText === \"Waiting in the server's queue\""
    )
    stage.stub.has_room.set()
    assert chat.answer() == "Answer 1 to: wait in the queue"
    assert not chat.page.locator(".note").is_visible()


def test_settings_are_sent_and_defaults_are_not(chat: Chat, stage: Stage) -> None:
    chat.page.locator("#open-settings").click()
    chat.page.locator("#system-prompt").fill("Be brief.")
    values = {
        "temperature": "0,5",
        "top_p": "0.9",
        "top_k": "40",
        "min_p": "0.05",
        "max_tokens": "64",
        "seed": "7",
    }
    for name, value in values.items():
        chat.page.locator(f"#sampling-{name}").fill(value)
    chat.page.locator("#sampling-top_k").fill("-9")
    assert chat.page.locator("#sampling-top_k").get_attribute("aria-invalid") == "true"
    assert "whole number of -1 or more" in chat.page.locator("#sampling-top_k-hint").inner_text()
    chat.page.locator("#close-settings").click()
    chat.ask("hello")
    sent = stage.stub.requests[0]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    kept = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "max_tokens": 64,
        "seed": 7,
    }
    # An invalid value is not taken over: what was typed before it ("40") holds.
    assert {name: sent[name] for name in kept} == kept
    assert all(isinstance(sent[name], int) for name in ("top_k", "max_tokens", "seed"))
    chat.page.reload()
    chat.page.locator("#open-settings").click()
    assert chat.page.locator("#sampling-seed").input_value() == "7"
    assert chat.page.locator("#system-prompt").input_value() == "Be brief."
    chat.page.locator("#reset-sampling").click()
    chat.page.keyboard.press("Escape")
    chat.ask("again")
    assert set(stage.stub.requests[1]) == {"model", "messages", "stream", "stream_options"}


def test_a_model_can_be_chosen(chat: Chat, stage: Stage) -> None:
    stage.stub.models = ["tiny", "small"]
    chat.open()
    chat.page.locator("#model").select_option("small")
    chat.ask("hello")
    assert stage.stub.requests[0]["model"] == "small"
    stage.stub.models = ["other"]
    chat.page.reload()
    chat.until("() => document.querySelector('#model').value === 'other'")
    chat.ask("again")
    assert stage.stub.requests[1]["model"] == "other"


def test_two_chats_are_answered_at_once(chat: Chat, stage: Stage) -> None:
    chat.send(LONG)
    chat.until("() => document.body.innerText.includes('word2')")
    chat.page.keyboard.press("Control+k")
    assert chat.ask("quick") == "Answer 1 to: quick"
    assert chat.page.locator(".live-dot").count() == 1
    chat.page.locator(".chat-open", has_text=LONG).click()
    chat.until("() => document.body.innerText.includes('word9')")
    chat.page.keyboard.press("Escape")
    assert chat.see(".note").inner_text() == "Stopped."


def test_the_reader_may_scroll_up_while_text_arrives(chat: Chat, stage: Stage) -> None:
    stage.stub.answers["much"] = ("", "line\n\n" * 150)
    chat.send("much")
    chat.until("() => document.querySelector('#scroller').scrollTop > 300")
    chat.answer()
    chat.until(
        "() => { const s = document.querySelector('#scroller');"
        " return s.scrollHeight - s.scrollTop - s.clientHeight < 4; }"
    )
    chat.send(LONG)
    chat.until("() => document.body.innerText.includes('word2')")
    chat.page.locator("#scroller").evaluate("(node) => { node.scrollTop = 40; }")
    chat.until("() => document.body.textContent.includes('word15')")
    assert chat.page.locator("#scroller").evaluate("(node) => node.scrollTop") == 40
    chat.see("#jump").click()
    chat.until("() => document.querySelector('#scroller').scrollTop > 300")
    chat.page.locator("#stop").click()


def test_code_and_messages_can_be_copied(stage: Stage) -> None:
    with stage.chat(permissions=["clipboard-read", "clipboard-write"]) as chat:
        stage.stub.answers["code"] = ("", "Here:\n\n```py\nprint('hi')\n```")
        chat.ask("code")
        chat.page.locator(".code .copy-button").click()
        chat.see("[aria-label='Copied']")
        assert chat.page.evaluate("() => navigator.clipboard.readText()") == "print('hi')"
        chat.page.locator(".message.assistant .message-actions .copy-button").click()
        chat.until("() => document.querySelectorAll(\"[aria-label='Copied']\").length === 2")
        assert (
            chat.page.evaluate("() => navigator.clipboard.readText()")
            == stage.stub.answers["code"][1]
        )


def test_through_the_real_application(stage: Stage, live: Any) -> None:
    """The server's own headers, routes, fields and usage."""
    chat = Chat(stage.chromium.new_context().new_page(), f"{live.url}/")
    chat.open()
    assert chat.see("#model").input_value() == "sei"
    assert chat.ask("think first") == "It is deep."
    chat.page.locator(".reasoning summary").click()
    assert chat.texts(".reasoning-text") == ["The sea is deep."]
    assert len(chat.page.locator(".figures li").all_inner_texts()) == 4
    chat.page.locator(REGENERATE).click()
    chat.see(".branches")
    chat.answer()
    chat.page.locator("#open-settings").click()
    for name, value in {
        "temperature": "0.5",
        "top_k": "40",
        "min_p": "0.1",
        "top_p": "0.9",
        "seed": "1",
    }.items():
        chat.page.locator(f"#sampling-{name}").fill(value)
    chat.page.locator("#close-settings").click()
    chat.page.keyboard.press("Control+k")  # the fake engine answers the first question it finds
    assert chat.ask("wide characters") == "Whales: 鯨 🐋 ñ.", chat.last_notice
    chat.page.locator("#open-settings").click()
    chat.page.locator("#sampling-max_tokens").fill("2")
    chat.page.locator("#close-settings").click()
    chat.page.keyboard.press("Control+k")
    chat.ask("count up")
    assert chat.see(".note").inner_text().startswith("Cut off")
    assert chat.problems == []
    chat.page.context.close()
