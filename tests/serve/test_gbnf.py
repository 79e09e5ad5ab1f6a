"""GBNF as llguidance reads it. Oracles: what the grammars say by hand, Python's json and re."""

from __future__ import annotations

import json
import random
import re
import time
from contextlib import suppress
from itertools import product
from typing import Any

import pytest

from rorqual.engine.grammar import Grammar, GrammarCompiler
from rorqual.errors import UsageError
from rorqual.serve.gbnf import MAX_CHARS, MAX_DEPTH, MAX_RULES, MAX_TIMES, as_lark
from rorqual.tokenizer import Tokenizer
from rorqual.tokenizer.special import THINK_BEGIN, THINK_END

pytest.importorskip("llguidance")

JSON = r"""# as llama.cpp has it in grammars/json.gbnf
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws

object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws

array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) # escapes
  )* "\"" ws

number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [0-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""
SQL = """
    root ::= select_statement

    select_statement ::= "SELECT " column " from " table " where " condition

    column ::= "col_1 " | "col_2 "
    table ::= "table_1 " | "table_2 "
    condition ::= column "= " number
    number ::= "1 " | "2 "
"""


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


def is_taken(compiler: GrammarCompiler, gbnf: str, token_ids: list[int], eos_id: int) -> bool:
    return takes(compiler.compile(Grammar("grammar", as_lark(gbnf))).matcher(), token_ids, eos_id)


def takes(matcher: Any, token_ids: list[int], eos_id: int) -> bool:
    for token_id in token_ids:
        if not matcher.allowed()[token_id]:
            return False
        matcher.put(token_id)
    return bool(matcher.allowed()[eos_id])


@pytest.mark.parametrize(
    ("gbnf", "good", "bad"),
    [
        ('root ::= "a" | "b"', ["a", "b"], ["", "c", "ab"]),
        ('root ::= name "x"\nname ::= [a-z]+', ["abx", "xx"], ["ab", "x"]),  # names have an x too
        ('root ::= "(" root ")" | "a"*', ["((aa))", "()", ""], ["(a", ")"]),
        ('root ::= "(" root ")" ws | ws\nws ::= " "*', ["( ) ", "(())", ""], ["(", "x"]),
        ('root ::= name "." root | ";"\nname ::= [a-z]+', ["a.bc.;", ";"], ["a;", "a.b"]),
        ("root ::= . .", ["a\n", "鯨b"], ["a", "abc"]),
        (r'root ::= "\u00e9\x41\U0001F40B\t" [^\n\]-]', ["éA🐋\tz"], ["éA🐋\t-", "éA🐋\t]"]),
        ("root ::= [-a] [a-] [a-c-]", ["--b", "aa-"], ["b--", "--d"]),
        ("root ::= [a-c-e] [+--b] [--0]", ["b,.", "-b0", "e+-"], ["d++", "a*-", "aa-", "a-a"]),
        (r'root ::= "\"\\/\]" [/^&~] [\^]', ['"\\/]&^'], ['"\\/]a^']),
        ('root ::= "a"{2} "b"{1,} "c"{0, 2}', ["aab", "aabbcc"], ["ab", "aaccc", "aabccc"]),
        ('root ::= Up-case Up_case\nUp-case ::= "1"\nUp_case ::= "2"', ["12"], ["11"]),
        ('root ::= start\nstart ::= "1"', ["1"], [""]),
        ("root ::= ", [""], ["a"]),
        ('root ::= ("a"+)? "b"', ["b", "aab"], ["a", ""]),
        ('root ::= ("a"*)* "b"+?', ["", "aab", "bb"], ["ba"]),
        ('root ::= ("a"{2})* "b"{1}{2}', ["bb", "aabb"], ["abb", "aab"]),
        ('root ::= (("(" root ")")*)? ";"', [";", "(;)(;);"], ["(;)", "()"]),
        ('root ::= "a"{0} "b" "c"{0,0}', ["b"], ["ab", "bc", ""]),
        ('root ::= "b" (root "a"){0}', ["b"], ["bba"]),
        ('root ::= ""* ()+ "a"', ["a"], [""]),
        (JSON, ['{"a": [1, 2.5e3, "x\\n", {}, [], null]}', "{}"], ['{"a"}', "[1]", '{"a": 01}']),
        (SQL, ["SELECT col_1  from table_2  where col_2 = 1 "], ["SELECT", "SELECT col_3 "]),
    ],
)
def test_what_a_grammar_takes(
    compiler: GrammarCompiler, tokenizer: Tokenizer, gbnf: str, good: list[str], bad: list[str]
) -> None:
    for text in good:
        assert is_taken(compiler, gbnf, tokenizer.encode(text), tokenizer.eos_id), text
    for text in bad:
        assert not is_taken(compiler, gbnf, tokenizer.encode(text), tokenizer.eos_id), text


def test_json_is_jsons(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    values = [None, True, -7, 0.25, "", 'a"b\\c', [], {}, [[{"a": [0]}], "鯨"], {"b": {"c": {}}}]
    for first, second in product(values, values):
        text = json.dumps({"x": first, "y": [second]}, ensure_ascii=False)
        assert is_taken(compiler, JSON, tokenizer.encode(text), tokenizer.eos_id), text


@pytest.mark.parametrize(
    ("gbnf", "regex"),
    [
        ("root ::= a b\na ::= [ab]+\nb ::= [bc]+", "[ab]+[bc]+"),
        ('root ::= (a | "ab") "c"?\na ::= "a" | "abc"', "(a|abc|ab)c?"),
        ('root ::= a{2} "b"* a?\na ::= "a" "b"?', "(ab?){2}b*(ab?)?"),
    ],
)
def test_without_recursion_it_is_exact(
    compiler: GrammarCompiler, tokenizer: Tokenizer, gbnf: str, regex: str
) -> None:
    """Also where one part could take what the next must have. Oracle: Python's re."""
    for length in range(5):
        for letters in product("abc", repeat=length):
            text = "".join(letters)
            is_good = is_taken(compiler, gbnf, tokenizer.encode(text), tokenizer.eos_id)
            assert is_good == (re.fullmatch(regex, text) is not None), text


