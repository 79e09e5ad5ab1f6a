"""What the page's tests act on: a browser, a scripted server, a tab that watches itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import page_stub
import pytest

import browser
from patience import HANG_SECONDS

PLAYWRIGHT = "the page is tested with playwright: pip install 'rorqual[dev]'"
NO_BROWSER = f"no browser found: looked for {', '.join(browser.NAMES)}"
# What the page takes away again by itself (a toast, a tick) stays, so that a slow test sees it.
KEEP_WHAT_FADES = """
  const setTimeoutOfBrowser = window.setTimeout.bind(window);
  window.setTimeout = (action, wait, ...rest) =>
    wait >= 1000 ? 0 : setTimeoutOfBrowser(action, wait, ...rest);
"""

needs_browser = pytest.mark.skipif(browser.find_browser() is None, reason=NO_BROWSER)

KEPT = """() => new Promise((resolve) => {
  indexedDB.open("rorqual").onsuccess = ({ target: { result: database } }) => {
    const transaction = database.transaction("chats", "readwrite");
    transaction.objectStore("chats").count();
    transaction.oncomplete = () => { database.close(); resolve(); };
  };
})"""


class Chat:
    """One tab. `problems` holds errors, broken policies and requests to other places."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.url = url
        self.problems: list[str] = []
        self.last_notice = ""
        page.set_default_timeout(1000 * HANG_SECONDS)
        page.add_init_script(KEEP_WHAT_FADES)
        page.on("pageerror", lambda error: self.problems.append(f"uncaught: {error}"))
        page.on("console", self._on_console)
        page.on("request", self._on_request)

    def _on_console(self, message: Any) -> None:
        is_refusal = "Failed to load resource" in message.text  # our own error modes
        if message.type in ("error", "warning") and not is_refusal:
            self.problems.append(f"console: {message.text}")

    def _on_request(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:", f"blob:{self.url}")):
            self.problems.append(f"request to {request.url}")

    def open(self, address: str = "") -> Chat:
        self.page.goto(self.url + address)
        self.page.locator("#composer-text").wait_for()
        return self

    def send(self, text: str) -> None:
        box = self.page.locator("#composer-text")
        box.fill(text)
        is_phone = self.page.evaluate("() => matchMedia('(pointer: coarse)').matches")
        if is_phone:  # its Enter makes a new line
            self.page.locator("#send").click()
        else:
            box.press("Enter")

    def ask(self, text: str) -> str:
        """Sends and waits for the whole answer."""
        before = self.page.locator(".message.user").count()
        self.send(text)
        self.page.locator(".message.user").nth(before).wait_for()
        return self.answer()

    def answer(self) -> str:
        """The last answer's text, when nothing is written any more."""
        self.page.locator("#send").wait_for()
        self.last_notice = self.page.locator("#notices").inner_text()
        return self.texts(".message.assistant .markdown")[-1]

    def texts(self, selector: str) -> list[str]:
        """As they read; of what has had no frame yet, since it is out of sight or its tab is, as
        they are.
        """
        return list(
            self.page.locator(selector).evaluate_all(
                "(nodes) => nodes.map((node) => node.innerText || node.textContent.trim())"
            )
        )

    def see(self, selector: str) -> Any:
        """Waits until it is visible."""
        found = self.page.locator(selector).last
        found.wait_for()
        return found

    def until(self, expression: str, argument: Any = None) -> Any:
        """Waits until a JavaScript expression holds (polled: a hidden tab draws no frames)."""
        return self.page.wait_for_function(expression, arg=argument, polling=50)

    def reload(self) -> None:
        """Once all that was changed is kept: a writing transaction waits for those before it."""
        self.page.evaluate(KEPT)
        self.page.reload()

    def titles(self) -> list[str]:
        return list(self.page.locator(".chat-name").all_inner_texts())

    def menu(self, title: str, item: str) -> None:
        row = self.page.locator(".chat-row", has_text=title)
        row.hover()
        row.locator(".chat-more").click()
        self.page.locator(f"#menu-{item}").click()


class Stage:
    def __init__(self, chromium: Any, stub: page_stub.Stub) -> None:
        self.chromium = chromium
        self.stub = stub

    @contextmanager
    def chat(self, **options: Any) -> Iterator[Chat]:
        """A tab in a browser profile of its own; nothing may have gone wrong when it closes."""
        context = self.chromium.new_context(**options)
        try:
            chat = Chat(context.new_page(), self.stub.url)
            yield chat.open()
            assert chat.problems == []
        finally:
            context.close()
            self.stub.reset()


@contextmanager
def open_stage() -> Iterator[Stage]:
    stub = page_stub.start()
    with browser.launch() as chromium:
        yield Stage(chromium, stub)
    stub.server.shutdown()
