"""Answers as they are written: where a text is cut, what the server is asked, what keeps its place.

Oracle: the whole text made of markdown at once (`page_markdown.page_html`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from stage import PLAYWRIGHT, Chat, Stage, needs_browser

from rorqual.serve.page_markdown import page_html

pytest.importorskip("playwright", reason=PLAYWRIGHT)
pytestmark = needs_browser

CUT = """async (texts) => {
  const { MarkdownView } = await import("/page/markdown.js");
  return texts.map((text) => {
    const view = new MarkdownView(document.createElement("div"), { html: () => undefined });
    for (const end of [1, 7, text.length >> 1]) view.update(text.slice(0, end), false);
    view.update(text, true);
    return view.starts;
  });
}"""
PARTS = [
    "one line", "two\nlines", "# head\ntext", "- a\n- b", "1. a\n\n2. b\n\n   more\n\n3. c",
    "> quote\n> on", "```py\nx = 1\n\ny = 2\n```", "~~~\n```\n\n# no\n~~~",
    "````\n```\n\n```\n````", "|a|\n|-|\n|b|", "---", "- a\n\n  ```\n  x\n\n  y\n  ```\n- b",
    "$$\nx\n\n+ y\n$$", "\\[\n\\begin{split}a\\\\b\\end{split}\n\\]", "`` ` `` and **b**",
    "text\n- list", "    code\n\n    on", "\\[ x \\] in a line", "1) x\n2) y", "* a\n  * b",
]  # fmt: skip


def test_cut_texts_read_as_whole_ones(chat: Chat) -> None:
    source = random.Random(4)
    texts = [*PARTS, "\n\n".join(PARTS), "\n\n\nlate"]
    texts += ["\n\n".join(source.choices(PARTS, k=5)) for _ in range(150)]
    for text, starts in zip(texts, chat.page.evaluate(CUT, texts), strict=True):
        ends = [*starts[1:], len(text)]
        blocks = [text[start:end] for start, end in zip(starts, ends, strict=True)]
        assert "".join(blocks) == text[starts[0] :]
        assert "".join(map(page_html, blocks)) == page_html(text), text
    assert len(chat.page.evaluate(CUT, ["\n\n".join(["a", "b", "c"])])[0]) == 3


def html_of(chat: Chat) -> str:
    return str(chat.page.evaluate(
        """() => [...document.querySelectorAll(".assistant > .markdown .rich")].map((node) => {
          const copy = node.cloneNode(true);
          for (const button of copy.querySelectorAll("button")) button.remove();
          return copy.innerHTML;
        }).join("")"""
    ))  # fmt: skip


RICH = "() => [...document.querySelectorAll('.message.assistant > .markdown .plain')]" \
       ".every((node) => !node.textContent)"  # fmt: skip


def test_an_answer_ends_as_the_whole(chat: Chat, stage: Stage) -> None:
    text = (
        "\n\n".join(PARTS) + "\n\nand a [link][1] with a note[^1]\n\n[1]: https://e.org\n[^1]: it"
    )
    stage.stub.answers["all"] = ("", text)
    chat.ask("all")
    chat.until(RICH)
    chat.until("() => document.querySelector('.footnotes')")
    fresh = chat.page.evaluate(
        "(html) => new DOMParser().parseFromString(html, 'text/html').body.innerHTML",
        page_html(text),
    )
    assert html_of(chat) == fresh
    chat.page.reload()
    chat.until("() => document.querySelector('.footnotes')")
    assert html_of(chat) == fresh


def test_blocks_are_asked_for_in_order_and_in_batches(chat: Chat, stage: Stage) -> None:
    stage.stub.answers["many"] = ("", "\n\n".join(f"block *{n}*" for n in range(120)))
    stage.stub.piece_characters = 40
    chat.ask("many")
    chat.until(RICH)
    asked = [text for texts in stage.stub.rendered for text in texts]
    assert asked == [f"block *{n}*" for n in range(120)]
    assert len(stage.stub.rendered) < 60


def test_what_is_finished_keeps_its_nodes(chat: Chat, stage: Stage) -> None:
    stage.stub.answers["keep"] = ("why", "first *block*\n\n" + "then more\n\n" * 3 + "rest " * 30)
    stage.stub.piece_seconds = 0.02
    chat.send("keep")
    chat.until("() => document.querySelector('.message.assistant > .markdown em')")
    chat.page.evaluate("() => { window.first = document.querySelector('.markdown em'); }")
    chat.answer()
    chat.until(RICH)
    assert chat.page.evaluate("() => document.contains(window.first)")


def test_a_list_that_grows_keeps_its_items(chat: Chat) -> None:
    kept = chat.page.evaluate(
        """async () => {
          const { MarkdownView } = await import("/page/markdown.js");
          const texts = new Map([["- a\\n\\n- b", "<ul>\\n<li>a</li>\\n<li>b</li>\\n</ul>"],
            ["- a", "<ul>\\n<li>a</li>\\n</ul>"], ["c", "<p>c</p>"]]);
          const view = new MarkdownView(document.createElement("div"),
            { html: (text) => texts.get(text) });
          view.update("- a\\n\\n", false);
          const first = view.root.querySelector("li");
          view.update("- a\\n\\n- b\\n\\nc", true);
          const items = [...view.root.querySelectorAll("li")];
          return [items[0] === first, items.length, view.root.textContent.replace(/\\n/g, "")];
        }"""
    )
    assert kept == [True, 2, "abc"]


def test_without_the_server_the_text_is_there_and_gets_its_look_later(
    chat: Chat, stage: Stage
) -> None:
    stage.stub.can_render = False
    stage.stub.answers["plain"] = ("", "**bold**\n\n- one\n- two\n\n\\(x\\)")
    assert chat.ask("plain") == "**bold**\n\n- one\n- two\n\\(x\\)"
    assert chat.page.locator(".rich > *").count() == 0
    stage.stub.can_render = True
    chat.page.reload()
    assert chat.see(".markdown strong").inner_text() == "bold"
    assert chat.page.locator(".markdown math").count() == 1


PARAGRAPH = (
    "Number NN is **a paragraph** with `code`, a [link](https://e.org) and \\(x^{NN}\\), as is. "
    * 5
)
MANY_BLOCKS = "\n\n".join(
    [
        PARAGRAPH,
        "- one\n- two",
        "```python\ndef f(x):\n    return x + NN\n```",
        "|a|b|\n|-|-|\n|NN|2|",
    ]
)
MAX_TASK_MILLISECONDS = 200
LONG_TEXTS = {
    "blocks": MANY_BLOCKS + "\n\n",
    "one list": "- " + PARAGRAPH + "\n\n",
    "one tight list": "- " + PARAGRAPH + "\n",
    "one line": "many words ",
    "one code": "    x = f(x)  # NN\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LONG_TEXTS)
def test_a_hundred_thousand_characters_never_hold_the_page(stage: Stage, kind: str) -> None:
    """No task of the page's thread takes 200 ms, of its own processor time: others take theirs."""
    unit = LONG_TEXTS[kind]
    text = "".join(unit.replace("NN", str(n)) for n in range(100_000 // len(unit) + 1))
    text = ("```py\n" if kind == "one code" else "") + text[:100_000]
    with stage.chat() as chat:
        stage.stub.answers["long"] = ("", text)
        stage.stub.piece_characters, stage.stub.piece_seconds = 100, 0.002
        with longest_task(stage, chat) as written:
            chat.ask("long")
            chat.until(RICH)
        with longest_task(stage, chat) as read:
            chat.page.reload()
            chat.see(".message.assistant")
            chat.until(RICH)
        print(kind, written, read)
        assert 0 < written[0] < MAX_TASK_MILLISECONDS
        assert 0 < read[0] < MAX_TASK_MILLISECONDS


@contextmanager
def longest_task(stage: Stage, chat: Chat) -> Iterator[list[float]]:
    """Of the page's thread, in milliseconds of a processor: what the list holds afterwards."""
    found: list[float] = []
    stage.chromium.start_tracing(page=chat.page, categories=["toplevel", "__metadata"])
    yield found
    events = json.loads(stage.chromium.stop_tracing())["traceEvents"]
    pages = {
        (event["pid"], event["tid"])
        for event in events
        if event["name"] == "thread_name" and event["args"].get("name") == "CrRendererMain"
    }
    tasks = [
        event.get("tdur", 0) / 1000
        for event in events
        if "RunTask" in event["name"] and (event["pid"], event["tid"]) in pages
    ]
    found.append(max(tasks))


READ = """async (text) => {
  const { readEvents } = await import("/page/stream.js");
  const body = new ReadableStream({
    start(controller) {
      for (const byte of new TextEncoder().encode(text)) controller.enqueue(Uint8Array.of(byte));
      controller.close();
    },
  });
  const events = [];
  for await (const event of readEvents(body)) events.push(event);
  return events;
}"""


def test_a_letter_survives_cuts_between_its_bytes(chat: Chat) -> None:
    """Two, three and four bytes in UTF-8, which come one at a time."""
    assert chat.page.evaluate(READ, "data: \u00f1\n\n: \u9be8\n\ndata: \U0001f40b\n\n") == [
        {"data": "\u00f1"},
        {"comment": "\u9be8"},
        {"data": "\U0001f40b"},
    ]


DECODE = """async ([text, cuts]) => {
  const { EventDecoder } = await import("/page/stream.js");
  const decoder = new EventDecoder();
  const events = [];
  let at = 0;
  for (const cut of [...cuts, text.length]) {
    events.push(...decoder.push(text.slice(at, cut)));
    at = cut;
  }
  return events;
}"""


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_events_survive_every_cut(chat: Chat, end: str) -> None:
    """The wire's pieces have no meaning: any cuts give the same events."""
    lines = [
        'data: {"a": 1}', "", ": keep-alive", "", "data:two", "data: lines", "",
        "event: x", "id: 3", "",
    ]  # fmt: skip
    text = end.join([*lines, "data: [DONE]", "", ""])
    expected = [
        {"data": '{"a": 1}'},
        {"comment": "keep-alive"},
        {"data": "two\nlines"},
        {"data": "[DONE]"},
    ]
    source = random.Random(1)
    for _ in range(30):
        cuts = sorted(source.choices(range(len(text)), k=source.randint(0, 12)))
        assert chat.page.evaluate(DECODE, [text + end, cuts]) == expected
    assert chat.page.evaluate(DECODE, [text + end, list(range(len(text)))]) == expected
