"""OpenAI's JavaScript SDK in a page of another site, in a real Chromium."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fake_engine import DEFAULT, FakeEngine
from live import running
from served import make_model

import browser
from rorqual.serve.app import create_app
from rorqual.serve.settings import ServerSettings
from rorqual.tokenizer import Tokenizer

pytestmark = [pytest.mark.concurrency, pytest.mark.slow]

NODE_MODULES = Path(__file__).parents[2] / "build" / "clients-node" / "node_modules"
KEY = "first-key-0001"
SCRIPT = """async ([site, api, key]) => {
    const OpenAI = (await import(site + "/openai/index.mjs")).default;
    const seen = {};
    const options = {baseURL: api + "/v1", dangerouslyAllowBrowser: true, maxRetries: 0};
    const client = new OpenAI({...options, apiKey: key, defaultHeaders: {"x-of-my-own": "a"}});
    const messages = [{role: "user", content: "hello"}];
    const whole = await client.chat.completions.create({model: "sei", messages});
    seen.whole = whole.choices[0].message.content;
    seen.stream = "";
    const stream = await client.chat.completions.create({model: "sei", messages, stream: true});
    for await (const chunk of stream) seen.stream += chunk.choices[0]?.delta?.content ?? "";
    seen.models = (await client.models.list()).data.map(model => model.id);
    try {
        await new OpenAI({...options, apiKey: "wrong-key-0001"}).models.list();
    } catch (error) {
        seen.status = error.status;
    }
    return seen;
}"""


class Files(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def site(folder: Path) -> Iterator[str]:
    """The folder's files at an origin of their own."""
    handler = partial(Files, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_page_of_a_named_origin_uses_the_sdk(tokenizer: Tokenizer) -> None:
    modules = Path(os.environ.get("RORQUAL_NODE_MODULES", NODE_MODULES))
    if not (modules / "openai" / "index.mjs").is_file():
        pytest.skip(f"no openai of npm in {modules}")
    pytest.importorskip("playwright")
    if browser.find_browser() is None:
        pytest.skip("no browser found")
    with site(modules) as origin, browser.launch() as chromium:
        settings = ServerSettings(api_keys=(KEY,), cors_origins=(origin,))
        with running(create_app(FakeEngine(tokenizer), make_model(tokenizer), settings)) as live:
            page = chromium.new_page()
            page.goto(origin + "/openai/package.json")
            seen = page.evaluate(SCRIPT, [origin, live.url, KEY])
    names = ["sei", "minke"]
    assert seen == {"whole": DEFAULT, "stream": DEFAULT, "models": names, "status": 401}
