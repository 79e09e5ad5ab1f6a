"""Markdown of an answer -> HTML that may stand in the page: GitHub's dialect, TeX, coloured code.

markdown-it-py reads it, Pygments colours code by classes, `page_math` draws TeX, and nh3 takes away
whatever the page does not know, whoever let it through. Choices, where a chat differs from a
document: tags are shown as text, but `<br>`; an image is a link, so that reading an answer makes no
request; only http(s) becomes a link; a line's end stays one; beside Chinese, Japanese and Korean
letters `**` may open and close, which CommonMark forbids after full-width punctuation; footnotes
have no links (the page's address names the chat).

Anybody's text may cost the square of its length, in the parser and in lexers: every step of both
looks at the clock.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.rules_block import StateBlock
from markdown_it.rules_core import StateCore
from markdown_it.rules_inline import StateInline
from markdown_it.rules_inline.state_inline import Delimiter
from markdown_it.token import Token
from mdit_py_plugins.gfm import gfm_plugin
from pygments import highlight
from pygments.filter import Filter
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from rorqual.serve.page_math import math_plugin

MAX_COLOURED = 20_000
"""Characters of a code block; a longer one is plain: some lexers are slow."""
MAX_HTML_CHARS = 4_000_000
"""Of one text: a long address that is referred to often multiplies."""
LANGUAGES = frozenset(
    "bash sh zsh shell console bat c cpp c++ csharp c# objc cuda rust go java kotlin scala swift "
    "dart javascript js typescript ts jsx tsx html xml css scss json json5 yaml yml toml ini sql "
    "python py pycon r ruby rb perl php lua haskell hs ocaml elixir erlang lisp scheme julia "
    "matlab fortran zig nim solidity graphql protobuf proto docker dockerfile make makefile cmake "
    "diff patch latex tex markdown md http nginx vim asm nasm verilog vhdl".split()
)
InlineRule = Callable[[StateInline, bool], bool]
WIDE = re.compile("[\u1100-\u11ff\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]")
LINK = re.compile(r"https?://[^\s/?#]", re.IGNORECASE)
BREAK = re.compile(r"<br ?/?>", re.IGNORECASE)
MATH = (
    "math mrow mi mn mo ms mtext mspace mfrac msqrt mroot msub msup msubsup mover munder "
    "munderover mtable mtr mtd mstyle mpadded mphantom menclose mmultiscripts mprescripts none"
).split()
MATH_ATTRIBUTES = set(
    "display displaystyle scriptlevel mathvariant stretchy fence form accent accentunder minsize "
    "maxsize movablelimits linethickness width height depth lspace rspace voffset columnalign "
    "rowspacing columnspacing notation separator symmetric largeop".split()
)
TAGS = set(
    "p br hr em strong del s code pre span a blockquote ul ol li h3 h4 h5 h6 table thead tbody tr "
    "th td figure figcaption div input sup section".split()
)
CLEANER = nh3.Cleaner(
    tags=TAGS | set(MATH),
    attributes={tag: MATH_ATTRIBUTES for tag in MATH}
    | {
        "a": {"href", "title"},
        "ol": {"start"},
        "input": {"type", "disabled", "checked", "aria-label"},
        "pre": {"tabindex", "aria-label"},
        "th": {"scope", "data-align"},
        "td": {"data-align"},
        "div": {"class", "tabindex", "role", "aria-label"},
    }
    | {tag: {"class"} for tag in ("span", "code", "figure", "li", "section", "p")}
    | {f"h{level}": {"data-level"} for level in range(3, 7)},
    set_tag_attribute_values={"a": {"target": "_blank"}},
    url_schemes={"http", "https"},
    link_rel="noopener noreferrer nofollow",
)


class TooMuchError(Exception):
    """It takes more time than there is, or grows beyond measure."""


def page_html(text: str, ends_at: float = math.inf) -> str:
    """What the page shows of a markdown text; nothing in it can act. TooMuchError for one that is
    not done when `time.monotonic()` is at `ends_at`, or becomes more than MAX_HTML_CHARS.
    """
    html = _parser().render(text, {"ends_at": ends_at})
    if len(html) > MAX_HTML_CHARS:
        raise TooMuchError
    return CLEANER.clean(html)


def _check_time(env: Mapping[str, Any]) -> None:
    if time.monotonic() > env["ends_at"]:
        raise TooMuchError


def _in_time(draw: Callable[..., str]) -> Callable[..., str]:
    def drawn(tokens: list[Token], at: int, options: Any, env: Mapping[str, Any]) -> str:
        _check_time(env)
        return draw(tokens, at, options, env)

    return drawn


def _look_at_clock(state: StateInline | StateBlock, *_: object) -> bool:
    """As the first rule: it finds nothing and is asked at each place."""
    _check_time(state.env)
    return False


@lru_cache(maxsize=1)
def _parser() -> MarkdownIt:
    md = MarkdownIt("commonmark", {"html": False, "breaks": True})
    md.use(gfm_plugin)
    for rule in md.inline.ruler.__rules__:
        if rule.name.startswith("gfm_autolink"):
            rule.fn = _leaving_no_trace(rule.fn)
    md.use(math_plugin)
    md.validateLink = lambda url: LINK.match(url) is not None  # type: ignore[method-assign]
    md.inline.ruler.at("emphasis", _emphasis)
    md.inline.ruler.before("html_inline", "line_break", _line_break)
    md.inline.ruler.before(md.inline.ruler.__rules__[0].name, "clock", _look_at_clock)
    first = md.block.ruler.__rules__[0].name
    alternatives = ["paragraph", "reference", "blockquote", "list"]
    md.block.ruler.before(first, "clock", _look_at_clock, {"alt": alternatives})
    md.core.ruler.push("page", _as_the_page_has_it)
    rules: dict[str, Any] = md.renderer.rules  # type: ignore[attr-defined]
    for name in ("math", "math_block"):
        rules[name] = _in_time(rules[name])
    rules |= {
        "fence": lambda tokens, at, _, env: _code(tokens[at].content, tokens[at].info, env),
        "code_block": lambda tokens, at, _, env: _code(tokens[at].content, "", env),
        "table_open": lambda *_: (
            '<div class="table" tabindex="0" role="group" aria-label="Table"><table>\n'
        ),
        "table_close": lambda *_: "</table></div>\n",
        "list_item_open": _item,
        "image": _image,
        "footnote_ref": lambda tokens, at, *_: f"<sup>[{tokens[at].meta['id'] + 1}]</sup>",
        "footnote_block_open": lambda *_: '<section class="footnotes"><ol>\n',
        "footnote_block_close": lambda *_: "</ol></section>\n",
        "footnote_open": lambda *_: "<li>",
        "footnote_anchor": lambda *_: "",
    }
    return md


def _code(content: str, info: str, env: Mapping[str, Any]) -> str:
    match = re.match(r"[\w+#.-]{1,24}", info.strip())
    language = match[0] if match else ""
    label = f"Code, {language}" if language else "Code"
    return (
        f'<figure class="code"><figcaption><span>{escapeHtml(language or "text")}</span>'
        f'</figcaption><pre tabindex="0" aria-label="{escapeHtml(label)}"><code>'
        f"{_coloured(content.removesuffix(chr(10)), language.lower(), env)}</code></pre></figure>\n"
    )


class _Clock(Filter):
    def __init__(self, env: Mapping[str, Any]) -> None:
        super().__init__()
        self._env = env

    def filter(self, lexer: Any, stream: Any) -> Any:
        for token in stream:
            _check_time(self._env)
            yield token


def _coloured(code: str, language: str, env: Mapping[str, Any]) -> str:
    if language not in LANGUAGES or len(code) > MAX_COLOURED:
        return escapeHtml(code)
    try:
        lexer = get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return escapeHtml(code)
    lexer.add_filter(_Clock(env))
    coloured: str = highlight(code, lexer, HtmlFormatter(nowrap=True))
    # Pygments ends the last line where the code does not.
    return coloured if code.endswith("\n") else coloured.removesuffix("\n")


def _item(tokens: list[Token], at: int, *_: object) -> str:
    is_done = tokens[at].meta.get("checked")
    if is_done is None:
        return "<li>"
    state = 'checked aria-label="Done"' if is_done else 'aria-label="Not done"'
    return f'<li class="task"><input type="checkbox" disabled {state}>'


def _image(tokens: list[Token], at: int, *_: object) -> str:
    address = escapeHtml(str(tokens[at].attrs.get("src", "")))
    return f'<a href="{address}">{escapeHtml(tokens[at].content) or address}</a>'


def _as_the_page_has_it(state: StateCore) -> None:
    """Headings two levels lower (the page and the message have the first two), alignment without
    styles, each link with its address to be read. Items of tight lists have paragraphs too: what
    is out of sight can then be left out of the layout.
    """
    for token in state.tokens:
        if token.type.startswith("paragraph_") and token.hidden:
            token.hidden = False
            if token.nesting == 1:
                token.attrSet("class", "tight")
        if token.type in ("heading_open", "heading_close"):
            level = int(token.tag[1])
            token.tag = f"h{min(6, level + 2)}"
            if token.nesting == 1:
                token.attrSet("data-level", str(level))
        elif token.type in ("th_open", "td_open"):
            style = str(token.attrs.pop("style", ""))
            if style:
                token.attrSet("data-align", style.removeprefix("text-align:"))
            if token.tag == "th":
                token.attrSet("scope", "col")
        for child in token.children or []:
            if child.type == "link_open":
                child.attrSet("title", str(child.attrs.get("href", "")))


def _leaving_no_trace(rule: InlineRule) -> InlineRule:
    """The plugin's rules take the text before a link away even where they then make no link."""

    def apply(state: StateInline, silent: bool) -> bool:
        pending = state.pending
        is_link = rule(state, silent)
        if not is_link:
            state.pending = pending
        return is_link

    return apply


def _line_break(state: StateInline, silent: bool) -> bool:
    match = BREAK.match(state.src, state.pos)
    if match is None:
        return False
    if not silent:
        state.push("hardbreak", "br", 0)
    state.pos = match.end()
    return True


def _emphasis(state: StateInline, silent: bool) -> bool:
    """CommonMark's, but that the neighbours' width counts: see above."""
    start, src = state.pos, state.src
    marker = src[start]
    if silent or marker not in "_*":
        return False
    scanned = state.scanDelims(start, marker == "*")
    end = start + scanned.length
    before, after = src[start - 1 : start], src[end : end + 1]
    is_wide = marker == "*" and (WIDE.match(before) or WIDE.match(after))
    for _ in range(scanned.length):
        token = state.push("text", "", 0)
        token.content = marker
        delimiter = Delimiter(
            marker=ord(marker),
            length=scanned.length,
            token=len(state.tokens) - 1,
            end=-1,
            open=scanned.can_open or bool(is_wide and after.strip()),
            close=scanned.can_close or bool(is_wide and before.strip()),
        )
        state.delimiters.append(delimiter)
    state.pos = end
    return True
