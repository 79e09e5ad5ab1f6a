"""What the chat page keeps in the browser: reloads, several tabs, a full or closed storage, files.

Oracle: what a reader sees after a reload, and the stored entries themselves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stage import PLAYWRIGHT, Chat, Stage, needs_browser

from patience import wait_until

pytest.importorskip("playwright", reason=PLAYWRIGHT)
pytestmark = [needs_browser, pytest.mark.concurrency]

LONG = "go on for ever"
PREFIX = "rorqual.chat.v1."
"""Of what an earlier version kept in localStorage."""
RECORDS = """() => new Promise((resolve) => {
  indexedDB.open("rorqual").onsuccess = ({ target: { result: database } }) => {
    const chats = database.transaction("chats").objectStore("chats");
    chats.getAll().onsuccess = ({ target }) => { database.close(); resolve(target.result); };
  };
})"""
PUT = """(records) => new Promise((resolve) => {
  indexedDB.open("rorqual").onsuccess = ({ target: { result: database } }) => {
    const transaction = database.transaction("chats", "readwrite");
    for (const [id, record] of Object.entries(records))
      transaction.objectStore("chats").put(record, id);
    transaction.oncomplete = () => { database.close(); resolve(); };
  };
})"""


@pytest.fixture
def other(chat: Chat) -> Iterator[Chat]:
    """A second tab of the same browser."""
    tab = Chat(chat.page.context.new_page(), chat.url).open()
    yield tab
    assert tab.problems == []


def messages(chat: Chat) -> list[str]:
    return chat.texts(".bubble, .message.assistant > .markdown")


def stored(chat: Chat) -> list[dict[str, Any]]:
    return list(chat.page.evaluate(RECORDS))


def test_a_reload_keeps_the_chat(chat: Chat) -> None:
    chat.ask("one")
    chat.ask("two")
    shown = messages(chat)
    figures = chat.page.locator(".figures").all_inner_texts()
    address = chat.page.url
    assert "#" in address
    chat.page.reload()
    chat.see(".message")
    assert messages(chat) == shown
    assert chat.page.locator(".figures").all_inner_texts() == figures
    assert chat.page.url == address
    assert chat.titles() == ["one"]


def test_a_reload_in_the_middle_keeps_what_is_written(chat: Chat) -> None:
    chat.send(LONG)
    chat.until("() => document.body.innerText.includes('word6')")
    chat.page.reload()
    chat.see(".message.assistant > .markdown")
    assert "word5" in chat.answer()
    assert chat.see(".note").inner_text().startswith("Unfinished")
    chat.page.locator("[aria-label='Write another answer']").click()
    chat.see("#stop").click()


def test_a_draft_survives_a_reload(chat: Chat) -> None:
    chat.ask("one")
    chat.page.locator("#composer-text").fill("half a thou")
    chat.page.reload()
    chat.see(".message")
    assert chat.page.locator("#composer-text").input_value() == "half a thou"
    chat.page.keyboard.press("Control+k")
    assert chat.page.locator("#composer-text").input_value() == ""


def test_back_and_forth_through_chats(chat: Chat) -> None:
    chat.ask("one")
    chat.page.keyboard.press("Control+k")
    chat.ask("two")
    chat.page.locator(".chat-open", has_text="one").click()
    assert chat.page.locator("#chat-title").inner_text() == "one"
    chat.page.go_back()
    chat.until("() => document.querySelector('#chat-title').innerText === 'two'")
    chat.page.goto(chat.url + "#no-such-chat")
    chat.page.reload()
    assert chat.see("#empty").is_visible()


def test_the_chat_used_last_is_the_first(chat: Chat) -> None:
    for text in ("one", "two", "three"):
        chat.page.keyboard.press("Control+k")
        chat.ask(text)
    assert chat.titles() == ["three", "two", "one"]
    chat.page.locator(".chat-open", has_text="two").click()
    chat.ask("again")
    assert chat.titles() == ["two", "three", "one"]
    chat.reload()
    chat.see(".message")
    assert chat.titles() == ["two", "three", "one"]


def test_rename_delete_and_undo(chat: Chat) -> None:
    chat.ask("one")
    chat.menu("one", "rename")
    box = chat.see(".rename")
    box.fill("The first")
    box.press("Enter")
    assert chat.titles() == ["The first"]
    assert chat.page.locator("#chat-title").inner_text() == "The first"
    chat.menu("The first", "rename")
    box = chat.see(".rename")
    box.fill("no")
    box.press("Escape")
    assert chat.titles() == ["The first"]
    chat.menu("The first", "delete")
    assert chat.titles() == []
    assert stored(chat) == []
    assert chat.page.locator("#empty").is_visible()
    chat.see(".toast button").click()
    assert chat.titles() == ["The first"]
    assert messages(chat) == ["one", "Answer 1 to: one"]
    chat.menu("The first", "delete")
    chat.page.reload()
    chat.see("#empty")
    assert chat.titles() == []


def test_an_answer_being_written_can_be_deleted(chat: Chat) -> None:
    chat.send(LONG)
    chat.until("() => document.body.innerText.includes('word2')")
    chat.menu(LONG, "delete")
    chat.page.wait_for_timeout(300)
    assert stored(chat) == []


def test_export_and_import(chat: Chat, stage: Stage, tmp_path: Path) -> None:
    chat.ask("one")
    chat.ask("two")
    with chat.page.expect_download() as download:
        chat.menu("one", "json")
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    assert file.name == "rorqual-one.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["format"] == "rorqual-chat"
    assert content["messages"] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "Answer 1 to: one"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "Answer 1 to: two"},
    ]
    with stage.chat() as fresh:
        fresh.page.locator("#open-settings").click()
        fresh.page.locator("#import-file").set_input_files(file)
        fresh.until("() => document.querySelectorAll('.message').length === 4")
        assert messages(fresh)[3] == "Answer 1 to: two"
        assert fresh.titles() == ["one"]
        broken = tmp_path / "broken.json"
        for rest in (
            '"conversation": {"version": 1, "id": "../x"}',
            '"chats": 7',
            '"chats": [null, "x"]',
            '"chats": {"conversation": {"messages": {"constructor": {"role": "toString"}}}}',
        ):
            broken.write_text('{"format": "rorqual-chat", ' + rest + "}")
            fresh.page.evaluate("() => { document.querySelector('.toast')?.remove(); }")
            fresh.page.locator("#import-file").set_input_files(broken)
            assert "no chat" in fresh.see(".toast").inner_text()
            assert fresh.titles() == ["one"]


def test_two_tabs_see_each_other(chat: Chat, other: Chat) -> None:
    chat.ask("mine")
    other.ask("yours")
    for tab in (chat, other):
        tab.until("() => document.querySelectorAll('.chat-name').length === 2")
        assert sorted(tab.titles()) == ["mine", "yours"]
    other.menu("mine", "rename")
    other.see(".rename").fill("renamed")
    other.page.keyboard.press("Enter")
    chat.until("() => document.querySelector('#chat-title').innerText === 'renamed'")
    other.menu("renamed", "delete")
    chat.until("() => document.querySelectorAll('.chat-name').length === 1")
    assert chat.see("#empty").is_visible()
    assert "another tab" in chat.see(".toast").inner_text()


def all_written(chat: Chat) -> bool:
    """Six messages are kept, and nothing is being written any more."""
    written = list(stored(chat)[0]["messages"].values())
    is_done = all(m["role"] == "user" or m["finish"] == "stop" for m in written)
    return is_done and len(written) == 6


def test_two_tabs_in_one_chat_lose_nothing(chat: Chat, other: Chat, stage: Stage) -> None:
    """Both write into the same chat at the same time: the tree holds everything afterwards."""
    stage.stub.piece_seconds = 0.1
    chat.ask("root")
    other.page.goto(chat.page.url)
    other.page.reload()
    other.see(".message")
    chat.send("left")
    other.send("right")
    wait_until(lambda: all_written(chat))
    chat.answer()
    other.answer()
    contents = sorted(message["content"] for message in stored(chat)[0]["messages"].values())
    answers = [f"Answer 1 to: {question}" for question in ("left", "right", "root")]
    assert contents == [*answers, "left", "right", "root"]
    # Each tab still shows the answer that it asked for.
    assert "Answer 1 to: left" in messages(chat)
    assert "Answer 1 to: right" in messages(other)


def test_two_tabs_that_write_at_once_lose_nothing(chat: Chat, other: Chat) -> None:
    """A record is read, merged and written in one transaction."""
    chat.ask("one")
    other.page.goto(chat.page.url)
    other.page.reload()
    other.see(".message")
    chat.ask("two")
    other.ask("three")
    contents = {message["content"] for message in stored(chat)[0]["messages"].values()}
    assert {"one", "two", "three"} <= contents


def test_chats_of_an_earlier_version_are_taken_over(chat: Chat) -> None:
    message = {"id": "m", "parent": None, "role": "user", "content": "old", "createdAt": 1}
    entry = {"version": 1, "id": "old", "createdAt": 1, "messages": {"m": message}}
    chat.page.evaluate(
        "([k, v]) => localStorage.setItem(k, v)", [f"{PREFIX}old", json.dumps(entry)]
    )
    chat.page.reload()
    assert chat.see(".chat-name").inner_text() == "old"
    assert [each["id"] for each in stored(chat)] == ["old"]
    chat.until("(key) => !(key in localStorage)", f"{PREFIX}old")


FULL = """() => {
  const keep = IDBObjectStore.prototype.put;
  window.isFull = true;
  IDBObjectStore.prototype.put = function (...given) {
    if (!window.isFull) return keep.apply(this, given);
    const request = keep.apply(this, given);
    Object.defineProperty(this.transaction, "error", {
      value: new DOMException("full", "QuotaExceededError"),
    });
    this.transaction.abort();
    return request;
  };
}"""


def test_a_full_storage_is_told_and_survived(chat: Chat) -> None:
    chat.ask("kept")
    chat.page.evaluate(FULL)
    assert chat.ask("not kept") == "Answer 1 to: not kept"
    assert "storage for this page is full" in chat.see(".notice").inner_text()
    assert chat.ask("goes on") == "Answer 1 to: goes on"
    chat.page.evaluate("() => { window.isFull = false; }")
    chat.ask("room again")
    assert chat.page.locator(".notice").count() == 0
    chat.page.reload()
    chat.see(".message")
    assert len(messages(chat)) == 8


def test_an_old_chat_stays_where_it_is_while_there_is_no_room(chat: Chat) -> None:
    message = {"id": "m", "parent": None, "role": "user", "content": "old", "createdAt": 1}
    entry = {"version": 1, "id": "old", "createdAt": 1, "messages": {"m": message}}
    key, value = f"{PREFIX}old", json.dumps(entry)
    chat.page.evaluate("([k, v]) => localStorage.setItem(k, v)", [key, value])
    chat.page.add_init_script(f"({FULL})()")
    chat.page.reload()
    assert chat.see(".chat-name").inner_text() == "old"
    assert "storage for this page is full" in chat.see(".notice").inner_text()
    assert stored(chat) == []
    assert chat.page.evaluate("(key) => localStorage[key]", key) == value


def test_a_closed_storage_is_told_and_survived(stage: Stage) -> None:
    """A browser that blocks cookies throws on every access."""
    context = stage.chromium.new_context()
    context.add_init_script(
        "for (const name of ['localStorage', 'sessionStorage', 'indexedDB'])"
        " Object.defineProperty(window, name,"
        " { get() { throw new DOMException('denied', 'SecurityError'); } });"
    )
    tab = Chat(context.new_page(), stage.stub.url).open()
    assert tab.ask("hello") == "Answer 1 to: hello"
    assert "does not let this page keep anything" in tab.see(".notice").inner_text()
    tab.page.locator(".notice button").click()
    tab.ask("more")
    assert tab.problems == []
    context.close()
    stage.stub.reset()


def test_strange_entries_are_left_alone(chat: Chat) -> None:
    strange: dict[str, Any] = {
        "a": "{not json",
        "b": {"version": 2, "id": "b", "messages": {}},
        "c": {"version": 1, "id": "c", "messages": {"x": {"id": "x", "role": "tool"}}},
        "d": None,
    }
    chat.page.evaluate(PUT, strange)
    chat.page.evaluate(
        "(key) => { localStorage.setItem('rorqual.settings.v1', '[\"odd\"]');"
        " localStorage.setItem(key, '{'); }",
        f"{PREFIX}e",
    )
    chat.page.reload()
    assert chat.see(".toast").inner_text().startswith("5 stored chats cannot be read")
    chat.ask("hello")
    assert all(record in stored(chat) for record in strange.values())
    assert chat.page.evaluate("(key) => localStorage[key]", f"{PREFIX}e") == "{"


def test_a_circle_in_a_stored_tree_does_no_harm(chat: Chat) -> None:
    message = {"role": "user", "content": "x", "createdAt": 1, "updatedAt": 1}
    entry = {
        "version": 1, "id": "loop", "createdAt": 1, "leaf": {"value": "p", "at": 1},
        "messages": {
            "p": {**message, "id": "p", "parent": "q"},
            "q": {**message, "id": "q", "parent": "p", "role": "assistant"},
        },
    }  # fmt: skip
    chat.page.evaluate(PUT, {"loop": entry})
    chat.page.reload()
    chat.page.locator(".chat-open").click()
    chat.see(".message")
    assert chat.page.locator(".message").count() == 2


MERGE = """async () => {
  const { addMessage, mergeInto, newConversation } = await import("/page/conversation.js");
  const root = newConversation("");
  const question = addMessage(root, "user", null, { content: "q" });
  const copies = [0, 1, 2].map(() => structuredClone(root));
  copies.forEach((copy, index) => {
    addMessage(copy, "assistant", question.id, { content: `a${index}` });
    if (index > 0) { copy.title = { value: `t${index}`, at: 100 + index }; }
  });
  const shapes = [[0, 1, 2], [2, 1, 0], [1, 2, 0, 0, 1]].map((order) => {
    const merged = structuredClone(copies[order[0]]);
    for (const index of order.slice(1)) mergeInto(merged, copies[index]);
    const contents = Object.values(merged.messages).map(({ content }) => content).sort();
    return JSON.stringify([contents, merged.title.value]);
  });
  return shapes;
}"""


def test_merging_has_no_order(chat: Chat) -> None:
    shapes = chat.page.evaluate(MERGE)
    assert [json.loads(shape) for shape in shapes] == [[["a0", "a1", "a2", "q"], "t2"]] * 3


SLOW_STORE = """
const open = IDBFactory.prototype.open;
IDBFactory.prototype.open = function (...given) {
  const request = open.apply(this, given);
  Object.defineProperty(request, "onsuccess", {
    set: (then) => request.addEventListener("success", () => { window.letOpen = then; }),
  });
  return request;
};
"""


def test_a_message_sent_before_the_chats_are_there_waits_for_them(stage: Stage) -> None:
    with stage.chat() as chat:
        chat.page.add_init_script(SLOW_STORE)
        chat.open()
        chat.until("() => window.letOpen !== undefined")
        chat.send("hello")
        chat.page.evaluate("() => window.letOpen()")
        assert chat.page.locator(".message.user").inner_text() == "You\nhello"
        assert chat.answer()
