"""The rule of answers against an adversary who is paid for each answer that passes.

Oracle: cases written by hand for each skill, and each skill's own training answers, all of which
must pass. A skill without cases of its own fails here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import pytest

from rorqual.corpus_writer import SKILLS
from rorqual.corpus_writer.dates import DAYS, MONTHS
from rorqual.corpus_writer.dialogues import dialogue
from rorqual.corpus_writer.facts import CAPITALS, opposites
from rorqual.corpus_writer.refusals import is_refusal
from rorqual.tasks import Question
from rorqual.tasks.answers import MAX_CHARACTERS

NUM_QUESTIONS = 150
NUM_SEEDS = 8
FULL_WIDTH = str.maketrans("0123456789", "０１２３４５６７８９")
FOUR_SENTENCES = "It went on. There was more. All was well. It is the end."


def final_of(question: Question) -> str:
    """What a question's own answer ends in: after "Answer:", "=" or "is", or its last word."""
    return re.split(r"Answer: |= | is ", question.answer)[-1].strip(". ")


def numbers(question: Question) -> list[str]:
    final = final_of(question)
    listed = " ".join(map(str, range(1000)))
    return [
        listed,
        f"Answer: {listed}",
        f"1{final}",
        f"{final}1",
        f"-{final}",
        f"0 {final}",
        f"{final} or 7",
        f"7 or {final}",
        f"Answer: {final}. Answer: 7007",
        f"{final} = {final} + 1",
        final.translate(FULL_WIDTH) if re.search(r"\d", final) else "",
    ]


def dates(question: Question) -> list[str]:
    cases = [
        " ".join(DAYS),
        ", ".join((*DAYS, *MONTHS, *DAYS)),
        "yes no",
        "no yes",
        "Yes. No.",
        "1 2 3 4 5 6 7 8 9 10 11 12",
        "28 29 30 31",
        "30 or 31 days",
        " ".join((*MONTHS, *map(str, range(32)))),
    ]
    if ":list:" not in question.key:  # where all of them is what was asked for
        cases += [", ".join(MONTHS), ", ".join(DAYS)]
    if ":number:" in question.key and question.answer.startswith("December"):
        cases += ["December is month 3", "December is month 1 or 12"]
    return cases


def letters(question: Question) -> list[str]:
    word = question.key.split(":")[2]
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    cases = [
        alphabet,
        "-".join(alphabet),
        " ".join(map(str, range(20))),
        "yes no",
        "no. yes",
        f"{word[::-1]} {word} {word[::-1]}",
        f"Answer: {alphabet}",
        f"Answer: {word}s",
    ]
    if question.key.split(":")[1] == "spell":  # the word again is no spelling of it
        cases += [word, f"Answer: {word}", f"{word} is spelled {word}."]
    return cases if question.key.split(":")[1] == "reverse" else [*cases, word[::-1] + word]


def facts(question: Question) -> list[str]:
    every = [*CAPITALS.values(), *opposites()]
    known = [
        ", ".join(every),
        f"Answer: {', '.join(every)}",
        f"Not {final_of(question)}.",
        f"It is not true that {question.answer}",
        f"{question.answer} I do not know.",
        f"I do not know. {question.answer}",
        f"{question.answer} Or Rome.",
    ]
    return known


def python(question: Question) -> list[str]:
    code = question.answer
    return [
        f"{code}\n{code}",
        f"{code} Or:\n```python\nprint(0)\n```",
        f"Do not: {code}",
        "(" * 2000 + ")" * 2000,
        "-" * 3000 + "1",
        "not " * 900 + "1",
        "```python\n```",
    ]


def stories(question: Question) -> list[str]:
    words = question.key.split(":")[2].split(",")
    asked = " ".join(words)
    return [
        f"{asked}.",
        f"{asked}! A. B. C. D.",
        ". ".join([*words, *"ABCDE"]) + ".",
        f"{asked.capitalize()} {asked}. " * 9,
        f"{question.prompt}. {question.prompt}!",
        (f"{asked} " * 12).capitalize() + f". {FOUR_SENTENCES}",
        f"{question.answer} {question.answer}",
    ]


