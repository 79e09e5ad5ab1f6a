"""One line of Python for an everyday wish; judged by its syntax tree, never by running it."""

from __future__ import annotations

import ast
import random
import re
from dataclasses import dataclass

from rorqual.corpus_writer.phrasing import phrase
from rorqual.corpus_writer.story_parts import BOYS, GIRLS
from rorqual.corpus_writer.words import common_words
from rorqual.tasks import RIGHT, DrawnTask, Grade, Question, wrong
from rorqual.tasks.answers import MAX_CHARACTERS, NO_ANSWER, TOO_LONG

TEXTS = (
    "hello", "hello world", "good morning", "python", "whale", "banana", "rorqual", "apple",
    "garden", "hi there", "good night", "summer", "river", "tiger", "orange", "music",
)  # fmt: skip
FRAMES = (
    "!write python to {w}", "!write python code to {w}", "python to {w}", "python: {w}",
    "!write a line of python to {w}", "how do i {w} in python?", "how do you {w} in python?",
    "!show me how to {w} in python", "!write one line of python to {w}", "{w} in python",
    "!give me python code to {w}", "what is the python code to {w}?", "python code to {w}",
    "how can i {w} with python?", "!{w} with python", "!use python to {w}",
)  # fmt: skip

# wish (with slots) and the line that fulfils it; the wishes of one line are its phrasings.
RECIPES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("print the numbers from 1 to {n}", "print numbers 1 to {n}", "count from 1 to {n}",
      "print every number from 1 to {n}"), "for i in range(1, {n1}): print(i)"),
    (("print the numbers from {a} to {b}", "print numbers {a} to {b}", "count from {a} to {b}"),
     "for i in range({a}, {b1}): print(i)"),
    (("print the even numbers up to {n}", "print even numbers to {n}",
      "print all even numbers up to {n}"), "print(list(range(2, {n1}, 2)))"),
    (("print the odd numbers up to {n}", "print odd numbers to {n}",
      "print all odd numbers up to {n}"), "print(list(range(1, {n1}, 2)))"),
    (("print the squares from 1 to {n}", "list the squares of 1 to {n}",
      "print the squares of the numbers from 1 to {n}"),
     "print([i * i for i in range(1, {n1})])"),
    (("add the numbers from 1 to {n}", "sum the numbers from 1 to {n}",
      "find the sum of the numbers from 1 to {n}"), "print(sum(range(1, {n1})))"),
    (("count down from {n} to 1", "print the numbers from {n} down to 1", "count down from {n}"),
     "for i in range({n}, 0, -1): print(i)"),
    (("print the times table of {d}", "print the {d} times table",
      "print the multiplication table of {d}"), "print([{d} * i for i in range(1, 11)])"),
    (("print {text} {k} times", "say {text} {k} times", "repeat {text} {k} times"),
     "for i in range({k}): print({text})"),
    (("print {text}", "say {text}", "show the text {text}"), "print({text})"),
    (("greet {name}", "say hello to {name}", "print a greeting for {name}"),
     "name = \"{name}\"; print(f\"Hello, {{name}}!\")"),
    (("reverse the list {list}", "reverse {list}", "turn around the list {list}"),
     "print({list}[::-1])"),
    (("sum the list {list}", "add up {list}", "find the sum of {list}", "add the numbers {list}"),
     "print(sum({list}))"),
    (("find the largest of {list}", "find the maximum of {list}", "get the max of {list}",
      "find the biggest number in {list}"), "print(max({list}))"),
    (("find the smallest of {list}", "find the minimum of {list}", "get the min of {list}",
      "find the smallest number in {list}"), "print(min({list}))"),
    (("sort the list {list}", "sort {list}", "put {list} in order"), "print(sorted({list}))"),
    (("count the items in {list}", "find the length of {list}",
     "get the length of the list {list}"),
     "print(len({list}))"),
    (("find the average of {list}", "find the mean of {list}", "compute the average of {list}"),
     "x = {list}; print(sum(x) / len(x))"),
    (("double each number in {list}", "double every number in {list}",
     "double the numbers in {list}"),
     "print([2 * x for x in {list}])"),
    (("reverse the string {text}", "reverse the text {text}", "spell {text} backwards"),
     "print({text}[::-1])"),
    (("find the length of the string {text}", "count the letters in {text}",
      "get the length of {text}"), "print(len({text}))"),
    (("make {text} upper case", "turn {text} into upper case", "print {text} in capital letters"),
     "print({text}.upper())"),
    (("join the words {words}", "join {words} with spaces", "join the list {words}"),
     "print(\" \".join({words}))"),
    (("split {text} into words", "split the string {text}"), "print({text}.split())"),
    (("add {a} and {k}", "print {a} plus {k}", "print the sum of {a} and {k}"), "print({a} + {k})"),
    (("multiply {a} by {k}", "print {a} times {k}", "multiply {a} and {k}"), "print({a} * {k})"),
    (("check if {n} is even", "test if {n} is even", "see if {n} is even"), "print({n} % 2 == 0)"),
    (("check if {d} is in {list}", "test if {d} is in {list}", "see if {d} is in the list {list}"),
     "print({d} in {list})"),
    (("count the letter {l} in {text}", "count how often {l} is in {text}"),
     "print({text}.count(\"{l}\"))"),
    (("ask for a name and print it", "read a name and print it", "read a name from the user"),
     "print(input(\"Name: \"))"),
)  # fmt: skip


