"""Servers over the fake engine that kill themselves (SIGKILL) at a chosen moment.

As a program it imports everything once, then forks a server for each line that it reads: a JSON
list `[kind, number]`, the number-th moment of that kind, or null for a server that lives on, or
"held" for one whose engine gives no answer. It writes its process and address, and how it ended.
`Servers` is the side of the test.

Kinds: `answer` an answer is about to be written, or is written and not committed; `commit` a
transaction has just been committed; `file` a record was written to an output file; `show` the
transaction that ends the batch is about to show a file; `forget` the batch has just ended.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from patience import HANG_SECONDS

TESTS = Path(__file__).parent.parent
Moment = tuple[str, int] | str | None
HELD = "held"


class Servers:
    """One server after the other on one state folder."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._server = 0

    def start(self, moment: Moment = None) -> str:
        """Its address."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(moment) + "\n")
        self._process.stdin.flush()
        self._server = int(self._read("process"))
        return self._read("address")

    def ended(self) -> int:
        """The signal that ended it, when it has ended; 0 if it ended by itself."""
        return os.WTERMSIG(int(self._read("ended")))

    def send(self, number: signal.Signals) -> None:
        os.kill(self._server, number)

    def _read(self, word: str) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line.startswith(word + " "), (line, word)
        return line.removeprefix(word).strip()


@contextmanager
def servers(state: Path, concurrency: int = 8) -> Iterator[Servers]:
    """Killed with all they started when the block ends."""
    command = [sys.executable, __file__, str(state), str(concurrency)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
    )
    guard = threading.Timer(HANG_SECONDS, os.killpg, (process.pid, signal.SIGKILL))
    guard.start()
    try:
        yield Servers(process)
    finally:
        guard.cancel()
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _arm(moment: Any) -> None:
    """Makes the moments of this process known, and one of them the last."""
    from rorqual.serve.store import BatchTable, Database, FileStore

    seen: Counter[str] = Counter()

    def note(kind: str) -> None:
        seen[kind] += 1
        if [kind, seen[kind]] == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(owner: Any, name: str, kind: str, *, is_before: bool, is_after: bool) -> None:
        method: Callable[..., Any] = getattr(owner, name)

        def noted(*args: Any, **options: Any) -> Any:
            if is_before:
                note(kind)
            result = method(*args, **options)
            if is_after:
                note(kind)
            return result

        setattr(owner, name, noted)

    around(BatchTable, "add_answer", "answer", is_before=True, is_after=True)
    around(Database, "_transact", "commit", is_before=False, is_after=True)
    around(FileStore, "show", "show", is_before=True, is_after=False)
    around(BatchTable, "forget", "forget", is_before=True, is_after=False)
    write = FileStore._write

    def slowly(self: FileStore, file_id: str, chunks: Iterable[bytes]) -> int:
        def noted() -> Iterator[bytes]:
            for chunk in chunks:
                yield chunk
                note("file")

        return write(self, file_id, noted())

    FileStore._write = slowly  # type: ignore[method-assign]


def _serve(state: Path, concurrency: int, moment: Any, bound: socket.socket) -> None:
    from fake_engine import FakeEngine
    from served import SCRIPT, make_model

    from rorqual.serve.app import create_app
    from rorqual.serve.server import Server
    from rorqual.serve.settings import ServerSettings

    _arm(moment)
    settings = ServerSettings(state_dir=state, batch_concurrency=concurrency)
    engine = FakeEngine(TOKENIZER, SCRIPT, hold_after=0 if moment == HELD else None)
    Server(create_app(engine, make_model(TOKENIZER), settings)).run(sockets=[bound])


if __name__ == "__main__":
    from served import TEXTS

    import rorqual.serve.app  # noqa: F401  before the first fork, once for all
    from rorqual.serve.server import address_of, open_socket
    from rorqual.tokenizer import train_tokenizer

    TOKENIZER = train_tokenizer(TEXTS, 300)
    for line in sys.stdin:
        with open_socket("127.0.0.1", 0) as bound:
            address = address_of(bound)
            child = os.fork()
            if child == 0:
                _serve(Path(sys.argv[1]), int(sys.argv[2]), json.loads(line), bound)
                os._exit(0)
        print(f"process {child}\naddress {address}", flush=True)
        print("ended", os.waitpid(child, 0)[1], flush=True)
