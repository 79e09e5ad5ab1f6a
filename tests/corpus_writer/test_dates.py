"""Oracle: the standard library's `datetime` and `calendar`."""

import calendar
import datetime
import random
import re

from rorqual.corpus_writer.dates import DAYS, MONTHS, Dates, day_working


def test_counted_days_equal_datetime() -> None:
    start = datetime.date(2024, 1, 1)  # a Monday
    for index, day in enumerate(DAYS):
        for count in range(1, 80):
            for step in (1, -1):
                there = start + datetime.timedelta(days=index + step * count)
                working, answer = day_working(day, count, step).rsplit("Answer: ", 1)
                assert answer == there.strftime("%A")
                weeks = f"{count} = {count // 7}x7 + {count % 7}. "
                assert working.startswith(weeks) == (count >= 7)


def test_months_and_leap_years_equal_calendar() -> None:
    rng, skill = random.Random(0), Dates()
    seen = set()
    for _ in range(5000):
        question = skill.question(rng)
        kind = question.key.split(":")[1]
        seen.add(kind)
        if kind == "leap":
            year = int(question.key.split(":")[2])
            assert ("Yes" in question.answer) == calendar.isleap(year)
        elif kind == "length":
            month = MONTHS.index(question.answer.split()[0]) + 1
            days = int(re.findall(r"\d+", question.answer)[0])
            assert days == calendar.monthrange(2023, month)[1]
        elif kind == "number":
            month_name, number = question.answer.split()[0], re.findall(r"\d+", question.answer)[0]
            assert calendar.month_name[int(number)] == month_name
    assert {"leap", "length", "number", "count", "next", "list"} <= seen


def test_every_month_neighbour_is_right() -> None:
    rng, skill = random.Random(2), Dates()
    for _ in range(4000):
        question = skill.question(rng)
        match = re.fullmatch(r"(\w+) comes (after|before) (\w+)\.", question.answer)
        if not match:
            continue
        names = DAYS if match[1] in DAYS else MONTHS
        step = 1 if match[2] == "after" else -1
        assert names[(names.index(match[3]) + step) % len(names)] == match[1]
