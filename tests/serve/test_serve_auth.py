"""Keys, other sites' pages, names that point here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import web
from fake_engine import FakeEngine
from live import Live, running
from openai import AuthenticationError, OpenAI
from served import make_model
from starlette.datastructures import Headers

from patience import HANG_SECONDS
from rorqual.errors import UsageError
from rorqual.serve.app import create_app
from rorqual.serve.auth import Keys, read_keys
from rorqual.serve.settings import ServerSettings
from rorqual.tokenizer import Tokenizer

pytestmark = pytest.mark.concurrency

KEYS = ("first-key-0001", "second-key-0002")


@pytest.fixture(scope="module")
def guarded(tokenizer: Tokenizer) -> Iterator[Live]:
    settings = ServerSettings(api_keys=KEYS, cors_origins=("https://whale.example",))
    with running(create_app(FakeEngine(tokenizer), make_model(tokenizer), settings)) as live:
        yield live


def test_each_key_opens_and_nothing_else_does(guarded: Live) -> None:
    for key in KEYS:
        client = OpenAI(base_url=guarded.url + "/v1", api_key=key)
        assert client.completions.create(model="sei", prompt="x").choices
    for key in ("first-key-000", "first-key-00011", "x", "FIRST-KEY-0001", "first-key-0001é"):
        headers = {"authorization": f"Bearer {key}".encode()}
        response = web.get(guarded.url + "/v1/models", headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["type"] == "authentication_error"
        assert response.headers["www-authenticate"] == "Bearer"
        headers = {"x-api-key": key.encode()}
        assert web.get(guarded.url + "/v1/models", headers=headers).status_code == 401
    stranger = OpenAI(base_url=guarded.url + "/v1", api_key="sk-none", max_retries=0)
    with pytest.raises(AuthenticationError):
        stranger.models.list()


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/health", 200),
        ("/ready", 200),
        ("/metrics", 401),
        ("/openapi.json", 401),
        ("/v1/models", 401),
        ("/models", 401),
        ("/v1/files", 401),
        ("/v1/batches", 401),
        ("/tokenize", 401),
        ("/nothing", 401),
        ("//v1/models", 401),
        ("/page/../v1/models", 401),
        ("/page/api/render", 401),
    ],
)
def test_what_is_open_without_a_key(guarded: Live, path: str, status: int) -> None:
    # httpx would tidy the path; the bare transport does not.
    request = httpx.Request("GET", guarded.url, extensions={"target": path.encode()})
    with httpx.Client(timeout=HANG_SECONDS) as client:
        response = client.send(request)
    assert response.status_code == (404 if path.startswith("/page/..") else status)
    assert "sei" not in response.text


def test_a_key_may_come_as_anthropics_clients_send_it(guarded: Live) -> None:
    """Alone, or beside an `Authorization` that is somebody else's."""
    url = guarded.url + "/v1/models"
    for extra in ({}, {"authorization": "Bearer sk-none"}, {"authorization": "Basic eDp5"}):
        assert web.get(url, headers={"x-api-key": KEYS[1]} | extra).status_code == 200
    good = {"authorization": f"Bearer {KEYS[0]}", "x-api-key": "sk-none"}
    assert web.get(url, headers=good).status_code == 200
    assert web.get(url, headers={"x-api-key": f"Bearer {KEYS[1]}"}).status_code == 401


def test_a_wrong_scheme_is_no_key(guarded: Live) -> None:
    for value in (KEYS[0], f"Basic {KEYS[0]}", f"Bearer{KEYS[0]}"):
        headers = {"authorization": value}
        assert web.get(guarded.url + "/v1/models", headers=headers).status_code == 401


SDK_HEADERS = (
    "authorization,content-type,x-stainless-arch,x-stainless-helper-method,x-stainless-lang,"
    "x-stainless-os,x-stainless-package-version,x-stainless-retry-count,x-stainless-runtime,"
    "x-stainless-runtime-version,x-stainless-timeout"
)
"""What Chromium asks for when openai 6.x of npm streams a chat."""


def test_the_javascript_sdk_passes_the_preflight_of_a_named_origin(guarded: Live) -> None:
    asks = {
        "access-control-request-method": "POST",
        "access-control-request-headers": SDK_HEADERS,
        "access-control-request-private-network": "true",
    }
    url = guarded.url + "/v1/chat/completions"
    good = web.options(url, headers={"origin": "https://whale.example"} | asks)
    assert good.status_code == 200
    assert good.headers["access-control-allow-origin"] == "https://whale.example"
    assert good.headers["access-control-allow-private-network"] == "true"
    assert "access-control-allow-credentials" not in good.headers
    allowed = good.headers["access-control-allow-headers"].replace(" ", "").lower().split(",")
    assert set(SDK_HEADERS.split(",")) <= set(allowed)
    assert "POST" in good.headers["access-control-allow-methods"]
    bad = web.options(url, headers={"origin": "https://other.example"} | asks)
    assert bad.status_code == 400
    assert "access-control-allow-origin" not in bad.headers


