"""Markdown of answers as HTML: GitHub's dialect, TeX, links, and what must never act.

Oracles: the results that CommonMark's and GFM's specifications state for these examples; MathML
written by hand; for harmless, Python's own HTML parser.
"""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser
from typing import Any

import pytest
import web
from live import Live
from xss_payloads import PAYLOADS

from rorqual.serve.page_api import MAX_CHARS, MAX_TEXTS, rendered
from rorqual.serve.page_markdown import page_html

LINK = 'target="_blank" rel="noopener noreferrer nofollow"'


def link(address: str, text: str = "") -> str:
    return f'<a href="{address}" title="{address}" {LINK}>{text or address}</a>'


STATED = {
    "plain\nsecond": "<p>plain<br>second</p>",
    "a\n\nb": "<p>a</p><p>b</p>",
    "# One #\n### Three": '<h3 data-level="1">One</h3><h5 data-level="3">Three</h5>',
    "*em* **strong** ***both*** snake_case_name 2 * 3": (
        "<p><em>em</em> <strong>strong</strong> <em><strong>both</strong></em> snake_case_name "
        "2 * 3</p>"
    ),
    "`` a ` b `` \\* \\[no link\\](x)": "<p><code>a ` b</code> * [no link](x)</p>",
    "- a\n- b": "<ul><li>a</li><li>b</li></ul>",
    "7. seven\n8. eight": '<ol start="7"><li>seven</li><li>eight</li></ol>',
    "- a\n\n  second\n- b": "<ul><li><p>a</p><p>second</p></li><li><p>b</p></li></ul>",
    "> quote\n> - list": "<blockquote><p>quote</p><ul><li>list</li></ul></blockquote>",
    "a\n\n---\n\nb": "<p>a</p><hr><p>b</p>",
    "hard\\\nbreak": "<p>hard<br>break</p>",
    "~~gone~~ and ~one~": "<p><s>gone</s> and <s>one</s></p>",
    "| a | b |\n|---|:-:|\n| 1 | y \\| z |": (
        '<div class="table" tabindex="0" role="group" aria-label="Table"><table><thead><tr>'
        '<th scope="col">a</th><th data-align="center" scope="col">b</th></tr></thead><tbody><tr>'
        '<td>1</td><td data-align="center">y | z</td></tr></tbody></table></div>'
    ),
    "- [x] done\n- [ ] open": (
        '<ul><li class="task"><input type="checkbox" disabled="" checked="" aria-label="Done">done'
        '</li><li class="task"><input type="checkbox" disabled="" aria-label="Not done">open</li>'
        "</ul>"
    ),
    "text[^1]\n\n[^1]: foot": (
        '<p>text<sup>[1]</sup></p><section class="footnotes"><ol><li><p>foot</p></li></ol>'
        "</section>"
    ),
    "> [!NOTE]\n> x": (
        '<div class="markdown-alert markdown-alert-note"><p class="markdown-alert-title">Note</p>'
        "<p>x</p></div>"
    ),
    "```\n*a* <b>\n```": (
        '<figure class="code"><figcaption><span>text</span></figcaption><pre tabindex="0" '
        'aria-label="Code"><code>*a* &lt;b&gt;</code></pre></figure>'
    ),
    "```py\nreturn 1\n```": (
        '<figure class="code"><figcaption><span>py</span></figcaption><pre tabindex="0" '
        'aria-label="Code, py"><code><span class="k">return</span> '
        '<span class="mi">1</span></code></pre></figure>'
    ),
    # Where a chat differs from a document.
    "<i>a</i> &lt;": "<p>&lt;i&gt;a&lt;/i&gt; &lt;</p>",
    "a<br>b<BR/>c": "<p>a<br>b<br>c</p>",
    "这是**重要。**的": "<p>这是<strong>重要。</strong>的</p>",
    # Links
    "[a](https://example.org/x_(y))": f"<p>{link('https://example.org/x_(y)', 'a')}</p>",
    "see https://example.org/a_b?c=d.": f"<p>see {link('https://example.org/a_b?c=d')}.</p>",
    "**https://example.org**": f"<p><strong>{link('https://example.org')}</strong></p>",
    "![alt](https://example.org/i.png)": (
        f'<p><a href="https://example.org/i.png" {LINK}>alt</a></p>'
    ),
    "me@example.org": "<p>me@example.org</p>",
}  # fmt: skip


def tight(html: str) -> str:
    """Without line ends, which mean nothing outside of code, and with tight lists as stated."""
    html = re.sub(r'<p class="tight">(.*?)</p>', r"\1", html)
    return re.sub(r"\n", "", html).replace('disabled="" type', "type")


@pytest.mark.parametrize("text", STATED)
def test_markdown_reads_as_stated(text: str) -> None:
    html = tight(page_html(text))
    if "checkbox" in html:  # attributes have no order
        html, stated = (
            re.sub(r' (disabled|checked)=""| type="checkbox"| aria-label="[^"]*"', "", each)
            for each in (html, STATED[text])
        )
        assert html == stated
        assert page_html(text).count("checked") == text.count("[x]")
    else:
        assert html == STATED[text]


