"""GBNF, in which llama.cpp has its grammars, and xgrammar as "EBNF", made to llguidance's Lark.

Source: llama.cpp, grammars/README.md. A rule that does not lead back to itself is regular and
becomes a terminal, and so does each run of regular parts in the other rules. A terminal takes as
much as it can, perhaps what the next one needs: so they are made as long as possible. A grammar
without recursion is one terminal, so it is exact.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rorqual.engine.grammar import TRANSLATED

MAX_CHARS = 32_768
"""A text is read where everybody waits: 0.1 s at most."""
MAX_RULES = 512
MAX_DEPTH, MAX_TIMES = 48, 4
"""Of brackets, and of repetitions in a row: each is a call within another."""
ROOT = "root"
IS_GBNF = re.compile(r"^[ \t]*[A-Za-z0-9_-]+[ \t]*::=", re.MULTILINE)
_TOKEN = re.compile(
    r"(?P<space>\s+|#[^\n]*)"
    r"|(?P<head>[A-Za-z0-9_-]+\s*::=)"
    r"|(?P<name>[A-Za-z0-9_-]+)"
    r'|(?P<text>"(?:[^"\\\n]|\\.)*")'
    r"|(?P<chars>\[(?:[^\]\\\n]|\\.)*\])"
    r"|(?P<times>[*+?]|\{\s*[0-9]{1,6}\s*(?:,\s*(?:[0-9]{1,6}\s*)?)?\})"
    r"|(?P<token><[^<>\s]+>)"
    r"|(?P<sign>[()|.])"
)
_CHARACTER = re.compile(
    r"\\x([0-9A-Fa-f]{2})|\\u([0-9A-Fa-f]{4})|\\U([0-9A-Fa-f]{8})|\\(.)|([^\\])", re.DOTALL
)
_NAMED = {"n": "\n", "r": "\r", "t": "\t"}
ANY = r"[\u{0}-\u{10ffff}]"


@dataclass(frozen=True)
class _Node:
    """`kind` is `regex`, `name` of a rule, `token`, `all` parts, `any` of them, or one `times`;
    `text` is the regular expression, the name, or the sign of repetition.
    """

    kind: str
    text: str = ""
    parts: tuple[_Node, ...] = ()


def as_lark(text: str) -> str:
    """GBNF in Lark's notation; another text as it is. ValueError says what is wrong, and where."""
    if IS_GBNF.search(text) is None:
        return text
    if len(text) > MAX_CHARS:
        raise ValueError(f"a grammar of {len(text)} characters; at most {MAX_CHARS} are read")
    return _Writer(_Reader(text).rules()).lark()


