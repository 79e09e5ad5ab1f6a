"""Files of strangers, a tab that deletes what another writes, and what the page's policy forbids.

Oracle: what a reader sees, the stored records, and the browser, which tells each breach.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stage import PLAYWRIGHT, Chat, Stage, needs_browser
from test_page_keeping import LONG, messages, other, stored

pytest.importorskip("playwright", reason=PLAYWRIGHT)
pytestmark = [needs_browser, pytest.mark.concurrency]
__all__ = ["other"]  # a fixture

BUILT_IN = ("__proto__", "constructor", "toString", "hasOwnProperty", "valueOf")


def take(chat: Chat, tmp_path: Path, content: str | bytes, name: str = "a.json") -> str:
    """Imports a file; what is said of it."""
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    chat.page.evaluate("() => document.querySelector('.toast')?.remove()")
    chat.page.evaluate("() => document.querySelector('#settings').showModal()")
    chat.page.locator("#import-file").set_input_files(file)
    chat.until(
        "() => document.querySelector('.toast') || !document.querySelector('#settings').open"
    )
    chat.page.evaluate("() => document.querySelector('#settings').close()")
    return " ".join(chat.texts(".toast"))


def exported(messages: dict[str, Any], **fields: Any) -> str:
    conversation = {"version": 1, "id": "x", "createdAt": 1, "messages": messages} | fields
    return json.dumps({"format": "rorqual-chat", "conversation": conversation})


def message(name: str, parent: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"id": name, "parent": parent, "role": "user", "content": f"of {name}"} | fields


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_id_that_objects_know_already_is_one_like_others(
    name: str, chat: Chat, tmp_path: Path
) -> None:
    """As the leaf, as what a message follows, and as a message's own."""
    take(chat, tmp_path, exported({"a": message("a")}, leaf={"value": name, "at": 1}))
    assert messages(chat) == ["of a"]
    take(chat, tmp_path, exported({"b": message("b", name)}, id="y", leaf={"value": "b", "at": 1}))
    assert messages(chat) == ["of b"]
    tree = json.loads(exported({"c": message(name), "d": message("d", name)}, id="z"))
    tree["conversation"]["leaf"] = {"value": "d", "at": 1}
    take(chat, tmp_path, json.dumps(tree))
    assert messages(chat) == [f"of {name}", "of d"]
    assert chat.page.evaluate("() => ({}).content === undefined && ({}).id === undefined")
    chat.reload()
    chat.see(".message")
    assert messages(chat) == [f"of {name}", "of d"]
    chat.ask("on")
    assert messages(chat)[-1] == "Answer 1 to: on"


ODD_USAGE: list[Any] = [
    {"completion_tokens": "9", "prompt_tokens": [1], "total_tokens": {"toLocaleString": 1}},
    {"completion_tokens": 9, "completion_tokens_details": {"accepted_prediction_tokens": 3,
     "acceptance_by_position": "many"}},
    {"completion_tokens": 9, "completion_tokens_details": {"rejected_prediction_tokens": 3,
     "acceptance_by_position": [None, "x", 0.5]}},
    {"prompt_tokens": 4, "prompt_cache_hit_tokens": 2, "prompt_tokens_details": 3},
    {"total_tokens": None}, [], "many",
]  # fmt: skip
ODD_TIMING: list[Any] = [
    {}, {"totalSeconds": "1"}, {"totalSeconds": 1}, {"totalSeconds": None, "firstTokenSeconds": 1},
    {"totalSeconds": 2, "firstTokenSeconds": "<b>", "reasoningSeconds": {}}, [], 7,
]  # fmt: skip


def test_figures_that_are_none_are_not_shown(chat: Chat, tmp_path: Path) -> None:
    tree = {}
    for number, (usage, timing) in enumerate(zip(ODD_USAGE, ODD_TIMING, strict=True)):
        before = f"m{number - 1}" if number else None
        fields = {"role": "assistant", "usage": usage, "timing": timing, "finish": "stop"}
        tree[f"m{number}"] = message(f"m{number}", before, reasoning="r", **fields)
    take(chat, tmp_path, exported(tree, leaf={"value": "m6", "at": 1}))
    assert len(messages(chat)) == len(ODD_USAGE)
    shown = " ".join(chat.texts(".figures"))
    assert "NaN" not in shown
    assert "undefined" not in shown
    assert "100 % of drafts accepted" in shown


def test_a_time_that_cannot_pass_is_passed(chat: Chat, tmp_path: Path) -> None:
    """Else nothing that is changed afterwards would be the later state."""
    never = {"createdAt": 1.7e308, "updatedAt": 1.7e308}
    leaf, title = ({"value": value, "at": 1.7e308} for value in ("a", "old"))
    take(chat, tmp_path, exported({"a": message("a", **never)}, leaf=leaf, title=title))
    chat.menu("old", "rename")
    chat.see(".rename").fill("new")
    chat.page.keyboard.press("Enter")
    chat.ask("on")
    chat.reload()
    chat.see(".message.assistant")
    assert chat.titles() == ["new"]
    assert messages(chat) == ["of a", "on", "Answer 1 to: on"]


