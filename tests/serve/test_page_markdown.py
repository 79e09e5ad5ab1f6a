"""The page's markdown, run in a real browser.

Oracles: markdown-it-py (an independent CommonMark implementation) where a chat means the same as a
document; stated results where it does not; for streaming, the whole text rendered at once.
"""

from __future__ import annotations

import random
from html.parser import HTMLParser
from typing import Any

import pytest

pytest.importorskip(
    "playwright", reason="the page is tested with playwright: pip install 'rorqual[dev]'"
)
import browser
import page_stub
from markdown_it import MarkdownIt

pytestmark = pytest.mark.skipif(
    browser.find_browser() is None, reason=f"no browser found: {', '.join(browser.NAMES)}"
)

VOID = {"br", "hr", "input"}
RENDER = """async (texts) => {
  const { renderMarkdown } = await import("/page/markdown.js");
  return texts.map((text) => {
    const root = document.createElement("div");
    renderMarkdown(root, text);
    return root.innerHTML;
  });
}"""
STREAM = """async ([text, cuts]) => {
  const { MarkdownView, renderMarkdown } = await import("/page/markdown.js");
  const grown = document.createElement("div");
  const view = new MarkdownView(grown);
  for (const cut of cuts) view.update(text.slice(0, cut));
  const whole = document.createElement("div");
  renderMarkdown(whole, text);
  return [grown.innerHTML, whole.innerHTML, grown.isEqualNode(whole)];
}"""


@pytest.fixture(scope="module")
def page() -> Any:
    stub = page_stub.start()
    with browser.launch() as chromium:
        opened = chromium.new_page()
        opened.goto(stub.url)
        yield opened


class Tree(HTMLParser):
    """HTML as nested lists, without what the two renderers do differently on purpose.

    That is the frame of a code block, the scroll box of a table, headings two levels lower, and
    attributes other than href and start.
    """

    def __init__(self, is_ours: bool) -> None:
        super().__init__()
        self.root: list[Any] = []
        self.stack: list[tuple[str, list[Any]]] = [("", self.root)]
        self.is_ours = is_ours
        self.num_skipped = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.is_ours and tag == "figcaption":
            self.num_skipped += 1
        if self.num_skipped or tag in ("figure", "div"):
            return
        kept = {name: value for name, value in attrs if name in ("href", "start")}
        children: list[Any] = []
        self.stack[-1][1].append([self.name(tag), kept, children])
        if tag not in VOID:
            self.stack.append((tag, children))

    def handle_endtag(self, tag: str) -> None:
        if self.num_skipped:
            self.num_skipped -= tag == "figcaption"
        elif tag not in VOID and tag not in ("figure", "div"):
            assert self.stack.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        is_code = any(tag == "pre" for tag, _ in self.stack)
        if not is_code:
            after_break = bool(self.stack[-1][1]) and self.stack[-1][1][-1][0] == "br"
            data = data.lstrip("\n") if after_break else data
            data = "" if not data.strip("\n ") and "\n" in data else data
        data = data.removesuffix(
            "\n"
        )  # before an inner list, and the last line's end inside <code>
        if data and not self.num_skipped:
            self.stack[-1][1].append(["#text", data])

    def name(self, tag: str) -> str:
        if self.is_ours and tag in ("h3", "h4", "h5"):
            return f"h{int(tag[1]) - 2}"
        return {"s": "del"}.get(tag, tag)


def tree(html: str, is_ours: bool) -> list[Any]:
    parser = Tree(is_ours)
    parser.feed(html)
    parser.close()
    return parser.root


def reference(text: str) -> str:
    options = {"html": False, "breaks": True, "linkify": False}
    oracle = MarkdownIt("commonmark", options).enable(["table", "strikethrough"])
    return str(oracle.render(text))


