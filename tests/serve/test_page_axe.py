"""The chat page before axe-core: no violation, on desktop and phone, light and dark.

Oracle: axe-core's rules for WCAG 2.2 A and AA and its best practices, from axe-playwright-python.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

import pytest
from stage import PLAYWRIGHT, Chat, Stage, needs_browser

pytest.importorskip("playwright", reason=PLAYWRIGHT)
pytest.importorskip("axe_playwright_python", reason="axe-core: pip install 'rorqual[dev]'")
pytestmark = needs_browser

PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 780},
    "has_touch": True,
    "is_mobile": True,
}
ANSWER = """# Head

Text with `code`, \\(x^2\\) and a [link](https://e.org).

```python
def f(x):  # comment
    return "text" + str(42)
```

| a | b |
|--|--|
| 1 | 2 |

- [x] done
- [ ] open

> [!NOTE]
> note[^1]

[^1]: foot
"""


def violations(chat: Chat) -> list[str]:
    chat.page.evaluate(resources.files("axe_playwright_python").joinpath("axe.min.js").read_text())
    found = chat.page.evaluate("() => axe.run({ resultTypes: ['violations'] })")
    return [
        f"{each['id']}: {[node['html'][:90] for node in each['nodes']]}"
        for each in found["violations"]
    ]


@pytest.mark.parametrize(
    ("device", "scheme"),
    [
        ("desktop", "light"),
        ("phone", "dark"),
        pytest.param("desktop", "dark", marks=pytest.mark.slow),
        pytest.param("phone", "light", marks=pytest.mark.slow),
    ],
)
def test_axe_finds_nothing(stage: Stage, device: str, scheme: str) -> None:
    options = PHONE if device == "phone" else {}
    with stage.chat(color_scheme=scheme, reduced_motion="reduce", **options) as chat:
        chat.see(".suggestion")
        assert violations(chat) == []
        stage.stub.answers["all"] = ("a thought", ANSWER)
        stage.stub.has_thinking_switch = True
        chat.open()
        chat.ask("first")
        stage.stub.skipped = 2
        chat.ask("all")
        chat.see(".footnotes")
        chat.page.locator(".reasoning summary").last.click()
        chat.send("refuse 422")
        chat.see(".notice")
        assert violations(chat) == []
        for button, dialog in (("settings", "settings"), ("model", "model-dialog")):
            chat.page.locator(f"#open-{button}").click()
            chat.see(f"#{dialog}")
            assert violations(chat) == []
            chat.page.keyboard.press("Escape")
        if device == "phone":
            chat.page.locator("#open-sidebar").click()
        chat.page.locator("[data-opens='keys']").click()
        assert violations(chat) == []
        chat.page.keyboard.press("Escape")
        chat.page.locator(".chat-more").first.click()
        chat.see("#chat-menu")
        assert violations(chat) == []
