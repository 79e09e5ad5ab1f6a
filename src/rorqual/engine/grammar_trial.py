"""Trying a grammar out in a process of its own, with a limit of time, before this one takes it.

What a grammar costs cannot be told from its text: a schema of 80 characters may take a second, one
of 3,000 minutes, and some end the process that compiles them. A thread cannot be ended, a process
can. `grammar_helper.py` is what runs there.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from rorqual.engine import grammar_helper
from rorqual.engine.grammar_helper import LENGTH_BYTES
from rorqual.errors import UsageError
from rorqual.log import logger
from rorqual.tokenizer import Tokenizer

MAX_SECONDS = 2
"""Of processor time, in whole seconds: compiling, and choosing the first tokens."""
MAX_WAIT_SECONDS = 30.0
"""By the clock, on a busy machine and where no limit of processor time exists."""
MAX_MASK_SECONDS = 0.1
"""Of processor time, to find which tokens may come next: everybody's answers wait for it."""

log = logger("engine")


class TrialExpiredError(UsageError):
    """By the clock: another time it may go well."""


class GrammarTrial:
    """Helpers are started when they are needed and kept. Threads may share it; as many helpers run
    as threads try at the same time.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._idle: list[_Helper] = []
        self._busy: set[_Helper] = set()
        self._is_closed = False

    def run(self, grammar: str, limits: dict[str, Any]) -> str | None:
        """What is wrong with a grammar in the library's form, if anything. UsageError if it took
        too long or ended its process.
        """
        job = {"grammar": grammar, "limits": limits}
        helper = self._take()
        try:
            return helper.run(job | {"seconds": MAX_SECONDS, "mask_seconds": MAX_MASK_SECONDS})
        finally:
            self._put_back(helper)

    def close(self) -> None:
        """Ends the helpers, whatever they do."""
        with self._lock:
            self._is_closed = True
            for helper in self._busy:
                helper.end()  # its thread waits for it, and takes it away
            for helper in self._idle:
                helper.kill()

    def _take(self) -> _Helper:
        with self._lock:
            while self._idle:
                helper = self._idle.pop()
                if helper.is_alive:
                    break
            else:
                helper = _Helper(self._tokenizer)
            self._busy.add(helper)
            if self._is_closed:
                helper.end()
        return helper

    def _put_back(self, helper: _Helper) -> None:
        with self._lock:
            self._busy.discard(helper)
            is_kept = helper.is_alive and not self._is_closed
            if is_kept:
                self._idle.append(helper)
        if not is_kept:
            helper.kill()


class _Helper:
    def __init__(self, tokenizer: Tokenizer) -> None:
        # -P: the folder of the file is no place to import from. A session of its own: Ctrl-C at the
        # terminal is for the server, which may still want to compile what it took.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(grammar_helper.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        with suppress(OSError):  # it has ended: whoever runs something there is told
            self._write(
                {
                    "tokens": [token.decode("latin-1") for token in tokenizer.token_bytes],
                    "eos_id": tokenizer.eos_id,
                    "bos_id": tokenizer.bos_id,
                    "special_ids": sorted(tokenizer.special_ids.values()),
                }
            )

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def run(self, job: dict[str, Any]) -> str | None:
        has_expired = threading.Event()

        def expire() -> None:
            has_expired.set()
            self._process.kill()

        timer = threading.Timer(MAX_WAIT_SECONDS, expire)
        timer.daemon = True
        timer.start()
        try:
            self._write(job)
            problem: str | None = self._read()["problem"]
            return problem
        except (OSError, EOFError):
            code = self._process.wait()
        finally:
            timer.cancel()
        if has_expired.is_set():
            raise TrialExpiredError(
                "the grammar takes too long to compile",
                expected=f"at most {MAX_WAIT_SECONDS:g} s on a busy machine",
            )
        if code == -getattr(signal, "SIGXCPU", 0):
            raise UsageError(
                "the grammar takes too long to compile",
                expected=f"at most {MAX_SECONDS} s of processor time",
            )
        log.warning("a process that tried a grammar ended with %s", code)
        raise UsageError("the grammar is too complex: compiling it ended the process that tried")

    def end(self) -> None:
        self._process.kill()

    def kill(self) -> None:
        """Ends it and forgets it; no other thread may wait for it."""
        self.end()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None, "both are pipes"
            with suppress(OSError):
                stream.close()

    def _write(self, message: Any) -> None:
        stream = self._process.stdin
        assert stream is not None, "a pipe"
        content = json.dumps(message).encode()
        stream.write(len(content).to_bytes(LENGTH_BYTES, "big") + content)
        stream.flush()

    def _read(self) -> Any:
        stream = self._process.stdout
        assert stream is not None, "a pipe"
        head = stream.read(LENGTH_BYTES)
        content = stream.read(int.from_bytes(head, "big"))
        if len(head) < LENGTH_BYTES or not content:
            raise EOFError
        return json.loads(content)