class _Reader:
    """Makes rules of a text."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = [*self._split(), ("end", "", len(text))]
        self._at = 0

    def _split(self) -> Iterator[tuple[str, str, int]]:
        at = depth = 0
        while at < len(self._text):
            found = _TOKEN.match(self._text, at)
            if found is None:
                raise self._fault(at, "means nothing here")
            kind, value = str(found.lastgroup), found[0]
            depth += (value == "(") - (value == ")")
            if depth > MAX_DEPTH:
                raise self._fault(at, f"is inside of more than {MAX_DEPTH} brackets")
            if kind != "space":
                yield kind, value, at
            at = found.end()

    def _fault(self, at: int, reason: str) -> ValueError:
        line = self._text.count("\n", 0, at) + 1
        found = self._text[at : at + 20].partition("\n")[0]
        return ValueError(f"line {line}: {found!r} {reason}" if found else f"its end {reason}")

    def rules(self) -> dict[str, _Node]:
        """The rules by name. Each name that they have is one of theirs, and `root` is there."""
        rules: dict[str, _Node] = {}
        self._names: dict[str, int] = {ROOT: 0}
        while self._kind == "head":
            name = self._value.removesuffix("::=").rstrip()
            if name in rules:
                raise self._fault(self._place, "is there twice")
            if len(rules) == MAX_RULES:
                raise self._fault(self._place, f"is one rule more than {MAX_RULES}")
            self._at += 1
            rules[name] = self._alternatives()
        if self._kind != "end":
            raise self._fault(self._place, "is no beginning of a rule")
        for name, place in self._names.items():
            if name not in rules:
                raise self._fault(place, f"needs a rule {name!r}, and there is none")
        return rules

    @property
    def _kind(self) -> str:
        return self._tokens[self._at][0]

    @property
    def _value(self) -> str:
        return self._tokens[self._at][1]

    @property
    def _place(self) -> int:
        return self._tokens[self._at][2]

    def _alternatives(self) -> _Node:
        found = [self._sequence()]
        while self._value == "|":
            self._at += 1
            found.append(self._sequence())
        return found[0] if len(found) == 1 else _Node("any", parts=tuple(found))

    def _sequence(self) -> _Node:
        parts: list[_Node] = []
        while (part := self._part()) is not None:
            num_times = 0
            while self._kind == "times":  # each repeats what those before it made, as in llama.cpp
                num_times += 1
                if num_times > MAX_TIMES:
                    raise self._fault(self._place, f"is one more than {MAX_TIMES} in a row")
                part = self._repeated(part)
                self._at += 1
            parts.append(part)
        return parts[0] if len(parts) == 1 else _Node("all", parts=tuple(parts))

    def _repeated(self, part: _Node) -> _Node:
        sign = re.sub(r"\s", "", self._value)
        counts = [int(count) for count in re.findall("[0-9]+", sign)]
        if counts and counts[-1] < counts[0]:
            raise self._fault(self._place, "ends before it begins")
        if counts and not counts[-1] and not sign.endswith(",}"):
            return _Node("regex")
        return _Node("times", sign, (part,))

    def _part(self) -> _Node | None:
        kind, value, place = self._tokens[self._at]
        if value == "(":
            self._at += 1
            part = self._alternatives()
            if self._value != ")":
                raise self._fault(self._place, "stands where a bracket must close")
        elif kind == "name":
            self._names.setdefault(value, place)
            part = _Node("name", value)
        elif kind == "text":
            escaped = (_escaped(each) for each, _ in self._characters(value[1:-1], place))
            part = _Node("regex", "".join(escaped))
        elif kind == "chars":
            part = _Node("regex", self._class(value[1:-1], place))
        elif value == ".":
            part = _Node("regex", ANY)
        elif kind == "token":
            part = _Node("token", value)
        elif kind == "times":
            raise self._fault(place, "has nothing before it to repeat")
        else:
            return None
        self._at += 1
        return part

    def _class(self, text: str, place: int) -> str:
        sign = "^" if text.startswith("^") else ""
        characters = list(self._characters(text.removeprefix("^"), place))
        members: list[str] = []
        at = 0
        while at < len(characters):
            first = last = characters[at][0]
            if characters[at + 1 : at + 2] == [("-", True)] and at + 2 < len(characters):
                at += 2
                last = characters[at][0]
            if last < first:
                raise self._fault(place, f"has {f'{first}-{last}'!r}, which ends before it begins")
            at += 1
            members.append(_escaped(first) + (f"-{_escaped(last)}" if last > first else ""))
        if not members:
            raise self._fault(place, "has no characters")
        return f"[{sign}{''.join(members)}]"

    def _characters(self, text: str, place: int) -> Iterator[tuple[str, bool]]:
        """Each, and whether it is written as itself."""
        for found in _CHARACTER.finditer(text):
            *codes, named, plain = found.groups()
            code = next((int(code, 16) for code in codes if code), None)
            if plain is not None:
                yield plain, True
            elif code is None and (named in _NAMED or not named.isalnum()):
                yield _NAMED.get(named, named), False
            elif code is not None and code <= 0x10FFFF and not 0xD800 <= code < 0xE000:
                yield chr(code), False
            else:
                raise self._fault(place, f"has {found[0]!r}, which is no character")


def _escaped(character: str) -> str:
    """For a regular expression between slashes."""
    is_plain = character.isascii() and (character.isalnum() or character in " _")
    return character if is_plain else f"\\u{{{ord(character):x}}}"


class _Writer:
    """Writes rules in Lark: `r3`, regular ones as terminals `R3`, runs of regular parts as `T8`."""

    def __init__(self, rules: dict[str, _Node]) -> None:
        self._rules = rules
        self._numbers = {name: number for number, name in enumerate(rules)}
        self._regular = self._find_regular()
        self._known: dict[int, bool] = {}
        self._runs: list[str] = []

    def _find_regular(self) -> set[str]:
        """Rules that need none but regular ones, in the order in which that is known."""
        found: list[str] = []
        num_needed: dict[str, int] = {}
        users: dict[str, list[str]] = {name: [] for name in self._rules}
        for name, node in self._rules.items():
            needs = {leaf for leaf in _leaves(node) if leaf.kind in ("name", "token")}
            num_needed[name] = len(needs)
            for leaf in needs:
                if leaf.kind == "name":
                    users[leaf.text].append(name)
            if not needs:
                found.append(name)
        for name in found:
            for user in users[name]:
                num_needed[user] -= 1
                if not num_needed[user]:
                    found.append(user)
        return set(found)

    def lark(self) -> str:
        lines = [f"start: {self._name(ROOT)}"]
        for name, node in self._rules.items():
            write = self._terminal if name in self._regular else self._rule
            lines.append(f"{self._name(name)}: {write(node)}")
        lines += [f"T{number}: {text}" for number, text in enumerate(self._runs)]
        return "\n".join([*lines, TRANSLATED])

    def _is_regular(self, node: _Node) -> bool:
        known = self._known.get(id(node))
        if known is None:
            if node.kind == "name":
                known = node.text in self._regular
            else:
                known = node.kind != "token" and all(map(self._is_regular, node.parts))
            self._known[id(node)] = known
        return known

    def _name(self, name: str) -> str:
        return f"{'R' if name in self._regular else 'r'}{self._numbers[name]}"

    def _terminal(self, node: _Node) -> str:
        if node.kind == "regex":
            return f"/{node.text}/" if node.text else '""'
        if node.kind == "name":
            return self._name(node.text)
        return _joined(node, [self._terminal(part) for part in node.parts])

    def _rule(self, node: _Node) -> str:
        if node.kind == "token":
            return node.text
        if node.kind == "name":
            return self._name(node.text)
        if self._is_regular(node):
            return self._run([node])
        if node.kind != "all":
            return _joined(node, [self._rule(part) for part in node.parts])
        texts: list[str] = []
        run: list[_Node] = []
        for part in node.parts:
            if self._is_regular(part):
                run.append(part)
                continue
            texts += [self._run(run)] if run else []
            texts.append(self._rule(part))
            run = []
        texts += [self._run(run)] if run else []
        return _joined(node, texts)

    def _run(self, parts: Sequence[_Node]) -> str:
        self._runs.append(self._terminal(_Node("all", parts=tuple(parts))))
        return f"T{len(self._runs) - 1}"


def _leaves(node: _Node) -> Iterator[_Node]:
    left = [node]
    while left:
        node = left.pop()
        left += node.parts
        if not node.parts:
            yield node


def _joined(node: _Node, texts: Sequence[str]) -> str:
    if node.kind == "times":
        [repeated] = node.parts
        return f"({texts[0]}){node.text}" if repeated.kind == "times" else texts[0] + node.text
    if not texts:
        return '""'
    return f"({(' ' if node.kind == 'all' else ' | ').join(texts)})"
