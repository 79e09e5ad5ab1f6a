"""Takes the pictures of docs/images: `python tests/serve/screenshots.py [FOLDER]`.

The bundled tiny model answers, through `rorqual serve`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from browser import launch

MAX_BYTES = 150_000
FOLDER = Path(__file__).parents[2] / "docs" / "images"
DESKTOP: dict[str, Any] = {"viewport": {"width": 1240, "height": 800}}
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 780},
    "has_touch": True,
    "is_mobile": True,
    "device_scale_factor": 1.5,
}
LIGHT, DARK = {"color_scheme": "light"}, {"color_scheme": "dark"}
STORY = ["Tell me a short story about a whale"]
TURNS = ["What is 347 + 586?", "What is the capital of France?", "And of Japan?"]
CODE = ["Who are you?", "Python: print the word lark backwards"]
# Each picture with its conversations; the last one is seen.
PICTURES: dict[str, tuple[dict[str, Any], list[list[str]]]] = {
    "chat-light": ({**DESKTOP, **LIGHT}, [STORY, CODE, TURNS]),
    "chat-dark": ({**DESKTOP, **DARK}, [TURNS, STORY, CODE]),
    "chat-phone": ({**PHONE, **DARK}, [TURNS, STORY]),
    "chat-start": ({**DESKTOP, **LIGHT}, []),
}


@contextmanager
def served() -> Iterator[str]:
    command = [sys.executable, "-m", "rorqual", "serve", "--model", "tiny", "--port", "0"]
    process = subprocess.Popen([*command, "--speculate", "2"], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")  # a warning may come first
        found = (re.search(r"http://127\.0\.0\.1:\d+", line) for line in lines)
        yield next(address[0] for address in found if address)
    finally:
        process.terminate()
        process.wait()


def take(page: Any, url: str, conversations: list[list[str]], path: Path) -> None:
    page.goto(url)
    page.locator(".suggestion").first.wait_for()
    for questions in conversations:
        new_chat = "#new-chat" if page.locator("#new-chat").is_visible() else "#new-chat-bar"
        page.locator(new_chat).click()
        for number, question in enumerate(questions):
            page.locator("#composer-text").fill(question)
            page.locator("#send").click()
            page.locator(".figures").nth(number).wait_for()
    page.mouse.move(0, 0)
    page.wait_for_timeout(400)
    page.screenshot(path=path)
    assert path.stat().st_size < MAX_BYTES, f"{path}: {path.stat().st_size} bytes"


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with served() as url, launch() as browser:
        for name, (options, conversations) in PICTURES.items():
            page = browser.new_context(**options).new_page()
            take(page, url, conversations, folder / f"{name}.png")
            page.context.close()
            print(folder / f"{name}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
