"""How people really ask: templates filled in and then varied in case, punctuation and manners.

A template is lower-case text with `{slots}`. A leading `!` marks an imperative, which may gain a
"please" or a "can you"; a trailing `?` marks a question; anything else is left bare. Only the frame
is ever misspelt: the slots carry the task.
"""

from __future__ import annotations

import random
import re

_OPENERS = ("hey, ", "ok, ", "hi, ", "so ", "tell me, ", "quick question: ", "now ", "hello, ")
_FOLLOWING = ("and ", "now ", "what about", "how about", "{x}", "backwards")
_FRAME_WORD = re.compile(r"(?<![{\w'])[a-z]{5,}(?![}\w'])")
_STRICT_FRAME = frozenset(("python", "spell", "story", "smaller", "larger", "before", "after"))
TYPO_RATE = 0.04


def canonical(template: str, **slots: object) -> str:
    """What a template asks, without case, marks and manners: one key for all its surfaces."""
    text = template.lstrip("!").rstrip("?.!").format(**slots).lower()
    return re.sub(r"^(please|can you) ", "", text)


def phrase(
    rng: random.Random, template: str, *, is_case_kept: bool = False, **slots: object
) -> str:
    """Fills `template` and varies its surface; `is_case_kept` guards code and names."""
    text = template.lstrip("!")
    if rng.random() < TYPO_RATE:
        text = _misspell(rng, text)
    roll = rng.random()
    if template.startswith("!"):
        if roll < 0.16:
            text = f"please {text}"
        elif roll < 0.24:
            text = f"{text} please"
        elif roll < 0.38:
            text = f"{rng.choice(('can', 'could', 'can', 'will'))} you {text}?"
    elif template.endswith("?") and roll < 0.08 and not template.startswith(_FOLLOWING):
        text = rng.choice(_OPENERS) + text
    return _surface(rng, text.format(**slots), is_case_kept)


def _surface(rng: random.Random, text: str, is_case_kept: bool) -> str:
    roll = rng.random()
    if roll < 0.40:
        text = text if is_case_kept else text.lower()
        return text if roll < 0.12 else _strip(text)
    text = text[0].upper() + text[1:]
    if roll < 0.52:
        return _strip(text)
    if text[-1].isalpha() and rng.random() < 0.5:
        text += "."
    return text


def _strip(text: str) -> str:
    return text.rstrip("?.!, ") or text


def _misspell(rng: random.Random, text: str) -> str:
    words = [m for m in _FRAME_WORD.finditer(text) if m.group() not in _STRICT_FRAME]
    if not words:
        return text
    word = rng.choice(words)
    at = word.start() + rng.randrange(1, len(word.group()) - 2)
    if rng.random() < 0.5:
        return text[:at] + text[at + 1 :]
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
