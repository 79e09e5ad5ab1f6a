"""Sums with a working that makes each step a table look-up.

The problem is written again with both numbers at one width, so every digit stands at a fixed
distance from the column that uses it; then columns go from the right with the carry written out, as
a scratchpad (arXiv 2112.00114) in the reversed order that small transformers learn (arXiv
2307.03381). One-digit facts, and products up to 12 x 12, are answered at once.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from rorqual.corpus_writer.phrasing import canonical, phrase
from rorqual.corpus_writer.skill import Beyond, Skill
from rorqual.tasks import Question
from rorqual.tasks.answers import Forms, any_of, exactly, number

LIMIT_ANSWER = (
    "That sum is beyond me. I can add and subtract whole numbers up to 999, "
    "and multiply or divide them by one digit."
)
ZERO_ANSWER = "You cannot divide by zero."

ASKS = (
    "{e}", "{e}", "{e}", "{e} =", "{e} = ?", "what is {e}?", "what is {e}?", "what's {e}?",
    "whats {e}?", "how much is {e}?", "what does {e} make?", "!calculate {e}", "!compute {e}",
    "!work out {e}", "!solve {e}", "!tell me {e}", "what do you get for {e}?",
    "do you know what {e} is?", "!give me the answer to {e}", "i need to know {e}",
)  # fmt: skip
ADD = (
    "{a} + {b}", "{a} + {b}", "{a}+{b}", "{a}+{b}", "{a} plus {b}", "{a} and {b} together",
)  # fmt: skip
ADD_ASKS = (
    "!add {a} and {b}", "!add {a} to {b}", "what is the sum of {a} and {b}?",
    "what do i get if i add {a} and {b}?", "!find the sum of {a} and {b}",
    "i have {a} {things} and get {b} more. how many {things} do i have?",
    "{name} has {a} {things} and buys {b} more. how many {things} does {name} have?",
    "there are {a} {things} in one box and {b} in another. how many in all?",
    "what is {a} more than {b}?",
)  # fmt: skip
SUBTRACT = (
    "{a} - {b}", "{a} - {b}", "{a}-{b}", "{a}-{b}", "{a} minus {b}", "{a} take away {b}",
)  # fmt: skip
SUBTRACT_ASKS = (
    "!subtract {b} from {a}", "!take {b} away from {a}", "!take {b} from {a}",
    "what is left if i take {b} from {a}?", "what is {b} less than {a}?",
)  # fmt: skip
SUBTRACT_STORIES = (
    "i have {a} {things} and give away {b}. how many {things} are left?",
    "{name} has {a} {things} and loses {b}. how many {things} are left?",
    "what is the difference between {a} and {b}?",
    "how much more is {a} than {b}?",
)
MULTIPLY = (
    "{a} x {b}", "{a} x {b}", "{a}x{b}", "{a} * {b}", "{a}*{b}", "{a} times {b}", "{a} times {b}",
    "{a} multiplied by {b}", "{a} × {b}",
)  # fmt: skip
MULTIPLY_ASKS = (
    "!multiply {a} by {b}",
    "!multiply {a} and {b}",
    "what is the product of {a} and {b}?",
    "{b} boxes have {a} {things} each. how many {things} are there?",
    "how many {things} are in {b} bags of {a} {things}?",
)
DOUBLE_ASKS = ("!double {a}", "what is double {a}?", "what is twice {a}?", "twice {a}")
TRIPLE_ASKS = ("!triple {a}", "what is three times {a}?", "what is triple {a}?")
HALF_ASKS = ("what is half of {a}?", "half of {a}", "!halve {a}")
DIVIDE = (
    "{a} / {b}", "{a} / {b}", "{a}/{b}", "{a} divided by {b}", "{a} divided by {b}", "{a} ÷ {b}",
)  # fmt: skip
DIVIDE_ASKS = (
    "!divide {a} by {b}", "how many times does {b} go into {a}?",
    "!share {a} {things} among {b} children", "!split {a} into {b} equal parts",
)  # fmt: skip
BEYOND = (
    "{a}.{b} + {c}", "{a}.{b} x {c}", "{a} - {c}.{b}", "{a}^{b}", "{a} to the power of {b}",
    "the square root of {a}", "sqrt({a})", "{a} percent of {b}", "{a}% of {b}", "{a}/{b} + {c}/{a}",
    "{a} squared", "{a} * {b} + {c}", "({a} + {b}) * {c}", "-{a} + {b}", "{a} mod {b}",
    "{a} x {b} x {c}", "the cube of {a}", "log {a}", "sin({a})", "x + {a} = {b}",
)  # fmt: skip
THINGS = (
    "apples", "books", "coins", "eggs", "cards", "stamps", "pens", "balls", "shells", "sweets",
    "cookies", "stickers", "marbles", "flowers", "toys", "nuts",
)  # fmt: skip
NAMES = ("Tom", "Anna", "Ben", "Lily", "Sam", "Mia", "Max", "Emma", "Leo", "Sara", "Jack", "Nina")


@dataclass(frozen=True)
class Sum:
    """`a operator b`, or `a + b + c`; operators are + - x /."""

    operator: str
    numbers: tuple[int, ...]

    @property
    def result(self) -> tuple[int, int] | None:
        """Quotient and remainder (0 but for "/"); None where zero divides."""
        if len(self.numbers) > 2:
            return sum(self.numbers), 0
        a, b = self.numbers
        if self.operator == "/":
            return divmod(a, b) if b else None
        return {"+": a + b, "-": a - b, "x": a * b}[self.operator], 0

    @property
    def is_recalled(self) -> bool:
        """Whether it is known at once, without a working in columns."""
        if len(self.numbers) > 2:
            return False
        a, b = self.numbers
        if self.operator == "/":
            return b > 0 and a < 10 and a % b == 0
        if self.operator == "x":
            return (a <= 12 and b <= 12) or 10 in (a, b)
        return a < 10 and b < 10


def add_working(a: int, b: int) -> str:
    """`47 + 85: 7+5=12, write 2 carry 1; 4+8+1=13. Answer: 132`"""
    if Sum("+", (a, b)).is_recalled:
        return f"{a} + {b} = {a + b}"
    width = max(len(str(a)), len(str(b)))
    steps, carry = [], 0
    for place in range(width):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        steps.append(f"{x}+{y}={total}" if place == 0 else f"{x}+{y}+{carry}={total}")
        carry = total // 10
        if place < width - 1:
            steps[-1] += f", write {total % 10} carry {carry}"
    return f"{a:0{width}} + {b:0{width}}: {'; '.join(steps)}. Answer: {a + b}"


def subtract_working(a: int, b: int) -> str:
    """`52 - 38: 12-8=4 borrow 1; 5-3-1=1. Answer: 14`"""
    if Sum("-", (a, b)).is_recalled:
        return f"{a} - {b} = {a - b}"
    if a < b:
        return f"{a} is less than {b}. " + _subtract_columns(b, a, sign="-")
    return _subtract_columns(a, b, sign="")


def _subtract_columns(a: int, b: int, sign: str) -> str:
    width = len(str(a))
    steps, borrow = [], 0
    for place in range(width):
        x, y = a // 10**place % 10, b // 10**place % 10
        taken = f"{y}" if place == 0 else f"{y}-{borrow}"
        borrow = int(x < y + (borrow if place else 0))
        top = x + 10 * borrow
        left = top - sum(int(part) for part in taken.split("-"))
        steps.append(f"{top}-{taken}={left}")
        if place < width - 1:
            steps[-1] += f" borrow {borrow}"
    return f"{a} - {b:0{width}}: {'; '.join(steps)}. Answer: {sign}{a - b}"


def multiply_working(a: int, b: int) -> str:
    """`47 x 6: 7x6=42, write 2 carry 4; 4x6=24, 24+4=28. Answer: 282`"""
    if Sum("x", (a, b)).is_recalled:
        return f"{a} x {b} = {a * b}"
    if b > 9:
        a, b = b, a
    if b > 9:
        raise ValueError(f"{a} x {b}: one factor must have one digit")
    width = len(str(a))
    steps, carry = [], 0
    for place in range(width):
        digit = a // 10**place % 10
        total = digit * b + carry
        step = f"{digit}x{b}={digit * b}"
        if place:
            step += f", {digit * b}+{carry}={total}"
        carry = total // 10
        if place < width - 1:
            step += f", write {total % 10} carry {carry}"
        steps.append(step)
    return f"{a} x {b}: {'; '.join(steps)}. Answer: {a * b}"


def divide_working(a: int, b: int) -> str:
    """`84 / 3: 8/3=2 r 2; 24/3=8 r 0. Answer: 28`, by long division from the left."""
    if Sum("/", (a, b)).is_recalled:
        return f"{a} / {b} = {a // b}"
    steps, rest = [], 0
    for digit in str(a):
        part = rest * 10 + int(digit)
        quotient, rest = divmod(part, b)
        steps.append(f"{part}/{b}={quotient} r {rest}")
    answer = f"{a // b}" if rest == 0 else f"{a // b} remainder {rest}"
    return f"{a} / {b}: {'; '.join(steps)}. Answer: {answer}"


def sum_key(kind: str, a: int, b: int) -> str:
    """The split's key: a + b and b + a are one item, and so are a - b and b - a."""
    low, high = sorted((a, b))
    return f"arithmetic:{kind}:{high},{low}" if kind != "/" else f"arithmetic:/:{a},{b}"


