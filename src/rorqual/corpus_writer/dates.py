"""Days and months: small tables, and counting N days on by its remainder after whole weeks."""

from __future__ import annotations

import calendar
import random
from dataclasses import dataclass

from rorqual.corpus_writer.phrasing import canonical, phrase
from rorqual.corpus_writer.skill import Skill
from rorqual.tasks import Question
from rorqual.tasks.answers import Forms, any_of, exactly

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = tuple(calendar.month_name)[1:]
ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth",
    "tenth", "eleventh", "twelfth",
)  # fmt: skip

DAYS_AFTER = (
    "what day is {n} {unit} after {day}?", "what day comes {n} {unit} after {day}?",
    "what day of the week is {n} {unit} after {day}?", "which day is {n} {unit} after {day}?",
    "today is {day}. what day is it in {n} {unit}?", "{n} {unit} after {day}",
    "if today is {day}, what day will it be in {n} {unit}?", "{day} + {n} {unit}",
    "it is {day}. what day will it be in {n} {unit}?", "{n} {unit} from {day} is what day?",
    "if it is {day} today, which day is it {n} {unit} later?", "{day} plus {n} {unit}",
)  # fmt: skip
DAYS_BEFORE = (
    "what day is {n} {unit} before {day}?", "what day was {n} {unit} before {day}?",
    "what day of the week is {n} {unit} before {day}?", "which day is {n} {unit} before {day}?",
    "today is {day}. what day was it {n} {unit} ago?", "{n} {unit} before {day}",
    "if today is {day}, what day was it {n} {unit} ago?", "{day} minus {n} {unit}",
    "it is {day}. which day was {n} {unit} ago?", "{day} - {n} {unit}",
)  # fmt: skip
NEXT = (
    "what comes after {x}?", "what {kind} comes after {x}?", "which {kind} follows {x}?",
    "what is the {kind} after {x}?", "what's after {x}?", "the {kind} after {x}",
    "which {kind} is next after {x}?", "what {kind} is after {x}?", "after {x} comes what {kind}?",
)  # fmt: skip
PREVIOUS = (
    "what comes before {x}?", "what {kind} comes before {x}?", "what is the {kind} before {x}?",
    "which {kind} is before {x}?", "what's before {x}?", "the {kind} before {x}",
    "what {kind} is before {x}?", "which {kind} comes right before {x}?",
)  # fmt: skip
TOMORROW = (
    "today is {x}. what day is tomorrow?", "if today is {x}, what is tomorrow?",
    "it is {x} today. what day is tomorrow?", "if today is {x} what day is tomorrow?",
)  # fmt: skip
YESTERDAY = (
    "today is {x}. what day was yesterday?", "if today is {x}, what was yesterday?",
    "it is {x} today. what day was it yesterday?", "if today is {x} what day was yesterday?",
)  # fmt: skip
LENGTH = (
    "how many days are in {x}?", "how many days does {x} have?", "how many days are there in {x}?",
    "how long is {x}?", "how many days in {x}?", "number of days in {x}", "days in {x}",
    "what is the number of days in {x}?", "!tell me how many days {x} has",
    "how many days has {x} got?", "does {x} have 30 or 31 days?",
)  # fmt: skip
NUMBER = (
    "which month number is {x}?", "what number month is {x}?", "what number is {x}?",
    "what is the number of {x}?", "{x} is which month of the year?", "month number of {x}",
    "what is the month number of {x}?",
)  # fmt: skip
NTH = (
    "what is the {n} month?", "what is the {n} month of the year?", "which month is the {n}?",
    "what's the {n} month?", "!name the {n} month", "the {n} month of the year",
    "which is the {n} month of the year?", "what month is month number {i}?", "what is month {i}?",
)  # fmt: skip
LEAP = (
    "is {y} a leap year?", "was {y} a leap year?", "will {y} be a leap year?", "{y} leap year?",
    "does {y} have 366 days?", "!tell me if {y} is a leap year", "is the year {y} a leap year?",
)  # fmt: skip
LISTS = (
    ("days", "!list the days of the week"), ("days", "!name the days of the week"),
    ("days", "what are the days of the week?"), ("days", "days of the week"),
    ("days", "which days are in a week?"), ("days", "!say the days of the week in order"),
    ("months", "!list the months of the year"), ("months", "!name the months"),
    ("months", "what are the months of the year?"), ("months", "months of the year"),
    ("months", "!name the twelve months"), ("months", "!say the months in order"),
    ("count", "how many days are in a week?"), ("count", "how many days in a week?"),
    ("year", "how many months are in a year?"), ("year", "how many months in a year?"),
    ("year", "how many months does a year have?"), ("count", "how many days does a week have?"),
    ("long", "how many days are in a year?"), ("long", "how many days in a year?"),
    ("long", "how many days does a year have?"),
)  # fmt: skip
LIST_ANSWERS = {
    "days": f"The days are {', '.join(DAYS[:-1])} and {DAYS[-1]}.",
    "months": f"The months are {', '.join(MONTHS[:-1])} and {MONTHS[-1]}.",
    "count": "A week has 7 days.",
    "year": "A year has 12 months.",
    "long": "A year has 365 days, and a leap year has 366.",
}
_LIST_FORMS = {
    "days": r"(?:the days(?: of the week)? are )?" + r"(?:, ?(?:and )?| and )".join(DAYS).lower(),
    "months": r"(?:the months(?: of the year)? are )?"
    + r"(?:, ?(?:and )?| and )".join(MONTHS).lower(),
    "count": r"(?:a week has )?7(?: days)?",
    "year": r"(?:a year has )?12(?: months)?",
    "long": r"(?:a year has )?365(?: days)?(?:, and a leap year has 366(?: days)?)?",
}