LEAVES = {"x": "a", "y": "b", '"c"': "c", '("a" | "bc")': "(?:a|bc)", '""': "", '"ab"': "(?:ab)"}
RECURSIVE = """
x ::= "a" | "(" x ")"
y ::= "b" | "[" y "]"
"""
REGULAR = """
x ::= "a"
y ::= "b"
"""
TIMES = ("*", "+", "?", "{2}", "{1,}", "{0,2}", "{1,2}", "{0}", "{0,0}", " { 2 , 3 } ")


def random_tree(rng: random.Random, depth: int) -> tuple[str, str]:
    """(GBNF, the same for `re`), each of which may be repeated as it is."""
    kind = rng.choice(("leaf", "all", "any", "times", "times")) if depth else "leaf"
    if kind == "leaf":
        return rng.choice(list(LEAVES.items()))
    parts = [random_tree(rng, depth - 1) for _ in range(rng.randint(1, 3))]
    gbnf, regex = zip(*parts, strict=True)
    if kind == "all":
        return f"({' '.join(gbnf)})", f"(?:{''.join(regex)})"
    if kind == "any":
        return f"({' | '.join(gbnf)})", f"(?:{'|'.join(regex)})"
    times = rng.choice(TIMES)
    bare, again = f"{gbnf[0]}{times}", f"(?:(?:{regex[0]}){re.sub(' ', '', times)})"
    return (bare, again) if rng.random() < 0.5 else (f"({bare})", again)


@pytest.mark.parametrize("rules", [REGULAR, RECURSIVE], ids=["regular", "recursive"])
@pytest.mark.parametrize("seed", range(40))
def test_trees_of_chance(
    compiler: GrammarCompiler, tokenizer: Tokenizer, rules: str, seed: int
) -> None:
    """Oracle: Python's re. Names of recursive rules cross all that is around them."""
    gbnf, regex = random_tree(random.Random(seed), 4)
    compiled = compiler.compile(Grammar("grammar", as_lark(f"root ::= {gbnf}{rules}")))
    for length in range(4):
        for letters in product("abc", repeat=length):
            text = "".join(letters)
            is_good = takes(compiled.matcher(), tokenizer.encode(text), tokenizer.eos_id)
            assert is_good == (re.fullmatch(regex, text) is not None), (gbnf, text)