class Arithmetic(Skill[Sum | Beyond]):
    name = "arithmetic"

    def question(self, rng: random.Random) -> Question[Sum | Beyond]:
        (make,) = rng.choices(
            (self._add, self._subtract, self._multiply, self._divide, self._chain, self._limit),
            (34, 30, 20, 12, 2, 2),
        )
        return make(rng)

    def forms(self, question: Question[Sum | Beyond]) -> Forms | None:
        """The number, alone or after the sum and "="."""
        asked = question.facts
        if isinstance(asked, Beyond):
            return None
        if asked.result is None:
            return Forms(exactly(ZERO_ANSWER), exactly(ZERO_ANSWER))
        quotient, rest = asked.result
        final = number(quotient) + (rf",? (?:r|remainder) {rest}" if rest else "")
        return Forms(final, f"(?:{_equation(asked)} ?= ?)?{final}", "number")

    def _add(self, rng: random.Random) -> Question[Sum | Beyond]:
        a, b = _operands(rng)
        return self._ask(rng, "+", a, b, add_working(a, b), ADD, ADD_ASKS)

    def _subtract(self, rng: random.Random) -> Question[Sum | Beyond]:
        a, b = _operands(rng)
        if a < b and rng.random() < 0.8:
            a, b = b, a
        asks = SUBTRACT_ASKS + SUBTRACT_STORIES if a > b else SUBTRACT_ASKS
        return self._ask(rng, "-", a, b, subtract_working(a, b), SUBTRACT, asks)

    def _multiply(self, rng: random.Random) -> Question[Sum | Beyond]:
        roll = rng.random()
        if roll < 0.3:
            a, b = rng.randint(0, 12), rng.randint(0, 12)
        elif roll < 0.36:
            a, b = rng.randint(1, 99), 10
        elif roll < 0.8:
            a, b = rng.randint(11, 99), rng.choice((*range(10), *range(2, 10)))
        else:
            a, b = rng.randint(100, 999), rng.randint(2, 9)
        working = multiply_working(a, b)
        if b in (2, 3) and rng.random() < 0.25:
            asks: tuple[str, ...] = DOUBLE_ASKS if b == 2 else TRIPLE_ASKS
            return self._ask(rng, "x", a, b, working, MULTIPLY, asks, rate=1.0)
        if rng.random() < 0.3:
            if a <= 12 and b <= 12:
                working = multiply_working(b, a)
            return self._ask(rng, "x", b, a, working, MULTIPLY, MULTIPLY_ASKS[:3])
        return self._ask(rng, "x", a, b, working, MULTIPLY, MULTIPLY_ASKS)

    def _divide(self, rng: random.Random) -> Question[Sum | Beyond]:
        b = rng.choice((1, *range(2, 10), *range(2, 10)))
        if rng.random() < 0.02:
            a = rng.randint(1, 99)
            return self._ask(rng, "/", a, 0, ZERO_ANSWER, DIVIDE, DIVIDE_ASKS[:1])
        roll = rng.random()
        if roll < 0.12:
            a = b * rng.randint(1, 9 // b)
        elif roll < 0.7:
            a = b * rng.randint(-(-10 // b), 99 // b)
        elif roll < 0.82:
            a = rng.randint(1, 99)
        else:
            a = b * rng.randint(-(-100 // b), 999 // b)
        asks = DIVIDE_ASKS if a % b == 0 else DIVIDE_ASKS[:2]
        if b == 2 and a % 2 == 0 and rng.random() < 0.3:
            return self._ask(rng, "/", a, b, divide_working(a, b), DIVIDE, HALF_ASKS, rate=1.0)
        return self._ask(rng, "/", a, b, divide_working(a, b), DIVIDE, asks)

    def _chain(self, rng: random.Random) -> Question[Sum | Beyond]:
        a, b, c = (rng.randint(1, 9) for _ in range(3))
        answer = f"{a} + {b} = {a + b}. {a + b} + {c} = {a + b + c}"
        text = rng.choice(("{a} + {b} + {c}", "{a}+{b}+{c}", "{a} plus {b} plus {c}"))
        expression = text.format(a=a, b=b, c=c)
        prompt = phrase(rng, rng.choice(ASKS), e=expression)
        key = f"arithmetic:chain:{a},{b},{c}"
        return Question(self.name, prompt, answer, key, Sum("+", (a, b, c)))

    def _limit(self, rng: random.Random) -> Question[Sum | Beyond]:
        operator = rng.choice("+-xx/o")
        if operator == "o":
            values = {each: rng.randint(2, 99) for each in "abc"}
            form = rng.choice(BEYOND).format(**values)
            prompt = phrase(rng, rng.choice(ASKS), e=form)
            key = f"arithmetic:beyond:{form}"
            return Question(self.name, prompt, LIMIT_ANSWER, key, Beyond(form))
        if operator == "x":
            a, b = rng.randint(13, 9999), rng.randint(13, 999)
        elif operator == "/":
            a, b = rng.randint(100, 9999), rng.randint(11, 99)
        else:
            a, b = rng.randint(1000, 99999), rng.randint(100, 99999)
            if rng.random() < 0.3:
                a, b = b, a
        forms = {"+": ADD, "-": SUBTRACT, "x": MULTIPLY, "/": DIVIDE}[operator]
        return self._ask(rng, operator, a, b, LIMIT_ANSWER, forms, (), rate=0.0)

    def _ask(
        self, rng: random.Random, operator: str, a: int, b: int, answer: str,
        forms: tuple[str, ...], asks: tuple[str, ...], rate: float = 0.3,
    ) -> Question[Sum | Beyond]:  # fmt: skip
        name, things = rng.choice(NAMES), rng.choice(THINGS)
        if rng.random() < rate:
            template = rng.choice(asks)
            prompt = phrase(rng, template, a=a, b=b, name=name, things=things)
            asked = canonical(template, a=a, b=b, name="", things="")
        else:
            template, expression = rng.choice(ASKS), rng.choice(forms).format(a=a, b=b)
            prompt = phrase(rng, template, e=expression)
            asked = canonical(template, e=expression).rstrip(" =?")
        key = sum_key(operator, a, b)
        facts = Beyond(f"{a} {operator} {b}") if answer == LIMIT_ANSWER else Sum(operator, (a, b))
        if isinstance(facts, Sum) and facts.is_recalled:
            key += f":{asked}"  # a memorised fact: only its phrasing can be unseen
        return Question(self.name, prompt, answer, key, facts)


def _operands(rng: random.Random) -> tuple[int, int]:
    sizes = rng.choices(((1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)), (12, 16, 34, 8, 14, 16))
    a, b = (rng.randint(10 ** (n - 1) if n > 1 else 0, 10**n - 1) for n in sizes[0])
    return (a, b) if rng.random() < 0.7 else (b, a)


def _equation(asked: Sum) -> str:
    """The pattern of a sum as it may stand before "="; of + and x in either order."""
    if len(asked.numbers) > 2:  # as its working says it
        a, b, c = asked.numbers
        return re.escape(f"{a} + {b} = {a + b}. {a + b} + {c}")
    a, b = asked.numbers
    if asked.operator == "-" and a < b:  # its columns turn the order round
        return re.escape(f"{a} - {b}") if asked.is_recalled else ""
    sign = {"x": "[x*×]", "/": "[/÷]"}.get(asked.operator, re.escape(asked.operator))
    pairs = [(a, b), (b, a)] if asked.operator in "+x" else [(a, b)]
    return any_of(f"{one} ?{sign} ?{other}" for one, other in pairs)