def day_working(day: str, count: int, step: int) -> str:
    """`17 = 2x7 + 3. After Monday: Tuesday, Wednesday, Thursday. Answer: Thursday`"""
    weeks, rest = divmod(count, 7)
    start = DAYS.index(day)
    passed = [DAYS[(start + step * i) % 7] for i in range(1, rest + 1)]
    head = f"{count} = {weeks}x7 + {rest}. " if count >= 7 else ""
    if not passed:
        return f"{head}Whole weeks bring the same day. Answer: {day}"
    side = "After" if step > 0 else "Before"
    return f"{head}{side} {day}: {', '.join(passed)}. Answer: {passed[-1]}"


@dataclass(frozen=True)
class DayCount:
    """The day that is `count` days after `day` (step 1) or before it (step -1)."""

    day: str
    count: int
    step: int

    @property
    def result(self) -> str:
        return DAYS[(DAYS.index(self.day) + self.step * self.count) % 7]


@dataclass(frozen=True)
class Neighbour:
    """The day or month that comes after `name` (step 1) or before it (step -1)."""

    name: str
    step: int
    is_follow_up: bool = False  # "and then?": a conversation goes on from there no further

    @property
    def result(self) -> str:
        names = DAYS if self.name in DAYS else MONTHS
        return names[(names.index(self.name) + self.step) % len(names)]


@dataclass(frozen=True)
class MonthLength:
    """How many days a month has: 28 for February, which is told of leap years too."""

    month: str
    is_follow_up: bool = False

    @property
    def result(self) -> int:
        return calendar.monthrange(2023, MONTHS.index(self.month) + 1)[1]


@dataclass(frozen=True)
class MonthNumber:
    """The number of a month, or the month of a number."""

    month: str
    is_month_given: bool

    @property
    def number(self) -> int:
        return MONTHS.index(self.month) + 1


@dataclass(frozen=True)
class LeapYear:
    """Whether a year is a leap year."""

    year: int


@dataclass(frozen=True)
class Listing:
    """One of LIST_ANSWERS."""

    kind: str


DateFacts = DayCount | Neighbour | MonthLength | MonthNumber | LeapYear | Listing


