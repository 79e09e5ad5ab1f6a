"""What the chat page lets people do with a chat beyond asking: change, go on, attach, find, carry.

Oracle: what a reader sees, what the server received, and the files themselves.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import page_stub
import pytest
from stage import PLAYWRIGHT, Chat, Stage, needs_browser
from xss_payloads import PAYLOADS

from rorqual.cli.chat_files import read_chat, write_chat

pytest.importorskip("playwright", reason=PLAYWRIGHT)
pytestmark = needs_browser


def texts(chat: Chat) -> list[str]:
    return chat.texts(".bubble, .assistant > .markdown")


def press(chat: Chat, label: str, number: int = -1) -> None:
    buttons = chat.page.locator(f"[aria-label='{label}']")
    button = buttons.nth(number) if number >= 0 else buttons.last
    button.hover()
    button.click()


@pytest.fixture
def two(chat: Chat) -> Chat:
    """A chat of two turns."""
    chat.ask("one")
    chat.ask("two")
    return chat


def test_an_answer_and_a_question_are_changed_in_place(two: Chat, stage: Stage) -> None:
    press(two, "Edit answer", 0)
    area = two.see(".assistant textarea")
    assert area.input_value() == "Answer 1 to: one"
    area.fill("Better **answer**")
    two.page.locator(".assistant .primary").click()
    two.see(".assistant strong")
    first = two.page.locator(".assistant").first
    assert "Edited by you." in first.inner_text()
    assert first.locator(".figures").count() == 0, "the model's figures are not the user's"
    press(two, "Edit message", 0)
    two.see(".user textarea").fill("won")
    two.page.locator(".edit-actions .button", has_text="Save").click()
    assert texts(two) == ["won", "Better answer", "two", "Answer 1 to: two"]
    two.reload()
    two.see(".assistant strong")
    assert texts(two)[:2] == ["won", "Better answer"]
    two.ask("three")
    sent = [message["content"] for message in stage.stub.requests[-1]["messages"]]
    assert sent == ["won", "Better **answer**", "two", "Answer 1 to: two", "three"]


def test_a_message_is_deleted_with_what_follows_and_comes_back(two: Chat, stage: Stage) -> None:
    press(two, "Delete from here", 1)  # the first answer
    assert texts(two) == ["one"]
    two.see(".toast button").click()
    assert texts(two) == ["one", "Answer 1 to: one", "two", "Answer 1 to: two"]
    press(two, "Delete from here", 2)
    two.reload()
    two.see(".message.assistant")
    assert texts(two) == ["one", "Answer 1 to: one"]
    two.ask("three")
    assert len(stage.stub.requests[-1]["messages"]) == 3


def test_a_deleted_branch_gives_way_to_another(chat: Chat) -> None:
    chat.ask("one")
    press(chat, "Write another answer")
    chat.see(".branches")
    chat.answer()
    press(chat, "Delete from here")
    assert texts(chat) == ["one", "Answer 1 to: one"]
    assert chat.page.locator(".branches").count() == 0


def test_a_cut_answer_goes_on(chat: Chat, stage: Stage) -> None:
    chat.ask("be cut")
    assert chat.see(".note").inner_text().startswith("Cut off")
    press(chat, "Continue the answer")
    chat.until("() => document.body.innerText.includes('be cut, and on')")
    assert texts(chat) == ["be cut", "Answer 1 to: be cut, and on"]
    sent = {"role": "assistant", "content": "Answer 1 to: be cut", "prefix": True}
    assert stage.stub.requests[-1]["messages"][-1] == sent
    assert not chat.page.locator(".note").is_visible()
    assert chat.page.locator("[aria-label='Continue the answer']").count() == 0


def test_an_edited_answer_goes_on_from_its_new_end(two: Chat, stage: Stage) -> None:
    press(two, "Edit answer")
    two.see(".assistant textarea").fill("A beginning")
    two.page.locator(".assistant .primary").click()
    press(two, "Continue the answer")
    two.until("() => document.body.innerText.includes('A beginning, and on')")
    sent = {"role": "assistant", "content": "A beginning", "prefix": True}
    assert stage.stub.requests[-1]["messages"][-1] == sent


def test_what_no_longer_fits_is_left_out_and_said(two: Chat, stage: Stage) -> None:
    stage.stub.skipped = 2
    two.ask("three")
    sent = [message["content"] for message in stage.stub.requests[-1]["messages"]]
    assert sent == ["two", "Answer 1 to: two", "three"]
    said = two.see(".skipped").inner_text()
    assert said.startswith("The 2 oldest messages were left out")
    stage.stub.skipped = 4
    two.ask("four")
    said = two.page.locator(".skipped:visible").all_inner_texts()
    assert len(said) == 1  # not with each answer again
    assert said[0].startswith("The 4 oldest")
    assert "of 1,000 tokens" in two.see("#gauge").inner_text()
    assert 0 < float(two.page.locator("#gauge-meter").get_attribute("value") or 0) < 1000


def test_the_system_text_is_never_left_out(chat: Chat, stage: Stage) -> None:
    chat.page.locator("#open-settings").click()
    chat.page.locator("#system-prompt").fill("Be brief.")
    chat.page.locator("#close-settings").click()
    chat.ask("one")
    stage.stub.skipped = 2
    chat.ask("two")
    sent = [message["content"] for message in stage.stub.requests[-1]["messages"]]
    assert sent == ["Be brief.", "two"]


def test_the_gauge_and_the_speed_move_while_it_writes(chat: Chat) -> None:
    chat.send("go on for ever")
    chat.until("() => / \\d+ tokens\\/s/.test(document.querySelector('#gauge').innerText)")
    chat.page.keyboard.press("Escape")
    chat.answer()
    shown = chat.page.locator("#gauge-text").inner_text()
    assert re.fullmatch(r"\d+ of 1,000 tokens", shown)


def test_what_cannot_be_tried_again_offers_another_way(chat: Chat) -> None:
    chat.send("refuse 422")
    assert chat.see(".notice-actions").inner_text() == "Dismiss"
    chat.page.locator(".notice button").click()
    assert chat.see(".unanswered button").is_visible()
    chat.send("refuse long")
    assert chat.see(".notice strong").inner_text() == "This is too long for the model"
    chat.page.locator(".notice button", has_text="Edit the message").click()
    assert chat.see(".user textarea").input_value() == "refuse long"


def test_files_go_with_a_message(chat: Chat, stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("print(1)  # ```` \n", encoding="utf-8")
    (tmp_path / "b.bin").write_bytes(b"\x00\xff\x01")
    (tmp_path / "big.txt").write_text("x" * 200_001, encoding="utf-8")
    box = chat.page.locator("#attach-file")
    for name, reason in (("b.bin", "no text file"), ("big.txt", "larger than 200 kB")):
        box.set_input_files(tmp_path / name)
        assert reason in chat.see(".toast").inner_text()
    box.set_input_files(tmp_path / "a.py")
    assert chat.see("#attached li").inner_text() == "a.py"
    # Also pasted and dropped, and taken away again.
    for event, holder in (("paste", "clipboardData"), ("drop", "dataTransfer")):
        chat.page.evaluate(
            """([event, holder]) => {
              const data = new DataTransfer();
              data.items.add(new File(["by " + event], event + ".txt"));
              const made = new Event(event, { bubbles: true, cancelable: true });
              Object.defineProperty(made, holder, { value: data });
              document.querySelector("#composer-text").dispatchEvent(made);
            }""",
            [event, holder],
        )
        chat.see(f"#attached li:has-text('{event}.txt')")
    chat.page.locator("[aria-label='Remove paste.txt']").click()
    chat.ask("What is this?")
    assert chat.page.locator("#attached li").count() == 0
    assert stage.stub.requests[-1]["messages"][0]["content"] == (
        "a.py:\n`````\nprint(1)  # ```` \n\n`````\n\ndrop.txt:\n```\nby drop\n```\n\nWhat is this?"
    )
    assert chat.page.locator(".message-files summary").all_inner_texts() == [
        "a.py · 18 characters",
        "drop.txt · 7 characters",
    ]
    chat.reload()
    chat.page.locator(".message-files summary").first.click()
    assert "print(1)" in chat.page.locator(".message-files pre").first.inner_text()


def test_all_chats_are_searched(chat: Chat, stage: Stage) -> None:
    stage.stub.answers["animals"] = ("", "Whales, rorquals and krill.")
    chat.ask("animals")
    chat.page.keyboard.press("Control+k")
    chat.ask("numbers")
    chat.page.locator("#chat-title").click()
    chat.page.evaluate("() => document.activeElement.blur()")
    chat.page.keyboard.press("/")
    chat.page.keyboard.type("RORQUALS")
    chat.until("() => document.querySelectorAll('.chat-name').length === 1")
    assert chat.titles() == ["animals"]
    assert "rorquals and" in chat.see(".snippet").inner_text()
    chat.page.locator("#search").fill("numb")
    assert chat.titles() == ["numbers"]
    chat.page.locator("#search").fill("nowhere")
    assert chat.see(".chat-none").inner_text() == "No chat has this text."
    chat.page.locator("#search").fill("")
    assert sorted(chat.titles()) == ["animals", "numbers"]


@pytest.mark.parametrize("form", ["json", "markdown", "messages"])
def test_all_chats_go_out_and_come_in_again(
    chat: Chat, stage: Stage, tmp_path: Path, form: str
) -> None:
    hard = "## You <!-- rorqual user -->\n\n<!-- \\rorqual x -->\n```\nx\n```"
    stage.stub.answers["hard"] = ("", hard)
    chat.page.locator("#open-settings").click()
    chat.page.locator("#system-prompt").fill("Be brief.")
    chat.page.locator("#close-settings").click()
    chat.ask("hard")
    chat.page.keyboard.press("Control+k")
    chat.ask("second")
    chat.page.locator("#open-settings").click()
    with chat.page.expect_download() as download:
        chat.page.locator(f"#export-{form}").click()
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    ending = {"json": "json", "markdown": "md", "messages": "jsonl"}[form]
    assert file.name == f"rorqual-chats.{ending}"
    if form == "messages":  # as `rorqual train` and OpenAI take them
        first = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
        assert first == {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "hard"},
                {"role": "assistant", "content": hard},
            ]
        }
    with stage.chat() as fresh:
        fresh.page.locator("#open-settings").click()
        fresh.page.locator("#import-file").set_input_files(file)
        fresh.until("() => document.querySelectorAll('.chat-name').length === 2")
        assert sorted(fresh.titles()) == ["hard", "second"]
        fresh.page.locator(".chat-open", has_text="hard").click()
        fresh.ask("more")
        sent = [message["content"] for message in stage.stub.requests[-1]["messages"]]
        assert sent == ["Be brief.", "hard", hard, "more"]


@pytest.mark.parametrize(("form", "ending"), [("json", "json"), ("markdown", "md")])
def test_a_chat_goes_to_the_terminal_and_back(
    chat: Chat, stage: Stage, tmp_path: Path, form: str, ending: str
) -> None:
    hard = "## You <!-- rorqual user -->\n\n<!-- \\rorqual x -->"
    stage.stub.answers["hard"] = ("", hard)
    chat.ask("hard")
    with chat.page.expect_download() as download:
        chat.menu("hard", form)
    download.value.save_as(tmp_path / f"page.{ending}")
    assert read_chat(tmp_path / f"page.{ending}") == (None, [("hard", hard)])
    own = tmp_path / f"terminal.{ending}"
    system = {"role": "system", "content": "Be brief."}
    turn = [{"role": "user", "content": "easy"}, {"role": "assistant", "content": hard}]
    write_chat(own, [system, *turn])
    chat.page.locator("#open-settings").click()
    chat.page.locator("#import-file").set_input_files(own)
    chat.until("() => document.querySelectorAll('.chat-name').length === 2")
    chat.page.locator(".chat-open", has_text="easy").click()
    chat.ask("more")
    sent = [message["content"] for message in stage.stub.requests[-1]["messages"]]
    assert sent == ["Be brief.", "easy", hard, "more"]


def test_messages_of_others_are_taken(chat: Chat, tmp_path: Path) -> None:
    file = tmp_path / "one.json"
    parts = [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "yes"}]
    file.write_text(json.dumps(messages), encoding="utf-8")
    chat.page.locator("#import-file").set_input_files(file)
    chat.see(".message.assistant")
    assert texts(chat) == ["in parts", "yes"]
    file.write_text('{"a": 1}', encoding="utf-8")
    chat.page.locator("#import-file").set_input_files(file)
    assert "no chat" in chat.see(".toast").inner_text()


def test_the_switches_are_sent(chat: Chat, stage: Stage) -> None:
    assert not chat.page.locator("#think").is_visible()
    stage.stub.has_thinking_switch = True
    chat.open()
    chat.see("#think").click()
    chat.page.locator("#json-mode").click()
    chat.ask("hello")
    sent = stage.stub.requests[-1]
    assert sent["thinking"] == {"type": "enabled"}
    assert sent["response_format"] == {"type": "json_object"}
    chat.reload()
    assert chat.see("#json-mode").get_attribute("aria-pressed") == "true"
    chat.see("#think").click()
    chat.page.locator("#json-mode").click()
    chat.ask("again")
    assert stage.stub.requests[-1]["thinking"] == {"type": "disabled"}
    assert "response_format" not in stage.stub.requests[-1]


def test_the_model_and_the_keys_are_told(chat: Chat) -> None:
    chat.see(".suggestion")
    assert chat.page.locator("#opening").inner_text() == "I am a stub."
    assert chat.page.locator("#limits").inner_text() == "It plays from a script."
    chat.page.locator("#open-model").click()
    assert "Parameters" in chat.see("#model-facts").inner_text()
    chat.page.locator("#model-dialog .close-dialog").click()
    chat.page.evaluate("() => document.activeElement.blur()")
    chat.page.keyboard.press("?")
    assert "searches all chats" in chat.see("#keys").inner_text()
    chat.page.keyboard.press("Escape")
    assert not chat.page.locator("#keys").is_visible()
    chat.page.locator("#composer-text").press("?")
    assert not chat.page.locator("#keys").is_visible()
    chat.page.locator("#open-settings").click()
    shown = chat.page.locator("#sampling-temperature")
    assert shown.get_attribute("placeholder") == "0.3"
    assert "Default: 0.3." in chat.page.locator("#sampling-temperature-hint").inner_text()
    chat.page.locator("#sampling-stop").fill("END")
    chat.page.locator("#close-settings").click()
    chat.page.locator(".suggestion").first.click()
    assert chat.answer() == "Answer 1 to: hello"


def test_a_killed_server_is_told_and_the_answer_goes_on_when_it_is_back(stage: Stage) -> None:
    stub = page_stub.start()
    context = stage.chromium.new_context()
    chat = Chat(context.new_page(), stub.url).open()
    chat.send("go on for ever")
    chat.until("() => document.body.innerText.includes('word5')")
    port = stub.kill()
    assert chat.see(".notice strong").inner_text() == "No connection"
    assert chat.page.locator(".notice button").inner_text() == "Go on"
    assert "word5" in chat.answer()
    assert chat.see(".note").inner_text() == "Broken off before its end."
    again = page_stub.start(port)
    chat.until("() => document.body.innerText.includes(', and on')")
    written = chat.answer()
    assert "word5" in written
    assert written.endswith(", and on")
    assert chat.page.locator(".notice").count() == 0
    assert again.requests[0]["messages"][-1]["prefix"] is True
    assert chat.problems == []
    context.close()
    again.kill()


HARM = """() => ({ harmed: window.harmed, strange: [...document.querySelectorAll(
  "main img, script:not([src]), iframe, object, embed, form form, style, base, meta[http-equiv]," +
  "[onload], [onerror], [onfocus], [ontoggle], [style*=expression], svg svg, svg script," +
  "a:not([href^='http'])")].map((node) => node.outerHTML.slice(0, 90)) })"""


def test_no_payload_acts_anywhere(chat: Chat, stage: Stage, tmp_path: Path) -> None:
    """In answers, reasoning, questions, names of files and chats, and in every file to import."""
    assert len(PAYLOADS) >= 40
    answer = "\n\n".join([*PAYLOADS, *(f"```{p}\n{p}\n```" for p in PAYLOADS)])
    answer += "".join(f"\n\n\\({payload}\\) and | {payload} |\n" for payload in PAYLOADS)
    stage.stub.answers["attack"] = (answer, answer)
    stage.stub.piece_characters, stage.stub.piece_seconds = 4000, 0.0
    stage.stub.models = [PAYLOADS[0], PAYLOADS[2]]
    chat.open()
    chat.ask("attack")
    chat.page.locator(".reasoning summary").click()
    for name in (PAYLOADS[2], PAYLOADS[5]):
        chat.page.evaluate(
            """(name) => {
              const data = new DataTransfer();
              data.items.add(new File([name], name));
              const made = new Event("drop", { bubbles: true, cancelable: true });
              Object.defineProperty(made, "dataTransfer", { value: data });
              document.dispatchEvent(made);
            }""",
            name,
        )
    chat.until("() => document.querySelectorAll('#attached li').length === 2")
    chat.ask("\n".join(PAYLOADS))
    chat.page.locator(".message-files summary").first.click()
    record: dict[str, Any] = {"version": 1, "id": "x", "messages": {}}
    record["title"] = {"value": PAYLOADS[2]}
    chats = [[{"role": role, "content": p} for role in ("user", "assistant")] for p in PAYLOADS]
    files = {
        "a.jsonl": "\n".join(map(json.dumps, chats)),
        "b.md": "".join(
            f"# {p} <!-- rorqual chat -->\n\n## You <!-- rorqual user -->\n\n{p}\n"
            for p in PAYLOADS
        ),
        "c.json": json.dumps({"format": "rorqual-chat", "conversation": record}),
        "d.json": json.dumps(
            {"format": "rorqual-chat", "conversation": {**record, "id": PAYLOADS[0]}}
        ),
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        chat.page.locator("#import-file").set_input_files(tmp_path / name)
        chat.page.wait_for_timeout(150)
    chat.page.locator("#search").fill("script")
    chat.see(".snippet, .chat-name")
    chat.page.wait_for_timeout(400)
    assert chat.page.evaluate(HARM) == {"harmed": None, "strange": []}
    chat.page.locator("#search").fill("")
    chat.page.locator(".chat-open", has_text="attack").first.click()
    chat.see(".message.assistant")
    chat.page.wait_for_timeout(400)
    assert chat.page.evaluate(HARM) == {"harmed": None, "strange": []}