DOCUMENTS = [
    "plain text\nsecond line",
    "para one\n\npara two",
    "# One\n## Two\n### Three ###\ntext",
    "*em* **strong** ***both*** __strong__ _em_ snake_case_name 2 * 3 * 4",
    "`code` ``a ` b`` ` spaced ` \\* \\` \\[no link\\](x)",
    "a **b *c* d** e *f **g** h*",
    "[link](https://example.org/a_(b)) [t](https://example.org 'title') <https://example.org/x>",
    "[**bold** link](https://example.org) and ~~gone~~",
    "- a\n- b\n- c",
    "* a\n\n* b\n\n* c",
    "1. one\n2. two\n3. three",
    "7. seven\n8. eight",
    "1) one\n2) two",
    "- a\n  - b\n    - c\n- d",
    "1. a\n   - b\n   - c\n2. d",
    "- a\n\n  second paragraph\n- b",
    "- a\nlazy line\n- b",
    "- one\n+ two\n* three",
    "1. code:\n   ```py\n   x = 1\n\n   y = 2\n   ```\n2. more",
    "```python\ndef f():\n    return '<b>'\n```",
    "~~~\ntildes ```\n~~~",
    "````\n```\ninner\n```\n````",
    "```\nnever closed\n*text*",
    "> quote\n> more\n>\n> - list\n> > deeper",
    "a\n\n---\n\nb\n\n***\n\n* * *",
    "| a | b |\n|---|:-:|\n| 1 | **2** |\n| `x` | y \\| z |\n\nafter",
    "a | b\n--|--\n1 | 2",
    "Text before:\n- item\n- item\n\nText after",
    "The year was\n1986. It was fine.",
    "<b>html</b> a < b & c",
    "hard  \nbreak and\\\nanother",
    "#no heading\n#",
    "**not closed\n\n*also not",
    "- [link](https://a.example)\n- **b**: c",
    "",
    "\n\n   \n",
]  # fmt: skip


@pytest.mark.parametrize("text", DOCUMENTS)
def test_a_document_reads_as_commonmark_does(page: Any, text: str) -> None:
    [html] = page.evaluate(RENDER, [text])
    assert tree(html, True) == tree(reference(text), False), html


def test_emphasis_and_code_pair_as_in_commonmark(page: Any) -> None:
    """Two thousand random lines of delimiters, letters and spaces."""
    source = random.Random(3)
    parts = ["*", "**", "***", "_", "__", "`", "a", "b", " ", " ", ".", "~~", "(", "x"]
    texts = [
        "x" + "".join(source.choices(parts, k=source.randint(2, 14))) + "x" for _ in range(2000)
    ]
    texts = [text for text in texts if "~~~" not in text]  # GitHub knows runs of two only
    for text, html in zip(texts, page.evaluate(RENDER, texts), strict=True):
        assert tree(html, True) == tree(reference(text), False), (text, html, reference(text))


CHAT = [
    ("two spaces nest", "1. a\n  - b\n2. c", "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>"),
    ("four spaces are no code", "    text", "<p>text</p>"),
    ("dashes below a line are no heading", "a\n---", "<p>a</p><hr>"),
    ("a tag is text", "<i>a</i>", "<p>&lt;i&gt;a&lt;/i&gt;</p>"),
    ("an entity is text", "&lt;", "<p>&amp;lt;</p>"),
    ("<br> in a cell", "|a|\n|-|\n|b<br>c|", None),
    ("stars beside CJK", "这是**重要。**的", "<p>这是<strong>重要。</strong>的</p>"),
]


@pytest.mark.parametrize(("text", "html"), [case[1:] for case in CHAT], ids=[c[0] for c in CHAT])
def test_a_chat_differs_where_it_should(page: Any, text: str, html: str | None) -> None:
    [found] = page.evaluate(RENDER, [text])
    if html is None:
        assert "b<br>c" in found
    else:
        assert found == html


def test_task_lists_have_boxes(page: Any) -> None:
    [html] = page.evaluate(RENDER, ["- [x] done\n- [ ] open"])
    assert html.count("<input") == 2
    assert html.count("checked") == 1
    assert html.count("disabled") == 2


LINKS = {
    "[a](https://example.org)": "https://example.org",
    "[a](HTTP://example.org)": "HTTP://example.org",
    "![alt](https://example.org/i.png)": "https://example.org/i.png",
    "see https://example.org/a_b?c=d.": "https://example.org/a_b?c=d",
    "(https://example.org/x)": "https://example.org/x",
    "**https://example.org**": "https://example.org",
    "[a](javascript:alert(1))": None,
    "[a](JaVaScRiPt:alert(1))": None,
    "[a](data:text/html,<script>alert(1)</script>)": None,
    "[a](java\tscript:alert(1))": None,
    "[a](vbscript:x) [b](file:///etc/passwd) [c](//example.org) [d](/v1/models)": None,
    "<javascript:alert(1)> <img src=x onerror=alert(1)>": None,
    "![x](javascript:alert(1))": None,
    "[a](https://)": None,
}