def test_pages_of_a_named_origin_read_what_the_sdk_needs(guarded: Live) -> None:
    url = guarded.url + "/v1/chat/completions"
    for key, status in ((KEYS[0], 200), ("wrong-key-0001", 401)):
        headers = {"origin": "https://whale.example", "authorization": f"Bearer {key}"}
        body = {"messages": [{"role": "user", "content": "x"}]}
        response = web.post(url, json=body, headers=headers)
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == "https://whale.example"
        exposed = response.headers["access-control-expose-headers"].split(", ")
        assert {"retry-after", "x-request-id", "x-rorqual-ignored-fields"} <= set(exposed)


def test_cors_is_off_by_default_and_foreign_pages_are_refused(live: Live) -> None:
    url = live.url + "/v1/completions"
    for origin in ("https://other.example", "null", "http://localhost:1"):
        response = web.post(url, json={"prompt": "x"}, headers={"origin": origin})
        assert (response.status_code, response.json()["error"]["code"]) == (403, "wrong_origin")
        assert "access-control-allow-origin" not in response.headers
    own = web.post(url, json={"prompt": "x"}, headers={"origin": live.url})
    assert own.status_code == 200


@pytest.mark.parametrize(
    "form",
    [
        "http://{host}.evil.example", "http://{name}.evil.example:{port}", "http://{host}0",
        "http://evil.example/{host}", "http://evil.example?{host}", "http://evil.example#{host}",
        "http://evil.example:{port}", "http://{host}@evil.example", "http://evil@{host}",
        "http://evil.example@{host}", "http://{name}", "http://{name}:1", "http://{name}.:{port}",
        "http://x{host}", "HTTP://{host}", "ftp://{host}", "file://{host}", "{host}", "//{host}",
        "http://{host}/", "http://{host}/x", "http://{host} ,http://evil.example", "null", "http://",
        "http://{upper}:{port}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_an_origin_that_only_resembles_the_host_is_refused(
    live: Live, form: str, name: str
) -> None:
    """Only scheme://host:port of this very server is its own page's origin."""
    port = live.url.rpartition(":")[2]
    host = f"{name}:{port}"
    upper = "LOCALHOST" if name == "localhost" else "127.0.0.1."
    origin = form.format(host=host, name=name, port=port, upper=upper)
    url = live.url + "/v1/completions"
    headers = {"host": host, "origin": origin}
    response = httpx.post(url, json={"prompt": "x"}, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (403, "wrong_origin")
    for scheme in ("http", "https"):
        headers["origin"] = f"{scheme}://{host}"
        assert httpx.post(url, json={"prompt": "x"}, headers=headers).status_code == 200


def test_a_name_that_points_here_is_not_this_server(live: Live) -> None:
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "127.0.0.1.", ""):
        response = web.get(live.url + "/v1/models", headers={"host": host})
        assert (response.status_code, response.json()["error"]["code"]) == (403, "wrong_host"), host
    for host in ("[", "evil@127.0.0.1"):
        response = web.get(live.url + "/v1/models", headers={"host": host})
        assert response.status_code == 400, host
    for host in ("localhost", "localhost:8000", "127.0.0.1:9", "[::1]:8000"):
        assert web.get(live.url + "/v1/models", headers={"host": host}).status_code == 200


def test_the_key_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# team\n\n  first-key-0001 \nsecond-key-0002\n")
    assert read_keys(path) == KEYS
    for text, words in (
        ("# none\n", "no key"),
        ("short\n", "line 1: the key"),
        ("# x\n\nhas a space here\n", "line 3: the key"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=words) as caught:
            read_keys(path)
        assert "short" not in str(caught.value)
    path.write_text("8letters\n")  # as short as a key may be
    assert read_keys(path) == ("8letters",)
    path.write_text("7letter\n")
    with pytest.raises(UsageError, match="line 1: the key"):
        read_keys(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_keys(tmp_path / "missing")


def test_owners_differ_by_key_and_do_not_show_it() -> None:
    keys = Keys(KEYS)
    owners = {keys.owner(f"Bearer {key}") for key in KEYS}
    assert len(owners) == 2
    assert owners == {keys.owner_of(Headers({"x-api-key": key})) for key in KEYS}
    assert None not in owners
    assert not any(key[:5] in str(owner) for key in KEYS for owner in owners)
