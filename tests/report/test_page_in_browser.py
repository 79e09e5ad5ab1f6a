"""The page in Chromium, opened from the disk. Oracles: axe-core, the browser's own measures."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from made_run import TIMELINE, records, write_run

import browser
from rorqual.report import open_run, write_page

pytest.importorskip("playwright", reason="playwright: pip install 'rorqual[dev]'")
pytest.importorskip("axe_playwright_python", reason="axe-core: pip install 'rorqual[dev]'")
pytestmark = pytest.mark.skipif(
    browser.find_browser() is None,
    reason=f"no browser found: looked for {', '.join(browser.NAMES)}",
)
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 780}, "is_mobile": True}
DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 900}}
SMALLEST_TEXT = 6.5  # CSS pixels, of a picture on a phone


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("browser")
    lines = records(60)
    lines.insert(30, {"kind": "resume", "step": 60, "from": "checkpoints/step-60"})
    one = write_run(folder / "one", lines, timeline=TIMELINE)
    other = write_run(folder / "other", records(40))
    files = [folder / "one.html", folder / "both.html"]
    write_page([open_run(one)], files[0])
    write_page([open_run(one), open_run(other)], files[1])
    return files


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.launch() as found:
        yield found


@pytest.mark.parametrize(
    ("device", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")], ids=["desktop", "phone"]
)
def test_axe_finds_nothing_and_nothing_is_asked_for(
    chromium: Any, pages: list[Path], device: dict[str, Any], scheme: str
) -> None:
    axe = resources.files("axe_playwright_python").joinpath("axe.min.js").read_text()
    for file in pages if scheme == "light" else pages[:1]:
        context = chromium.new_context(color_scheme=scheme, **device)
        page = context.new_page()
        asked: list[str] = []
        said: list[str] = []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.on("console", lambda message, said=said: said.append(message.text))
        page.goto(file.as_uri())
        assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
        assert said == []
        for summary in page.locator("summary").all():
            summary.click()
        width = page.evaluate("() => document.documentElement.scrollWidth")
        assert width <= device["viewport"]["width"], "the page itself moves sideways"
        sizes = page.evaluate(
            "() => [...document.querySelectorAll('svg text')].map("
            "(text) => text.getBoundingClientRect().height)"
        )
        assert min(sizes) > SMALLEST_TEXT
        page.evaluate(axe)
        found = page.evaluate("() => axe.run({ resultTypes: ['violations'] })")
        assert [each["id"] for each in found["violations"]] == []
        context.close()


def test_dark_has_light_text_on_dark_paper(chromium: Any, pages: list[Path]) -> None:
    levels = []
    for scheme in ("light", "dark"):
        page = chromium.new_page(color_scheme=scheme)
        page.goto(pages[0].as_uri())
        colours = page.evaluate(
            "() => [getComputedStyle(document.body).backgroundColor,"
            " getComputedStyle(document.querySelector('svg text')).fill]"
        )
        levels.append([sum(int(n) for n in c.strip("rgb()").split(",")) for c in colours])
        page.close()
    (paper, ink), (dark_paper, dark_ink) = levels
    assert paper > 700 > 300 > ink
    assert dark_paper < 150 < 600 < dark_ink