@pytest.mark.parametrize("text", LINKS)
def test_only_http_becomes_a_link(page: Any, text: str) -> None:
    found = page.evaluate(
        """async (text) => {
          const { renderMarkdown } = await import("/page/markdown.js");
          const root = document.createElement("div");
          renderMarkdown(root, text);
          const links = [...root.querySelectorAll("a")];
          return { hrefs: links.map((a) => a.getAttribute("href")), rels: links.map((a) => a.rel),
            others: root.querySelectorAll("img, script, iframe, object, form, style, svg").length,
            text: root.textContent };
        }""",
        text,
    )
    assert found["hrefs"] == ([LINKS[text]] if LINKS[text] else [])
    assert all("noopener" in rel for rel in found["rels"])
    assert found["others"] == 0
    if LINKS[text] is None:
        assert found["text"] == text  # nothing is hidden from the reader


HOSTILE = [
    "*" * 20000, "[" * 20000, "[](" * 7000, "a* " * 7000, "*a _b " * 4000, "`a``b```" * 3000,
    "> " * 4000, "- " * 4000 + "x", "*a **b " * 2500 + "c** d* " * 2500, "<" * 20000,
    "|a" * 4000 + "\n" + "|-" * 4000, 'x](https://a "' * 2000, "- a\n" * 5000, "- a\n\n\n" * 2000,
    "1. " * 3000, "\\" * 20000, "https://a.b/((((" * 1500, "```\n" * 5001, "> ```\n" * 2001,
    "_a" * 10000, "![" * 9000 + "](https://x.y)" * 1000,
]  # fmt: skip


def test_a_hostile_text_neither_hangs_nor_overflows(page: Any) -> None:
    limit_seconds = 4.0  # of a processor; about 20 times what the slowest takes
    measure = page.context.new_cdp_session(page)
    measure.send("Performance.enable", {"timeDomain": "threadTicks"})

    def spent() -> float:
        metrics = measure.send("Performance.getMetrics")["metrics"]
        return float(next(one["value"] for one in metrics if one["name"] == "TaskDuration"))

    for text in HOSTILE:
        before = spent()
        page.evaluate(f"async (text) => {{ await ({RENDER})([text]); }}", text)
        assert 0 < spent() - before < limit_seconds, text[:20]


EVERYTHING = "\n\n".join(DOCUMENTS[:22] + DOCUMENTS[23:34]) + "\n\n" + "\n\n".join(LINKS)


def test_a_streamed_text_ends_as_the_whole(page: Any) -> None:
    grown, whole, is_equal = page.evaluate(
        STREAM, [EVERYTHING, list(range(1, len(EVERYTHING) + 1))]
    )
    assert grown == whole
    assert is_equal


@pytest.mark.parametrize("text", [*DOCUMENTS, *LINKS])
def test_each_document_streams_to_the_same(page: Any, text: str) -> None:
    grown, whole, is_equal = page.evaluate(STREAM, [text, list(range(len(text) + 1))])
    assert grown == whole
    assert is_equal


def test_an_edited_text_needs_no_prefix(page: Any) -> None:
    """Texts that do not extend each other (another version of an answer) leave nothing behind."""
    source = random.Random(5)
    steps = """async (texts) => {
      const { MarkdownView, renderMarkdown } = await import("/page/markdown.js");
      const root = document.createElement("div");
      const view = new MarkdownView(root);
      return texts.every((text) => {
        view.update(text);
        const fresh = document.createElement("div");
        renderMarkdown(fresh, text);
        return root.isEqualNode(fresh);
      });
    }"""
    texts = ["\n\n".join(source.sample(DOCUMENTS, 4)) for _ in range(60)]
    assert page.evaluate(steps, texts)


def test_finished_blocks_keep_their_nodes(page: Any) -> None:
    """A selection or a scrolled table above the writing is not disturbed."""
    kept = page.evaluate(
        """async () => {
          const { MarkdownView } = await import("/page/markdown.js");
          const root = document.createElement("div");
          const view = new MarkdownView(root);
          view.update("first\\n\\n```js\\nlet a");
          const [first, code] = root.children;
          view.update("first\\n\\n```js\\nlet a = 1;\\n```\\n\\nlast");
          const isKept = [root.children[0] === first, root.children[1] === code];
          return [...isKept, code.querySelector("code").textContent];
        }"""
    )
    assert kept == [True, True, "let a = 1;"]


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
def test_events_survive_every_cut(page: Any, end: str) -> None:
    """The wire's pieces have no meaning: any cuts give the same events."""
    lines = [
        'data: {"a": 1}',
        "",
        ": keep-alive",
        "",
        "data:two",
        "data: lines",
        "",
        "event: x",
        "id: 3",
        "",
    ]
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
        found = page.evaluate(DECODE, [text + end, cuts])
        assert found == expected
    assert page.evaluate(DECODE, [text + end, list(range(len(text)))]) == expected