@pytest.mark.parametrize(
    "address",
    [
        "javascript:alert(1)", "JaVaScRiPt:alert(1)", "data:text/html,x", "vbscript:x", "file:///etc",
        "//example.org", "/v1/models", "#x", "https://", "java\tscript:alert(1)", "mailto:a@b.c",
    ],
)  # fmt: skip
def test_only_http_becomes_a_link(address: str) -> None:
    """Nothing is hidden from the reader either: the source stays."""
    for text in (f"[a]({address})", f"![a]({address})"):
        html = page_html(text)
        assert "<a" not in html
        assert html.replace("\n", "") == f"<p>{text}</p>".replace("\n", "")


MATHS = {
    r"\(E = mc^2\)": "<mi>E</mi><mo>=</mo><mi>m</mi><msup><mi>c</mi><mn>2</mn></msup>",
    r"\[\frac{a}{b}\]": "<mfrac><mrow><mi>a</mi></mrow><mrow><mi>b</mi></mrow></mfrac>",
    "$$x$$": "<mi>x</mi>",
    "$x$": "<mi>x</mi>",
    r"$\alpha_i$": "<msub><mi>α</mi><mi>i</mi></msub>",
    r"\(a < b\)": "<mi>a</mi><mo>&lt;</mo><mi>b</mi>",
    r"\(\R\)": "<mi>ℝ</mi>",
    r"\(a \Rightarrow b\)": "<mi>a</mi><mo>⇒</mo><mi>b</mi>",
    r"\[\begin{equation}x\end{equation}\]": "<mi>x</mi>",
    r"\[\begin{gathered}x\end{gathered}\]": "<mtable><mtr><mtd><mi>x</mi></mtd></mtr></mtable>",
}


@pytest.mark.parametrize("text", MATHS)
def test_tex_is_drawn(text: str) -> None:
    html = page_html(text)
    display = "block" if text[:2] in ("$$", "\\[") else "inline"
    assert f'<math display="{display}"><mrow>{MATHS[text]}</mrow></math>' in html


def test_tex_of_several_lines_is_one_formula() -> None:
    """None of its lines begins a list, a heading or a quote."""
    html = page_html(
        "Thus\n\\[\nx\n- 1\n= 2\n> 3\n\\]\nand\n$$\n\\begin{aligned}a &= b \\\\ c &= d\n"
        "\\end{aligned}\n$$\n\n1. \\[ x^2 \\]"
    )
    assert html.count("<math") == 3
    assert "<mtable" in html
    assert re.findall("<(ul|h3|blockquote|code|hr)", html) == []
    assert html.count("<li>") == 1


@pytest.mark.parametrize(
    "text",
    [
        r"\(\unknown{x}\)", r"\[ \frac{1 \]", r"\(x_{\)", r"\(a & b\)", r"\(x^2^3\)",
        r"\(\ce{H2O}\)",
        r"\(\frac{a}\)", r"\(" + "{" * 99 + "x" + "}" * 99 + r"\)", r"\(\left( x\)", r"\(a \\ b\)",
    ],
)  # fmt: skip
def test_unknown_tex_stays_as_it_is(text: str) -> None:
    html = page_html(text)
    assert f'<code class="tex">{text.replace("&", "&amp;")}</code>' in html
    assert "<math" not in html


@pytest.mark.parametrize(
    "text",
    [
        "$5 and $6", "from $5 to $10.", "$HOME and $PATH", "US$a and CA$b", "$100$", "costs $ 5 $",
        "$", "$CAD$", "$x and y", "a $1,000 b $2,000",
    ],
)  # fmt: skip
def test_money_stays_money(text: str) -> None:
    assert page_html(text) == f"<p>{text}</p>\n"


@pytest.mark.parametrize("language", ["", "py", "html", "unknown"])
@pytest.mark.parametrize("code", ["x", "\n\n  x", "x\n", "x\n\n", "\nx\n\ny\n", "  x  ", "\n", ""])
def test_code_keeps_its_blank_lines(language: str, code: str) -> None:
    """Also where it is coloured: the button copies what is shown."""
    shown = re.search("<code>(.*)</code>", page_html(f"```{language}\n{code}\n```"), re.DOTALL)
    assert shown is not None
    assert re.sub("<[^>]*>", "", shown[1]) == code


def test_headings_end_at_the_sixth() -> None:
    html = '<h6 data-level="5">a</h6>\n<h6 data-level="6">b</h6>\n'
    assert page_html("##### a\n###### b") == html


def test_code_keeps_its_tex() -> None:
    assert "<math" not in page_html(
        "`\\(x\\)` and `$x$`\n\n```\n\\[ x \\]\n$$y$$\n```\n\n    $$z$$"
    )
    assert "<math" not in page_html(r"\\(x\\)")