class Dates(Skill[DateFacts]):
    name = "dates"

    def question(self, rng: random.Random) -> Question[DateFacts]:
        (make,) = rng.choices(
            (self._count, self._neighbour, self._length, self._number, self._leap, self._list),
            (46, 18, 10, 10, 10, 6),
        )
        return make(rng)

    def forms(self, question: Question[DateFacts]) -> Forms:
        """A day, month or number alone, or in the sentence that training has for it."""
        asked, gold, noun = question.facts, exactly(question.answer), "number"
        match asked:
            case DayCount() | Neighbour():
                name = asked.result.lower()
                return Forms(name, any_of((name, gold)), "name")
            case Listing():
                whole, noun = _LIST_FORMS[asked.kind], "answer"
            case LeapYear():
                whole, noun = _leap_form(asked.year), "answer"
            case MonthLength("February"):
                whole = gold
            case MonthLength():
                whole = rf"(?:{asked.month.lower()} has )?{asked.result}(?: days)?"
            case MonthNumber(is_month_given=True):
                month = asked.month.lower()
                whole = rf"(?:{month} is )?(?:month )?{asked.number}|{gold}"
            case MonthNumber():
                whole = rf"{asked.month.lower()}(?: is month {asked.number} of the year)?"
                noun = "name"
        return Forms(whole, whole, noun)

    def _count(self, rng: random.Random) -> Question[DateFacts]:
        day, count = rng.choice(DAYS), rng.randint(2, 60) if rng.random() < 0.6 else 0
        count = count or rng.randint(2, 20)
        step = rng.choice((1, 1, -1))
        template = rng.choice(DAYS_AFTER if step > 0 else DAYS_BEFORE)
        prompt = phrase(rng, template, n=count, day=day, unit="days")
        key = f"dates:count:{day}:{step * count}"
        answer = day_working(day, count, step)
        return Question(self.name, prompt, answer, key, DayCount(day, count, step))

    def _neighbour(self, rng: random.Random) -> Question[DateFacts]:
        kind, names = rng.choice((("day", DAYS), ("month", MONTHS)))
        step = rng.choice((1, -1))
        here = rng.randrange(len(names))
        facts = Neighbour(names[here], step)
        templates: tuple[str, ...] = NEXT if step > 0 else PREVIOUS
        if kind == "day" and rng.random() < 0.3:
            templates = TOMORROW if step > 0 else YESTERDAY
        template = rng.choice(templates)
        prompt = phrase(rng, template, x=names[here], kind=kind)
        answer = f"{facts.result} comes {'after' if step > 0 else 'before'} {facts.name}."
        key = f"dates:next:{canonical(template, x=names[here], kind=kind)}"
        return Question(self.name, prompt, answer, key, facts)

    def _length(self, rng: random.Random) -> Question[DateFacts]:
        number = rng.randint(1, 12)
        month = MONTHS[number - 1]
        template = rng.choice(LENGTH[:-1] if number == 2 else LENGTH)
        facts = MonthLength(month)
        answer = f"{month} has {facts.result} days."
        if number == 2:
            answer = "February has 28 days, or 29 in a leap year."
        key = f"dates:length:{canonical(template, x=month)}"
        return Question(self.name, phrase(rng, template, x=month), answer, key, facts)

    def _number(self, rng: random.Random) -> Question[DateFacts]:
        number = rng.randint(1, 12)
        month = MONTHS[number - 1]
        if rng.random() < 0.5:
            template = rng.choice(NUMBER)
            answer = f"{month} is month {number} of the year."
            key, facts = f"dates:number:{canonical(template, x=month)}", MonthNumber(month, True)
            return Question(self.name, phrase(rng, template, x=month), answer, key, facts)
        template = rng.choice(NTH)
        ending = {1: "st", 2: "nd", 3: "rd"}.get(number, "th")
        short = rng.choice((ORDINALS[number - 1], f"{number}{ending}"))
        prompt = phrase(rng, template, n=short, i=number)
        answer = f"{month} is month {number} of the year."
        key = f"dates:number:{canonical(template, n=short, i=number)}"
        return Question(self.name, prompt, answer, key, MonthNumber(month, False))

    def _leap(self, rng: random.Random) -> Question[DateFacts]:
        year = rng.randint(1901, 2099)
        if rng.random() < 0.3:
            year = year // 4 * 4 if year >= 1904 else 1904
        last = year % 100
        quotient, rest = divmod(last, 4)
        verdict = "is" if rest == 0 else "is not"
        answer = (
            f"The last two digits are {last:02}. {last:02}/4={quotient} r {rest}. "
            f"{'Yes' if rest == 0 else 'No'}, {year} {verdict} a leap year."
        )
        prompt = phrase(rng, rng.choice(LEAP), y=year)
        return Question(self.name, prompt, answer, f"dates:leap:{year}", LeapYear(year))

    def _list(self, rng: random.Random) -> Question[DateFacts]:
        kind, template = rng.choice(LISTS)
        key = f"dates:list:{kind}:{canonical(template)}"
        prompt = phrase(rng, template)
        return Question(self.name, prompt, LIST_ANSWERS[kind], key, Listing(kind))


def _leap_form(year: int) -> str:
    is_leap = calendar.isleap(year)
    working = r"(?:the last two digits are [0-9]{2}\. [0-9]{2}/4=[0-9]+ r [0-9]\. )?"
    said, verb = ("yes", "is") if is_leap else ("no", "is not")
    return rf"{working}{said}(?:, {year} {verb} a leap year)?"
