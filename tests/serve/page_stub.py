"""A stand-in for the server: it serves the page and plays answers from a script, nothing random.

The API's shape is DeepSeek's: SSE chunks, `: keep-alive` comments, a last chunk with `usage`, error
bodies. What a question says decides how it is answered; see `_play`.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import rorqual
from rorqual.engine import SamplingParams
from rorqual.serve.page_api import SAMPLING, rendered, sampling_field
from rorqual.serve.page_routes import HEADERS, KINDS

PAGE = Path(rorqual.__file__).parent / "serve" / "page"
SLOW_PIECE_SECONDS = 0.05
CONTEXT = 1000


def _set_event() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


@dataclass
class Stub:
    """A running stand-in and what it saw."""

    server: ThreadingHTTPServer
    models: list[str] = field(default_factory=lambda: ["tiny"])
    api_key: str | None = None
    answers: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Question -> (reasoning, answer) beside the built-in ones."""
    piece_characters: int = 7
    piece_seconds: float = 0.002
    requests: list[dict[str, Any]] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    """Questions whose answer the page broke off. A stream tells the list that was there when it
    began, since it may notice only in the next test that its page has gone.
    """
    has_room: threading.Event = field(default_factory=threading.Event)
    """The question `wait in the queue` waits for it."""
    has_thought: threading.Event = field(default_factory=_set_event)
    """Answers wait for it between the reasoning and what follows."""
    rendered: list[list[str]] = field(default_factory=list)
    """What the page asked to be made of markdown, a list a request."""
    can_render: bool = True
    skipped: int = 0
    """How many of the oldest messages are told not to fit."""
    has_thinking_switch: bool = False
    is_killed: bool = False
    num_failures: int = 0
    """How many of the next questions are refused with 503."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/"

    def kill(self) -> int:
        """Ends in the middle of whatever it does; the port, for another to take its place."""
        self.server.shutdown()
        self.server.server_close()
        self.is_killed = True
        return int(self.server.server_address[1])

    def reset(self) -> None:
        self.models, self.api_key, self.answers = ["tiny"], None, {}
        self.piece_characters, self.piece_seconds = 7, 0.002
        self.requests, self.cancelled, self.num_failures = [], [], 0
        self.rendered, self.can_render = [], True
        self.skipped, self.has_thinking_switch = 0, False
        self.has_room.set()  # nobody waits any more
        self.has_thought.set()
        self.has_room = threading.Event()


def described(stub: Stub) -> dict[str, Any]:
    """As `page_api.described` has it."""
    model: Any = SimpleNamespace(defaults=SamplingParams(), max_positions=CONTEXT)
    return {
        "id": stub.models[0],
        "context": CONTEXT,
        "has_thinking_switch": stub.has_thinking_switch,
        "facts": [["Parameters", "9M"], ["Context", f"{CONTEXT} tokens"]],
        "opening": "I am a stub.",
        "examples": ["hello", "What can you do?"],
        "limits": "It plays from a script.",
        "sampling": [sampling_field(name, *words, model) for name, words in SAMPLING.items()],
    }


def start(port: int = 0) -> Stub:
    server = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
    server.daemon_threads = True
    stub = Stub(server)
    server.stub = stub  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return stub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def stub(self) -> Stub:
        return self.server.stub  # type: ignore[attr-defined, no-any-return]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle_one_request(self) -> None:
        if self.stub.is_killed:  # a connection that was kept
            self.close_connection = True
        else:
            super().handle_one_request()

    def do_GET(self) -> None:
        if self.stub.is_killed:
            self.close_connection = True
            return
        path = self.path.split("?")[0]
        if path == "/v1/models":
            if self._is_allowed():
                data = [{"id": name, "object": "model"} for name in self.stub.models]
                self._reply(200, {"object": "list", "data": data})
            return
        if path == "/page/api/model":
            if self._is_allowed():
                self._reply(200, described(self.stub))
            return
        if path == "/ready":
            self._reply(200, {"status": "ready"})
            return
        name = "index.html" if path == "/" else path.removeprefix("/page/")
        file = PAGE / name
        if "/" in name or not file.is_file():
            self._reply(404, {"error": {"message": f"no such route: {path}"}})
            return
        body = file.read_bytes()
        self.send_response(200)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("content-type", KINDS[file.suffix])
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self._is_allowed():
            return
        if self.path == "/page/api/fit":
            context = {"prompt_tokens": 20 * len(body["messages"]), "context": CONTEXT}
            self._reply(200, {"skipped": self.stub.skipped, **context})
            return
        if self.path == "/page/api/render":
            self.stub.rendered += [body["texts"]]
            if self.stub.can_render:
                self._reply(200, {"htmls": rendered(body["texts"])})
            else:
                self._reply(503, {"error": {"message": "the server drains"}})
            return
        self.stub.requests.append(body)
        last = body["messages"][-1]
        question = body["messages"][-2]["content"] if last.get("prefix") else last["content"]
        if self.stub.num_failures > 0:
            self.stub.num_failures -= 1
            self._reply(503, {"error": {"message": "the server drains"}}, {"retry-after": "3"})
        elif question == "refuse 422":
            message = "temperature: too hot (found 9)"
            self._reply(422, {"error": {"message": message, "param": "temperature"}})
        elif question == "refuse long":
            error = {"message": "it does not fit", "code": "context_length_exceeded"}
            self._reply(400, {"error": error})
        elif question == "refuse 429":
            self._reply(429, {"error": {"message": "the queue is full"}}, {"retry-after": "7"})
        elif question == "refuse 500":
            self._reply(500, {"error": {"message": "the server failed on this request"}})
        else:
            self._stream(question, body)

    def _is_allowed(self) -> bool:
        key = self.stub.api_key
        if key is None or self.headers["authorization"] == f"Bearer {key}":
            return True
        self._reply(401, {"error": {"message": "no valid key", "type": "authentication_error"}})
        return False

    def _reply(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, question: str, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        cancelled = self.stub.cancelled
        try:
            for text in self._play(question, body):
                if self.stub.is_killed:
                    break
                self.wfile.write(text.encode())
                self.wfile.flush()
        except (BrokenPipeError, ConnectionResetError):
            cancelled.append(question)
        self.close_connection = True

    def _play(self, question: str, body: dict[str, Any]) -> Iterator[str]:
        """The raw bytes of one answer, in time."""
        stub = self.stub
        if body["messages"][-1].get("prefix"):
            yield _chunk({"content": ", and on"})
            yield _chunk({}, "stop") + "data: [DONE]\n\n"
            return
        if question == "wait in the queue":
            while not stub.has_room.wait(SLOW_PIECE_SECONDS):
                yield ": keep-alive\n\n"
        if question == "go on for ever":
            for number in count():  # until the page hangs up
                total = {"prompt_tokens": 20, "completion_tokens": number + 1}
                yield _chunk({"content": f"word{number} "}, usage=total)
                time.sleep(SLOW_PIECE_SECONDS)
        number = len([r for r in stub.requests if r["messages"][-1]["content"] == question])
        reasoning, answer = stub.answers.get(question, ("", f"Answer {number} to: {question}"))
        for key, text in (("reasoning_content", reasoning), ("content", answer)):
            if key == "content":
                stub.has_thought.wait()
            for at in range(0, len(text), stub.piece_characters):
                yield _chunk({key: text[at : at + stub.piece_characters]})
                time.sleep(stub.piece_seconds)
        if question == "break off":
            return
        if question == "fail midway":
            yield f"data: {json.dumps({'error': {'message': 'out of blocks', 'code': 'x'}})}\n\n"
            return
        finish = "length" if question == "be cut" else "stop"
        yield _chunk({}, finish)
        num_tokens = max(1, len(reasoning + answer) // 3)
        if body["stream_options"]["include_usage"]:
            num_prompt = 20 * len(body["messages"]) + 4
            hits = 16 * (num_prompt // 24)
            accepted = int(num_tokens * 0.44)
            details = {
                "reasoning_tokens": len(reasoning) // 3,
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": num_tokens // 8,
                "acceptance_by_position": [0.82, 0.61],
            }
            usage = {
                "prompt_tokens": num_prompt,
                "completion_tokens": num_tokens,
                "total_tokens": num_prompt + num_tokens,
                "prompt_cache_hit_tokens": hits,
                "prompt_cache_miss_tokens": num_prompt - hits,
                "prompt_tokens_details": {"cached_tokens": hits},
                "completion_tokens_details": details,
            }
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"


def _chunk(
    delta: dict[str, str], finish: str | None = None, usage: dict[str, int] | None = None
) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    body: dict[str, Any] = {"object": "chat.completion.chunk", "choices": [choice]}
    if usage is not None:
        body["usage"] = usage | {"total_tokens": sum(usage.values())}
    return f"data: {json.dumps(body)}\n\n"