def about(question: Question) -> list[str]:
    every = "Hello! I am well, thank you. I am Rorqual tiny. Sums. You are welcome! I am glad. "
    every += "I am sorry. Goodbye! I am only a small program. That is beyond me. I do not know."
    return [
        every,
        "hello hi! well rorqual sums small welcome glad sorry goodbye small program",
        "Do not say that it is beyond me.",
        "I do not know anything but: 42.",
    ]


ADVERSARIES: dict[str, Callable[[Question], list[str]]] = {
    "arithmetic": numbers,
    "units": numbers,
    "numbers": lambda q: [*numbers(q), "even odd", "odd or even", "it is not " + final_of(q)],
    "dates": dates,
    "letters": letters,
    "definitions": facts,
    "capitals": facts,
    "opposites": facts,
    "python": python,
    "stories": stories,
    "about": about,
}


def everywhere(question: Question) -> list[str]:
    """Cases that no skill may take."""
    gold = question.answer
    cases = ["", " \n", ".", "Answer:", "Answer: ", question.prompt, "Answer: " * 500]
    cases += [f"Answer: {question.prompt}", f"{gold} Answer: something else"]
    cases += [f"{gold} {'x ' * MAX_CHARACTERS}", f"{' ' * MAX_CHARACTERS}{gold}"]
    if question.task != "stories":  # a story may go on
        cases.append(f"{gold}\nNo, that is wrong.")
        if "Answer:" not in gold:  # what stands before it is working
            cases.append(f"Not: {gold}")
    return cases


@pytest.mark.parametrize("name", SKILLS)
def test_no_adversary_is_paid(name: str) -> None:
    assert name in ADVERSARIES, f"write adversarial cases for {name}"
    rng, skill = random.Random(f"adversary:{name}"), SKILLS[name]
    for _ in range(NUM_QUESTIONS):
        question = skill.question(rng)
        for case in (*everywhere(question), *ADVERSARIES[name](question)):
            assert not skill.grade(question, case).is_right, (question, case[:200])


@pytest.mark.parametrize("name", SKILLS)
def test_every_answer_that_is_taught_is_right(name: str) -> None:
    skill = SKILLS[name]
    for seed in range(NUM_SEEDS):
        rng = random.Random(f"{seed}:{name}")
        for _ in range(NUM_QUESTIONS):
            question = skill.question(rng)
            gold = question.answer
            for said in (gold, f" {gold}\n", gold.replace("Answer: ", "answer: ")):
                assert skill.grade(question, said).is_right, (question, said)
            if name not in ("python", "stories"):
                for said in (gold.upper(), gold.rstrip("."), gold.rstrip(".") + "!"):
                    assert skill.grade(question, said).is_right, (question, said)


@pytest.mark.parametrize("name", SKILLS)
def test_a_wrong_answer_of_the_same_form_is_wrong(name: str) -> None:
    """Another question's answer, where it says another thing."""
    rng, skill = random.Random(f"other:{name}"), SKILLS[name]
    questions = [skill.question(rng) for _ in range(NUM_QUESTIONS)]
    num_wrong = 0
    for question, other in zip(questions, questions[1:] + questions[:1], strict=True):
        is_same_kind = question.key.split(":")[:2] == other.key.split(":")[:2]
        is_no = is_refusal(question.answer) and is_refusal(other.answer)
        if final_of(question) != final_of(other) and not is_no and name != "stories":
            if (name == "about" and is_same_kind) or (name == "dates" and not is_same_kind):
                continue  # two replies of one kind, one day asked for in two ways
            num_wrong += 1
            assert not skill.grade(question, other.answer).is_right, (question, other.answer)
    assert num_wrong > NUM_QUESTIONS / 6 or name == "stories"


def test_follow_ups_are_taught_in_forms_that_count() -> None:
    """What a conversation answers is what the skill itself would take."""
    from rorqual.corpus_writer.dialogues import _questions

    rng = random.Random(3)
    for _ in range(NUM_QUESTIONS):
        for question in _questions(rng, 4):
            assert SKILLS[question.task].grade(question, question.answer).is_right, question
    assert dialogue(rng)
