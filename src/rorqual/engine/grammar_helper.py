"""A process that tries grammars out: one that takes too long, or ends its process, ends only this.

Its parent is `grammar_trial.py`, which speaks first: a vocabulary, then grammars.

It is run as a file, without the package: starting takes a fifth of a second. It ends with its
parent, at the latest when the pipe between them is closed.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

WALK_TOKENS = 4
NICE = 5
LENGTH_BYTES = 8
MAX_TOKEN_BYTES = 32


def main() -> None:
    messages: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_read, args=(messages,), daemon=True).start()
    import llguidance

    tokens = llguidance.LLTokenizer(Vocabulary(messages.get()))  # type: ignore[arg-type]
    _bound_memory_and_rank()
    while True:
        job = messages.get()
        _bound_seconds(job["seconds"])
        limits = llguidance.LLParserLimits(**job["limits"])
        matcher = llguidance.LLMatcher(tokens, job["grammar"], log_level=0, limits=limits)
        _write({"problem": _problem(matcher, job["mask_seconds"])})


def _problem(matcher: Any, mask_seconds: float) -> str | None:
    """What is wrong with a grammar: it does not compile, matches nothing, or its first tokens take
    too long to find (each of them holds up everybody's answers).
    """
    if matcher.is_error():
        return str(matcher.get_error())
    for number in range(WALK_TOKENS):
        start = time.process_time()
        allowed = int.from_bytes(matcher.compute_bitmask(), "little")
        seconds = time.process_time() - start
        if matcher.is_error() or (not allowed and not number):
            return f"it matches no text. {matcher.get_error()}"
        if seconds > mask_seconds:
            return f"a token takes {seconds:.2f} s to choose; at most {mask_seconds:g} s"
        if not allowed or matcher.is_stopped():
            return None
        lowest = (allowed & -allowed).bit_length() - 1
        if not matcher.consume_token(lowest) and matcher.is_error():
            return str(matcher.get_error())
    return None


class Vocabulary:
    """What llguidance reads of a tokenizer: bytes of each id, and which are special."""

    is_tokenizer_wrapper = True

    def __init__(self, message: dict[str, Any]) -> None:
        self.tokens = [token.encode("latin-1") for token in message["tokens"]]
        self.eos_token_id, self.bos_token_id = message["eos_id"], message["bos_id"]
        self.special_token_ids = message["special_ids"]
        special = set(self.special_token_ids)
        self._id_of = {t: i for i, t in enumerate(self.tokens) if i not in special}

    def __call__(self, text: str | bytes) -> list[int]:
        """Ids of a text, greedily the longest token that fits: good enough to try a grammar."""
        content = text.encode() if isinstance(text, str) else text
        ids = []
        while content:
            sizes = range(min(len(content), MAX_TOKEN_BYTES), 0, -1)
            size = next((size for size in sizes if content[:size] in self._id_of), 0)
            if size:
                ids.append(self._id_of[content[:size]])
            content = content[size or 1 :]
        return ids


def _bound_memory_and_rank() -> None:
    """Lowers this process's priority below the server's; no core file, and little memory."""
    with suppress(AttributeError, OSError):
        os.nice(NICE)
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))


def _bound_seconds(seconds: int) -> None:
    """Of processor time from now on: then the system ends the process."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + seconds, hard))


def _read(messages: SimpleQueue[Any]) -> None:
    stream = sys.stdin.buffer
    while len(head := stream.read(LENGTH_BYTES)) == LENGTH_BYTES:
        messages.put(json.loads(stream.read(int.from_bytes(head, "big"))))
    os._exit(0)  # the parent is gone, or wants no more


def _write(message: Any) -> None:
    content = json.dumps(message).encode()
    sys.stdout.buffer.write(len(content).to_bytes(LENGTH_BYTES, "big") + content)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