def test_what_of_the_apis_messages_is_left_out_is_told(chat: Chat, tmp_path: Path) -> None:
    """Pictures, calls of tools and their results have no place in this page."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    told = take(chat, tmp_path, json.dumps([
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [
            {"type": "text", "text": "What is "}, "this?",
            {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}},
            {"type": "text", "text": {"toString": 1}}, None,
        ]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "42"},
        {"role": "assistant", "reasoning_content": "Hm.", "content": "It is 42."},
        {"role": "user", "content": 7}, {"content": "nobody's"}, None, "x",
    ]))  # fmt: skip
    assert "9 things in it that this page cannot show are left out" in told
    assert messages(chat) == ["What is this?", "", "It is 42."]
    (record,) = stored(chat)
    assert record["system"]["value"] == "Be brief."
    assert [m["reasoning"] for m in record["messages"].values()] == ["", "", "Hm."]


def test_lines_that_are_none_are_counted(chat: Chat, tmp_path: Path) -> None:
    line = json.dumps({"messages": [{"role": "user", "content": "one"}]})
    told = take(chat, tmp_path, f"{line}\n{{broken\n\n{line}\n[]\n", "a.jsonl")
    assert told == "2 chats are imported. 2 things in it that this page cannot show are left out."
    assert len(stored(chat)) == 2
    for content in (
        "",
        "{",
        "no chat at all\n" * 1000,
        "[" * 100_000,
        "\0" * 1000,
        b"\xff\xfe\x00",
    ):
        assert "no chat in this file" in take(chat, tmp_path, content)
    assert len(stored(chat)) == 2


def test_of_a_message_without_end_the_beginning_is_shown(chat: Chat, tmp_path: Path) -> None:
    """A browser needs a minute to lay out 50 MB. What is kept is whole."""
    text = 20_000 * ("word " * 10 + "\n\n")
    tree = {
        "a": message("a", content=text, files=[{"name": "f", "text": text}]),
        "b": message("b", "a", role="assistant", content=text, finish="stop"),
    }
    take(chat, tmp_path, exported(tree, leaf={"value": "b", "at": 1}))
    shown = chat.page.locator(".bubble, .assistant > .markdown, .message-files pre")
    for part in shown.evaluate_all("(nodes) => nodes.map((node) => node.textContent)"):
        assert part.rstrip().endswith("[40,000 more characters are not shown]")
        assert len(part) < 1_000_100
    (record,) = stored(chat)
    assert [len(each["content"]) for each in record["messages"].values()] == [1_040_000] * 2


def test_a_chat_that_another_tab_deletes_does_not_come_back(chat: Chat, other: Chat) -> None:
    """Though this one writes it, and the word of it comes late or never."""
    chat.send(LONG)
    chat.until("() => document.body.innerText.includes('word2')")
    other.until("() => document.querySelectorAll('.chat-name').length === 1")
    other.page.evaluate("() => { BroadcastChannel.prototype.postMessage = () => {}; }")
    other.menu(LONG, "delete")
    assert chat.see("#empty").is_visible()
    assert "deleted in another tab" in chat.see(".toast").inner_text()
    assert chat.titles() == []
    assert stored(chat) == []
    chat.ask("another")
    assert len(stored(chat)) == 1


def test_a_deletion_taken_back_reaches_the_tab_that_wrote(chat: Chat, other: Chat) -> None:
    chat.ask("one")
    other.until("() => document.querySelectorAll('.chat-name').length === 1")
    other.menu("one", "delete")
    chat.until("() => document.querySelectorAll('.chat-name').length === 0")
    other.see(".toast button").click()
    chat.until("() => document.querySelectorAll('.chat-name').length === 1")
    chat.page.locator(".chat-open").click()
    chat.ask("two")
    assert len(stored(chat)[0]["messages"]) == 4


BREACHES = """async (elsewhere) => {
  const told = [];
  document.addEventListener("securitypolicyviolation", (event) =>
    told.push(event.effectiveDirective));
  const script = document.createElement("script");
  script.textContent = "window.isBroken = true";
  document.body.append(script);
  const far = document.createElement("script");
  far.src = elsewhere;
  document.body.append(far);
  document.body.insertAdjacentHTML("beforeend", `<p style="color: red" onclick="1">x</p>
    <img src="${elsewhere}"><iframe src="${elsewhere}"></iframe>
    <object data="${elsewhere}"></object>
    <link rel="stylesheet" href="${elsewhere}"><video src="${elsewhere}"></video>
    <form action="${elsewhere}"><button>x</button></form>`);
  document.querySelector("p[onclick]").click();
  document.querySelector("form[action] button").click();
  const base = document.createElement("base");
  base.href = elsewhere;
  document.head.append(base);
  await fetch(elsewhere).catch(() => {});
  try { new WebSocket(elsewhere.replace("http", "ws")); } catch {}
  try { new Worker("data:text/javascript,1"); } catch {}
  await new Promise((resolve) => setTimeout(() => {  // a debugger may use eval
    try { (0, eval)("window.isBroken = true"); } catch {}
    try { new Function("window.isBroken = true")(); } catch {}
    setTimeout(resolve, 300);
  }));
  return [[...new Set(told)].sort(), Boolean(window.isBroken), document.baseURI];
}"""


def test_the_policy_is_in_force(stage: Stage) -> None:
    """Whatever came past the cleaning of answers."""
    context = stage.chromium.new_context()
    tab = Chat(context.new_page(), stage.stub.url).open()
    told, is_broken, base = tab.page.evaluate(BREACHES, "http://127.0.0.1:9/x")
    context.close()
    assert not is_broken
    assert base == stage.stub.url
    assert set(told) == {
        "script-src-elem", "script-src-attr", "script-src", "style-src-attr", "style-src-elem",
        "img-src", "frame-src", "object-src", "media-src", "form-action", "base-uri", "connect-src",
        "worker-src",
    }  # fmt: skip