def fenced(line: str) -> str:
    return f"```python\n{line}\n```"


@dataclass(frozen=True)
class Line:
    """The code that fulfils a wish."""

    code: str


class PythonLine(DrawnTask[Line]):
    name = "python"

    def question(self, rng: random.Random) -> Question[Line]:
        return self.ask(rng, rng.randrange(len(RECIPES)))

    def ask(
        self, rng: random.Random, recipe: int, frames: tuple[str, ...] = FRAMES
    ) -> Question[Line]:
        """A question that the given line answers, with values drawn at random."""
        wishes, line = RECIPES[recipe]
        slots = _values(rng)
        wish = rng.choice(wishes)
        answer = line.format(**slots)
        shown = dict(slots)
        if rng.random() < 0.25:
            shown["text"] = slots["text"].strip('"')
        prompt = phrase(rng, rng.choice(frames).replace("{w}", wish), is_case_kept=True, **shown)
        if rng.random() < 0.4:
            prompt = prompt[0].lower() + prompt[1:].replace("Python", "python")
        else:
            prompt = re.sub(r"\bpython\b", "Python", prompt)
        fixed = f":{prompt.lower()}" if "{" not in line.replace("{{", "") else ""
        key = f"python:{answer}{fixed}"
        return Question(self.name, prompt, fenced(answer), key, Line(answer))

    def grade(self, question: Question[Line], answer: str) -> Grade:
        """The same syntax tree as the reference: spacing and quotes do not matter. The code is the
        whole response, or stands in one fence or one pair of backquotes with nothing beside it.
        """
        if len(answer) > MAX_CHARACTERS:
            return wrong(TOO_LONG)
        if not (code := _code(answer)):
            return wrong(NO_ANSWER)
        found = _tree(code)
        if found is None:
            return wrong("It is no Python, or not by itself.")
        return (
            RIGHT if found == _tree(question.facts.code) else wrong("The code does another thing.")
        )


def _values(rng: random.Random) -> dict[str, str]:
    n, a = rng.choice((5, 10, 10, 15, 20, 25, 30, 50, 100, rng.randint(3, 99))), rng.randint(2, 30)
    b = a + rng.randint(3, 30)
    numbers = [str(rng.randint(1, 20)) for _ in range(rng.randint(3, 5))]
    words = [f'"{rng.choice(common_words())}"' for _ in range(rng.choice((2, 3, 3, 4)))]
    text = rng.choice(TEXTS)
    if rng.random() < 0.6:
        text = " ".join(rng.choice(common_words()) for _ in range(rng.choice((1, 1, 2))))
    return {
        "n": str(n), "n1": str(n + 1), "a": str(a), "b": str(b), "b1": str(b + 1),
        "d": str(rng.randint(2, 12)), "k": str(rng.randint(2, 10)),
        "name": rng.choice(GIRLS + BOYS),
        "text": f'"{text}"', "list": f"[{', '.join(numbers)}]",
        "words": f"[{', '.join(words)}]", "l": rng.choice("aeiorn"),
    }  # fmt: skip


def _code(text: str) -> str:
    text = text.strip()
    fence = re.fullmatch(r"```(?:python)?\s([^`]*)```|`([^`]+)`", text)
    return (fence[1] or fence[2] or "" if fence else text).strip()


def _tree(code: str) -> str | None:
    try:
        return ast.dump(ast.parse(code))
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: deep nests
        return None
