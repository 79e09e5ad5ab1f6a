"""Programs of their own that need not import torch first, which takes two seconds of a processor.

A process that has imported everything waits here and forks for each program, which gets a process
with its own pipes, folder, environment and signals, runs to the end of an interpreter, and is seen
through the usual `Popen`. What a start itself does is tested elsewhere (cli/test_main.py), and so
is memory, of which a fork begins with its parent's.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from functools import cache
from typing import Any, NamedTuple

PRELOADED = (
    "rorqual.cli.main",
    "rorqual.cli.serve",
    "rorqual.engine",
    "rorqual.serve.app",
    "rorqual.train.stages",
    "rorqual.weights.convert.run",
    "rorqual.weights.gguf.writer",
)
REQUEST_BYTES = 1 << 20
LOCK = threading.Lock()


class Popen(subprocess.Popen[Any]):
    """`subprocess.Popen` for `[sys.executable, "-m", "-c" or a path, ...]`."""

    modules: tuple[str, ...] = PRELOADED
    """What the process that forks has imported."""

    def _execute_child(self, args: Any, *options: Any) -> None:
        folder, environment = options[4], options[5]
        inner = [options[9], options[12], options[14]]  # of the pipes, where the program is
        status, told = os.pipe()
        request = {
            "words": [str(word) for word in args[1:]],
            "folder": str(folder or os.getcwd()),
            "environment": dict(os.environ if environment is None else environment),
        }
        ends = [own if end == -1 else end for own, end in enumerate(inner)]
        with LOCK:
            control = _forker(*self.modules)
            socket.send_fds(control, [json.dumps(request).encode()], [*ends, told])
        os.close(told)
        self._close_pipe_fds(*options[9:15])  # type: ignore[attr-defined]
        self._status = open(status)  # noqa: SIM115
        self.pid = int(self._status.readline())
        self._child_created = True

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if wait_flags & os.WNOHANG and not select.select([self._status], [], [], 0)[0]:
            return 0, 0
        status = int(self._status.readline())
        self._status.close()
        return self.pid, status

    def _internal_poll(self, _deadstate: int | None = None, **_: Any) -> int | None:
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self._handle_exitstatus(status)  # type: ignore[attr-defined]
        return self.returncode


def run(
    *words: object, timeout: float, kind: type[Popen] = Popen, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """The program to its end."""
    command = [sys.executable, *map(str, words)]
    pipe = subprocess.PIPE
    with kind(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=env) as program:
        try:
            out, err = program.communicate(timeout=timeout)
        finally:
            program.kill()
    return subprocess.CompletedProcess(command, program.returncode, out, err)


@cache
def _forker(*modules: str) -> socket.socket:
    """A process that forks, for each process of tests; it ends when its socket does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        forker = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno()), *modules],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    atexit.register(forker.wait)
    atexit.register(ours.close)  # first
    return ours


class Program(NamedTuple):
    words: list[str]
    ends: list[int]
    folder: str
    environment: dict[str, str]


def _wait_for_program(control: socket.socket, *modules: str) -> Program:
    """Returns in a new process alone."""
    for name in modules:
        importlib.import_module(name)
    while True:
        _reap()
        message, fds, _, _ = socket.recv_fds(control, REQUEST_BYTES, 4)
        if not message:
            _reap()
            os._exit(0)
        told = fds.pop()
        if not os.fork():
            control.close()
            if not (pid := os.fork()):
                os.close(told)
                return Program(ends=fds, **json.loads(message))
            _tell_end_of(pid, told)
        for fd in (*fds, told):
            os.close(fd)


def _reap() -> None:
    """Those that have told an end."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:  # none is left
        pass


def _tell_end_of(pid: int, told: int) -> None:
    os.write(told, f"{pid}\n".encode())
    os.closerange(0, told)
    os.write(told, f"{os.waitpid(pid, 0)[1]}\n".encode())
    os._exit(0)


def _become(program: Program) -> None:
    for own, end in enumerate(program.ends):
        os.dup2(end, own)
    os.closerange(3, 64)
    sys.stdin, sys.stdout = open(0), open(1, "w")  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace")  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(program.environment)
    os.chdir(program.folder)
    random.seed()
    how, *rest = program.words
    sys.argv = [how, *rest]
    sys.path[0] = {"-m": program.folder, "-c": ""}.get(how, os.path.dirname(how))
    if how == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif how == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(how, run_name="__main__")


if __name__ == "__main__":
    _become(_wait_for_program(socket.socket(fileno=int(sys.argv[1])), *sys.argv[2:]))