def test_tokens_by_name(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    gbnf = f'root ::= {THINK_BEGIN} [a-z ]* {THINK_END} "yes"'
    good = tokenizer.encode(f"{THINK_BEGIN}so it is{THINK_END}yes", allow_special=True)
    assert is_taken(compiler, gbnf, good, tokenizer.eos_id)
    assert not is_taken(compiler, gbnf, tokenizer.encode("yes"), tokenizer.eos_id)


@pytest.mark.parametrize(
    ("gbnf", "words"),
    [
        ("root ::= x", "line 1: 'x' needs a rule 'x'"),
        ('a ::= "a"', "needs a rule 'root'"),
        ('root ::= ("a"', "its end stands where a bracket must close"),
        ('root ::= "a"\nb ::= "b', "line 2: '\"b' means nothing"),
        ('root ::= "a"\nb ::= x\nc ::= "c"\n', "line 2: 'x' needs a rule 'x'"),
        ("root ::= *", "nothing before it to repeat"),
        ('root ::= "a" | *', "nothing before it to repeat"),
        ('root ::= "a"' + "+?*+?", "'?' is one more than 4 in a row"),
        ('root ::= "a"\n  {3,2}', "line 2: '{3,2}' ends before it begins"),
        ("root ::= []", "has no characters"),
        (r"root ::= [ab-\x41]", "has 'b-A', which ends before it begins"),
        (r'root ::= "\q"', r"no character"),
        (r'root ::= "\uD800"', r"no character"),
        (r"root ::= [\uDFFF]", r"no character"),
        (r'root ::= "\U00110000"', r"no character"),
        (r'root ::= "\UFFFFFFFF"', r"no character"),
        ("root ::= 'a'", "means nothing here"),
        ('root ::= "a")', "no beginning of a rule"),
        ('root ::= "a"\nroot ::= "b"', "line 2: 'root ::= \"b\"' is there twice"),
        ("root ::= " + "(" * (MAX_DEPTH + 1) + '"a"', f"more than {MAX_DEPTH} brackets"),
        ("".join(f"r{n} ::= .\n" for n in range(MAX_RULES + 1)), f"more than {MAX_RULES}"),
        ("root ::= .".ljust(MAX_CHARS + 1), f"at most {MAX_CHARS}"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_place(gbnf: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        as_lark(gbnf)


@pytest.mark.parametrize(
    ("gbnf", "words"),
    [
        ("root ::= <foo>", 'unknown special token: "<foo>"'),
        ('root ::= "a"\n | <[99999999]>', "Token range end too large: 99999999"),
        ("root ::= root", "it matches no text"),
    ],
)
def test_an_error_shows_no_text_that_nobody_wrote(
    compiler: GrammarCompiler, gbnf: str, words: str
) -> None:
    """The rules that are made of a client's, their names and lines."""
    with pytest.raises(UsageError, match=re.escape(words)) as caught:
        compiler.compile(Grammar("grammar", as_lark(gbnf)))
    assert not re.search(r"start|R0|r0|\d\(\d|\||\^", str(caught.value).partition("; following")[0])


def test_long_chains_and_deep_brackets_are_read() -> None:
    chain = "".join(f"r{n} ::= r{n + 1}\n" for n in range(MAX_RULES - 2))
    assert "R0" in as_lark(f"root ::= r0\n{chain}r{MAX_RULES - 2} ::= .")
    deep = "(" * MAX_DEPTH + '"a" root' + ' | "b")' * MAX_DEPTH
    assert as_lark(f"root ::= {deep}").startswith("start: r0\n")
    deep = "(" * MAX_DEPTH + '"a" root' + (")" + "?" * MAX_TIMES + " .") * MAX_DEPTH
    assert as_lark(f"root ::= {deep}").startswith("start: r0\n")


def test_what_is_just_within_the_limits_is_read() -> None:
    """Brackets beside each other are not inside of each other."""
    beside = '("a") ' * (MAX_DEPTH + 1)
    assert as_lark(f"root ::= {beside}").count("/a/") == MAX_DEPTH + 1
    assert as_lark("root ::= .".ljust(MAX_CHARS)) == as_lark("root ::= .")
    lark = as_lark(r"root ::= [\uD7FF\uE000\U0010FFFF]")
    assert r"/[\u{d7ff}\u{e000}\u{10ffff}]/" in lark


HOSTILE = {
    "newlines": "\n" * 90_000 + "x",
    "blanks": " " * 90_000 + "x",
    "one-name": "a" * 90_000,
    "names": "a " * 45_000,
    "classes": "root ::= " + "[a-z] " * 5_000,
    "alternatives": 'root ::= "b"' + '|"a"' * 8_000,
    "chain": "root ::= r1\n" + "".join(f"r{n} ::= " + f"r{n + 1} " * 10 for n in range(1, 500)),
    "brackets": "root ::= " + ("(" * MAX_DEPTH + '"a" root' + ")" * MAX_DEPTH) * 300,
    "repetitions": 'root ::= "a"' + "*" * 30_000,
    "text": 'root ::= "' + "é" * 30_000 + '"',
    "open-texts": "root ::= " + '["' * 15_000,
    "gap": "root ::= a" + " \n" * 15_000 + "a",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_text_takes_long(name: str) -> None:
    """Time grows with the length alone: twice as much takes twice as long, not four times."""
    text = HOSTILE[name]
    seconds = []
    for part in (text[: len(text) // 8], text):
        begin = time.process_time()
        with suppress(ValueError):
            as_lark(part)
        seconds.append(time.process_time() - begin)
    assert seconds[1] < max(24 * seconds[0], 0.5)


def test_other_grammars_stay_as_they_are() -> None:
    for text in ('start: "a ::= b"', "start: /a/", "", "%llguidance {}\nstart: /a/"):
        assert as_lark(text) == text
