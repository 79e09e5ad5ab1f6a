"""`rorqual eval --tasks niah`. Oracle: the server's answers and the engine's are the same text."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from command import run
from serving import serving

NIAH = ("eval", "tiny", "--tasks", "niah")


def test_a_map_of_the_bundled_model(tmp_path: Path) -> None:
    picture = tmp_path / "map.png"
    flags = ("--lengths", "100,200", "--depths", 2, "--trials", 1)
    done = run(*NIAH, *flags, "--plot", picture)
    assert done.code == 0, done.err
    assert "100 tokens" in done.out
    assert "200 tokens" in done.out
    assert "of 4 found" in done.out
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_a_server_says_what_the_engine_says() -> None:
    flags = ("--lengths", "100,200", "--depths", 2, "--trials", 2, "--json", "--seed", 3)
    ours = run(*NIAH, *flags, "--dtype", "float32", "--batch-invariant")
    more = ("--dtype", "float32", "--batch-invariant")
    with serving(Path("tiny"), *more) as (_, address):
        theirs = run(*NIAH, *flags, "--server", address + "/v1/")
    assert theirs.code == 0, theirs.err
    assert json.loads(theirs.out) == json.loads(ours.out)
    assert len(json.loads(ours.out)["trials"]) == 8


def test_the_lengths_are_the_contexts_unasked() -> None:
    done = run(*NIAH, "--depths", 1, "--trials", 1, "--json")
    assert done.code == 0, done.err
    table = json.loads(done.out)
    assert [cell["length"] for cell in table["cells"]] == [116, 232]  # of 256 - 24
    assert {cell["depth"] for cell in table["cells"]} == {0.5}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--tasks", "niah,dates"), "measured by themselves"),
        (("--tasks", "niah", "--recipe", "x.toml"), "measured by themselves"),
        (("--plot", "x.png"), "--plot is for needles alone"),
        (("--tasks", "dates", "--raw"), "--raw is for needles alone"),
        (("--depths", 3), "--depths is for needles alone"),
        (("--tasks", "niah", "--lengths", "1k,x"), "--lengths takes numbers of tokens"),
        (("--tasks", "niah", "--lengths", "0"), "--lengths takes numbers of tokens"),
        (("--tasks", "niah", "--lengths", "2m"), "--lengths takes numbers of tokens"),
        (("--tasks", "niah", "--lengths", "1m"), "--lengths takes numbers of tokens"),
        (("--tasks", "niah", "--lengths", "64k"), "longer than the model's context"),
        (("--tasks", "niah", "--lengths", "20"), "no room for a needle"),
        (("--tasks", "niah", "--haystack", "none.txt"), "cannot be read"),
        (("--tasks", "niah", "--server", "localhost"), "--server takes an address"),
        (("--tasks", "niah", "--server", "http://127.0.0.1:9"), "the server cannot be asked"),
        (("--tasks", "niah", "--server", "http://x", "--dtype", "int8"), "its own engine"),
    ],
)
def test_what_cannot_be(flags: tuple[object, ...], words: str) -> None:
    done = run("eval", "tiny", *flags)
    assert done.code == 2, done.out
    assert words in done.err


@contextmanager
def other_server(models: dict[str, Any], asked: list[Any]) -> Iterator[str]:
    """Answers each prompt with its place, the last first; keeps what it is asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(200, models)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers["Authorization"], body))
            if "refuse" in body["model"]:
                self.answer(400, {"error": {"message": "too much"}})
                return
            texts = [{"index": i, "text": f" {i}"} for i in range(len(body["prompt"]))]
            self.answer(200, {"choices": texts[::-1]})

        def answer(self, code: int, value: object) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_another_server_is_asked_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    flags = ("--lengths", "100", "--depths", 1, "--trials", 3, "--json", "--raw")
    with other_server({"data": [{"id": "m", "max_model_len": 256}]}, asked) as url:
        done = run(*NIAH, *flags, "--server", url)
    assert done.code == 0, done.err
    assert [trial["answer"] for trial in json.loads(done.out)["trials"]] == [" 0", " 1", " 2"]
    ((path, key, body),) = asked
    assert (path, key) == ("/v1/completions", "Bearer secret")
    assert (body["temperature"], body["max_tokens"]) == (0, 24)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"id": "m"}, "does not say how long its context is"),
        ({"id": "refuse", "max_model_len": 256}, "too much"),
    ],
)
def test_servers_that_cannot_answer(model: dict[str, Any], words: str) -> None:
    with other_server({"data": [model]}, []) as url:
        done = run(*NIAH, "--lengths", "100", "--depths", 1, "--trials", 1, "--server", url)
    assert done.code == 2
    assert words in done.err
