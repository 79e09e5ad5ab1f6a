"""A started `rorqual serve` and its address."""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from command import start

from patience import HANG_SECONDS, wait_until


@contextmanager
def serving(
    folder: Path, *flags: object, setup: str = ""
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A started server and its address."""
    process = start("serve", "--model", folder, "--port", 0, *flags, setup=setup)
    killer = threading.Timer(HANG_SECONDS, process.kill)
    killer.start()
    try:
        assert process.stderr is not None
        assert process.stderr.readline().decode() == f"Loading {folder} ...\n"
        lines = [process.stderr.readline().decode() for _ in range(5)]
        address = re.search(r"http://127\.0\.0\.1:\d+", lines[0])
        assert address is not None, lines + process.stderr.readlines()
        assert lines[1].startswith("Device: ")
        assert "tokens in" in lines[2]
        assert "curl http://127.0.0.1" in lines[3]
        wait_until_ready(address[0])
        yield process, address[0]
    finally:
        killer.cancel()
        process.kill()
        process.communicate()


def wait_until_ready(address: str) -> None:
    wait_until(lambda: is_ready(address))


def is_ready(address: str) -> bool:
    try:
        return httpx.get(address + "/ready", timeout=HANG_SECONDS).status_code == 200
    except httpx.TransportError:
        return False
