"""TeX in an answer -> MathML, which browsers draw themselves; unknown TeX stays as it is.

`\\( \\)`, `\\[ \\]` and `$$ $$` are mathematics, `$ $` only where it cannot be money. The
conversion is latex2mathml's; what it does not know it passes on as text or half made, and that is
found here.
"""

from __future__ import annotations

import re
from functools import lru_cache
from html import unescape
from xml.etree import ElementTree

from latex2mathml.converter import convert_to_element
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

MAX_TEX = 4000
"""Characters of one formula; a longer one is shown as it is."""
MAX_DEPTH = 60
MAX_LINES = 200
CLOSERS = {"\\(": "\\)", "\\[": "\\]", "$$": "$$", "$": "$"}
NUM_PARTS = {
    "mfrac": 2, "msub": 2, "msup": 2, "mover": 2, "munder": 2, "mroot": 2,
    "msubsup": 3, "munderover": 3,
}  # fmt: skip
SAME = [
    (re.compile(pattern), meant)
    for pattern, meant in [
        (r"\\(begin|end)\{(?:aligned|alignedat|split|align|align\*)\}", r"\\\1{split}"),
        (r"\\(begin|end)\{(?:gathered|gather\*?|multline\*?)\}", r"\\\1{matrix}"),
        (r"\\(begin|end)\{[dr]cases\}", r"\\\1{cases}"),
        (r"\\(?:begin|end)\{(?:equation|math|displaymath)\*?\}|\\label\{[^{}]*\}", ""),
        (r"\\(argmax|argmin)(?![A-Za-z])", r"\\operatorname*{\1}"),
        (r"\\([RNZQC])(?![A-Za-z])", r"\\mathbb{\1}"),
    ]
]
"""Writings that latex2mathml does not know, and what they mean."""
IS_FORMULA = re.compile(r"[A-Za-z]'*|.*[\\^_=+*/<>(){}|-].*", re.DOTALL)


def math_html(tex: str, opener: str) -> str:
    """Of a formula between `opener` and its closer: MathML, or the source in a code span."""
    drawn = _mathml(tex.strip(), opener in ("\\[", "$$"))
    if drawn is not None:
        return drawn
    return f'<code class="tex">{escapeHtml(opener + tex + CLOSERS[opener])}</code>'


@lru_cache(maxsize=1000)
def _mathml(tex: str, is_display: bool) -> str | None:
    """None for what cannot be drawn as it was meant."""
    if len(tex) > MAX_TEX or not _is_balanced(tex):
        return None
    for pattern, meant in SAME:
        tex = pattern.sub(meant, tex)
    try:
        root = convert_to_element(tex, display="block" if is_display else "inline")
        for node in root.iter():
            node.text = unescape(node.text or "")
            if not _is_whole(node):
                return None
        return ElementTree.tostring(root, encoding="unicode")
    except Exception:  # noqa: BLE001  a kept library's word for "no": it raises many kinds
        return None


def _is_balanced(tex: str) -> bool:
    depth = 0
    for mark in re.findall(r"\\.|[{}]", tex, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(mark, 0)
        if not 0 <= depth <= MAX_DEPTH:
            return False
    return depth == 0 and tex.count("\\left") <= MAX_DEPTH and tex.count("\\begin") <= MAX_DEPTH


def _is_whole(node: ElementTree.Element) -> bool:
    text = node.text or ""
    is_unknown = text.startswith("\\") or (node.tag == "mi" and "&" in text)
    is_break = node.tag == "mspace" and "linebreak" in node.attrib
    return not (is_unknown or is_break or len(node) != NUM_PARTS.get(node.tag, len(node)))


def math_plugin(md: MarkdownIt) -> None:
    """Tokens `math` for a formula in a line and `math_block` for lines of their own."""
    md.inline.ruler.before("escape", "math", _inline)
    md.block.ruler.before(
        "fence", "math_block", _block, {"alt": ["paragraph", "reference", "blockquote", "list"]}
    )

    def render(tokens: list[Token], at: int, *_: object) -> str:
        return math_html(tokens[at].content, tokens[at].markup)

    md.renderer.rules["math"] = render  # type: ignore[attr-defined]
    md.renderer.rules["math_block"] = lambda *given: f"<p>{render(*given)}</p>\n"  # type: ignore[attr-defined]


def _inline(state: StateInline, silent: bool) -> bool:
    src, start = state.src, state.pos
    opener = next((o for o in CLOSERS if src.startswith(o, start)), None)
    if opener is None:
        return False
    begin = start + len(opener)
    closer = CLOSERS[opener]
    end = src.find(closer, begin, min(state.posMax, begin + MAX_TEX) + len(closer))
    tex = src[begin:end]
    if end < 0 or not tex.strip() or (opener == "$" and not _is_no_money(src, begin, end)):
        return False
    if opener == "\\[" and not IS_FORMULA.fullmatch(tex.strip()):
        return False  # brackets that somebody escaped
    if not silent:
        token = state.push("math", "math", 0)
        token.content, token.markup = tex, opener
    state.pos = end + len(closer)
    return True


def _is_no_money(src: str, begin: int, end: int) -> bool:
    """`$x$`, but neither `$5 and $6` nor `$HOME and $PATH`."""
    tex, before, after = src[begin:end], src[begin - 2 : begin - 1], src[end + 1 : end + 2]
    if tex[0].isspace() or tex[-1].isspace() or tex[0].isdigit() or "\n" in tex:
        return False
    return not (before.isalnum() or after.isalnum()) and IS_FORMULA.fullmatch(tex) is not None


def _block(state: StateBlock, start_line: int, end_line: int, silent: bool) -> bool:
    begin = state.bMarks[start_line] + state.tShift[start_line]
    opener = state.src[begin : begin + 2]
    if opener not in ("\\[", "$$") or state.is_code_block(start_line):
        return False
    closer = CLOSERS[opener]
    for line in range(start_line, min(end_line, start_line + MAX_LINES)):
        at = begin + 2 if line == start_line else state.bMarks[line]
        text = state.src[at : state.eMarks[line]].rstrip()
        if closer not in text:
            continue
        if not text.endswith(closer) or text.count(closer) > 1:
            return False  # a sentence goes on behind it
        if not silent:
            whole = state.getLines(start_line, line + 1, state.blkIndent, False).strip()
            token = state.push("math_block", "math", 0)
            token.content, token.markup = whole[2:-2], opener
            token.map = [start_line, line + 1]
            state.line = line + 1
        return True
    return False