class Harm(HTMLParser):
    """Tags and attributes that could act."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in (
            "script",
            "style",
            "img",
            "iframe",
            "object",
            "embed",
            "form",
            "svg",
            "link",
            "meta",
            "base",
            "template",
            "annotation-xml",
            "video",
            "audio",
            "textarea",
        ):
            self.found.append(tag)  # fmt: skip
        for name, value in attrs:
            is_address = name in ("href", "src", "action", "xlink:href")
            if name.startswith("on") or name in ("style", "srcdoc", "id", "name"):
                self.found.append(f"{tag} {name}")
            if is_address and not (value or "").startswith(("https://", "http://", "HTTP")):
                self.found.append(f"{tag} {name}={value}")


FRAMES = [
    "{}", "`{}`", "```html\n{}\n```", "```{}\nx\n```", "| {} |\n|--|\n| {} |", r"\({}\)", "$${}$$",
    "[^1]\n\n[^1]: {}", "[{}](https://e.org)", "[a](https://e.org '{}')", "- [x] {}",
    "![{}](https://e.org)",
]  # fmt: skip


@pytest.mark.parametrize("frame", FRAMES)
def test_no_payload_can_act(frame: str) -> None:
    assert len(PAYLOADS) >= 40
    for payload in PAYLOADS:
        harm = Harm()
        harm.feed(page_html(frame.replace("{}", payload)))
        assert harm.found == [], payload


HOSTILE = [
    "*" * 20000, "[" * 20000, "[](" * 7000, "a* " * 7000, "*a _b " * 4000, "`a``b```" * 3000,
    "> " * 4000, "- " * 4000 + "x", "*a **b " * 2500 + "c** d* " * 2500, "<" * 20000,
    "|a" * 4000 + "\n" + "|-" * 4000, 'x](https://a "' * 2000, "- a\n" * 5000, "- a\n\n\n" * 2000,
    "1. " * 3000, "\\" * 20000, "https://a.b/((((" * 1500, "```\n" * 5001, "> ```\n" * 2001,
    "_a" * 10000, "![" * 9000 + "](https://x.y)" * 1000, "\\(" * 10000, "$" * 20000, "$a" * 10000,
    "\\[\n" * 5000, "\\(" + "x^{" * 50 + "}" * 50 + "\\)", "\\(" + "\\left(" * 50 + "\\)",
    "[^a" * 7000, "www." * 5000, "~" * 20000, "```js\n" + "`${" * 6000, "```html\n" + "<a " * 6000,
    "```perl\n" + "q(" * 9000, "```swift\n" + '"\\(' * 6000, "a<br>" * 4000,
]  # fmt: skip


def test_a_hostile_text_costs_what_its_length_is_worth() -> None:
    limit_seconds = 8.0  # of a processor; about 20 times what the slowest takes
    for text in HOSTILE:
        before = time.process_time()
        page_html(text)
        assert time.process_time() - before < limit_seconds, text[:20]


SQUARE = [
    "[" * 100_000, "![" * 50_000, '[a]: b "' * 20_000, "\\[\na\n" * 40_000,
    "$" + "$ $".join("a_{b}+" * 600 + str(number) for number in range(50)) + "$",
    "```csharp\n" + "a\n" * 9_000, "```c\n" + "\n" * 19_000, "```java\n" + "\n" * 19_000,
]  # fmt: skip
"""Would take from 8 seconds to minutes, and everybody else's answers with them."""


@pytest.mark.parametrize("text", SQUARE, ids=lambda text: repr(text[:12]))
def test_a_text_that_costs_the_square_stays_plain(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rorqual.serve.page_api.MAX_SECONDS", 0.2)
    before = time.process_time()
    assert rendered([text, "a"]) == [None, None]
    assert time.process_time() - before < 3.0  # one rule's look at one place is not stopped


def test_what_grows_beyond_measure_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rorqual.serve.page_markdown.MAX_HTML_CHARS", 50_000)
    assert rendered([f"[a]: https://a.b/{'x' * 900}\n\n{'[a]' * 90}", "*a*"]) == [
        None,
        "<p><em>a</em></p>\n",
    ]


def test_one_request_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rendered(["x" * (MAX_CHARS - 1), "y", "z"])[1:] == ["<p>y</p>\n", None]
    monkeypatch.setattr("rorqual.serve.page_api.MAX_SECONDS", -1.0)
    assert rendered(["late"]) == [None]


def test_the_route_answers_as_the_others_do(live: Live) -> None:
    address = f"{live.url}/page/api/render"
    reply = web.post(address, json={"texts": ["*a*", "b"]})
    assert reply.json() == {"htmls": ["<p><em>a</em></p>\n", "<p>b</p>\n"]}
    assert web.post(address, json={"texts": ["x"] * (MAX_TEXTS + 1)}).status_code == 422
    problem: dict[str, Any] = web.post(address, json={"texts": "x"}).json()["error"]
    assert problem["param"] == "texts"
    assert web.get(address).status_code in (404, 405)
