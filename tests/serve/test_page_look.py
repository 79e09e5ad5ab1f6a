"""How the chat page looks and is operated: phone, themes, contrast, keyboard, names.

Oracle: the browser's own layout and computed colours; contrast after WCAG 2.2 (§1.4.3: 4.5).
"""

from __future__ import annotations

from typing import Any

import pytest
from stage import PLAYWRIGHT, Chat, Stage, needs_browser

pytest.importorskip("playwright", reason=PLAYWRIGHT)
pytestmark = needs_browser

LONG = "go on for ever"
PHONE: dict[str, Any] = {
    "viewport": {"width": 360, "height": 640},
    "has_touch": True,
    "is_mobile": True,
}
WIDE = f"""# A heading with {"a" * 90}

`{"code_" * 40}` and https://example.org/{"x" * 200}

| {" | ".join(f"column {n}" for n in range(9))} |
|{"--|" * 9}
| {" | ".join(f"value {n}" for n in range(9))} |

```python
{"very_long_line = " * 20}
```

- list
  - deeper
    - {"w" * 120}
"""
MIN_CONTRAST = 4.5
SIDEWAYS = "() => document.documentElement.scrollWidth - innerWidth"


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_nothing_scrolls_sideways(stage: Stage, width: int) -> None:
    with stage.chat(**{**PHONE, "viewport": {"width": width, "height": 640}}) as chat:
        assert chat.page.evaluate(SIDEWAYS) == 0
        question = "w" * 200
        stage.stub.answers[question] = (WIDE, WIDE)
        chat.ask(question)
        chat.page.locator(".reasoning summary").click()
        assert chat.page.evaluate(SIDEWAYS) == 0
        over = chat.page.evaluate(
            """() => [...document.querySelectorAll(".message *")]
              .filter((node) => !node.closest(".table, pre, .visually-hidden"))
              .filter((node) => node.getBoundingClientRect().right > innerWidth + 1)
              .map((node) => node.outerHTML.slice(0, 80))"""
        )
        assert over == []
        assert chat.page.evaluate(
            "() => document.querySelector('#scroller').scrollWidth <= innerWidth"
        )


def test_a_phone_has_its_list_in_a_drawer(stage: Stage) -> None:
    with stage.chat(**PHONE) as chat:
        chat.page.locator("#composer-text").fill("one")
        chat.page.locator("#send").tap()
        chat.answer()
        assert not chat.page.locator("#sidebar").is_visible()
        chat.page.locator("#open-sidebar").tap()
        assert chat.see(".chat-open").inner_text() == "one"
        assert chat.page.evaluate("() => document.querySelector('#main').inert")
        chat.page.keyboard.press("Escape")
        chat.until(
            "() => getComputedStyle(document.querySelector('#sidebar')).visibility === 'hidden'"
        )
        chat.page.locator("#open-sidebar").tap()
        chat.page.locator("#new-chat").tap()
        assert chat.see("#empty").is_visible()
        chat.until("() => !document.querySelector('#main').inert")
        chat.page.locator("#composer-text").press("Enter")  # a new line: a phone has no Shift+Enter
        assert chat.page.locator("#composer-text").input_value() == "\n"
        small = chat.page.evaluate(
            """() => [...document.querySelectorAll("header button, .composer button")]
              .filter((node) => node.offsetParent)
              .filter((node) => Math.min(node.offsetWidth, node.offsetHeight) < 40).length"""
        )
        assert small == 0
        font = (
            "() => parseFloat(getComputedStyle(document.querySelector('#composer-text')).fontSize)"
        )
        assert chat.page.evaluate(font) >= 16  # below that, iOS zooms into the box


CONTRAST = """() => {
  const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const [r, g, b, a = 1] = parse(getComputedStyle(at).backgroundColor);
      if (a === 1) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const isText = (child) => child.nodeType === 3 && child.data.trim();
  const hasText = (node) => [...node.childNodes].some(isText);
  const texts = [...document.querySelectorAll("body *")]
    .filter((node) => node.checkVisibility() && hasText(node) && !node.closest(":disabled"));
  texts.push(document.querySelector("#stop"));
  return texts.map((node) => {
    const both = [light(parse(getComputedStyle(node).color)), light(behind(node))];
    const [a, b] = both.sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), `${node.tagName} ${node.textContent.slice(0, 30)}`];
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_is_legible(stage: Stage, scheme: str) -> None:
    with stage.chat(color_scheme=scheme) as chat:
        assert min(chat.page.evaluate(CONTRAST)) > [MIN_CONTRAST]
        stage.stub.answers["all"] = (
            "thought",
            "# H\n\n> q\n\n`c` [l](https://e.org)\n\n```py\nx\n```\n\n|a|\n|-|\n|b|\n\n1. i",
        )
        chat.ask("all")
        chat.page.locator(".reasoning summary").click()
        chat.send("refuse 422")
        chat.see(".notice")
        assert min(chat.page.evaluate(CONTRAST)) > [MIN_CONTRAST]
        chat.page.locator("#open-settings").click()
        chat.page.locator("#sampling-seed").fill("x")
        assert min(chat.page.evaluate(CONTRAST)) > [MIN_CONTRAST]
        chat.page.keyboard.press("Escape")
        chat.menu("all", "delete")
        assert min(chat.page.evaluate(CONTRAST)) > [MIN_CONTRAST]


PAPER = "() => getComputedStyle(document.body).backgroundColor"


def test_the_theme_follows_the_system_until_it_is_chosen(chat: Chat) -> None:
    chat.page.emulate_media(color_scheme="light")
    light = chat.page.evaluate(PAPER)
    chat.page.emulate_media(color_scheme="dark")
    dark = chat.page.evaluate(PAPER)
    assert light != dark
    chat.page.locator("#theme label", has_text="Light").click()
    assert chat.page.evaluate(PAPER) == light
    chat.page.reload()
    assert chat.page.evaluate(PAPER) == light
    chat.page.locator("#theme label", has_text="As the system").click()
    assert chat.page.evaluate(PAPER) == dark
    other = Chat(chat.page.context.new_page(), chat.url).open()
    other.page.emulate_media(color_scheme="light")
    chat.page.locator("#theme label", has_text="Dark").click()
    other.until(f"() => ({PAPER})() === '{dark}'")


def test_the_keyboard_is_enough(chat: Chat, stage: Stage) -> None:
    keyboard = chat.page.keyboard
    focused = "() => document.activeElement.id"
    assert chat.page.evaluate(focused) == "composer-text"
    keyboard.type("first line")
    keyboard.press("Shift+Enter")
    keyboard.type("second line")
    keyboard.press("Enter")
    chat.answer()
    assert stage.stub.requests[0]["messages"][0]["content"] == "first line\nsecond line"
    assert chat.page.evaluate(focused) == "composer-text"
    keyboard.type(LONG)
    keyboard.press("Enter")
    chat.until("() => document.body.innerText.includes('word2')")
    keyboard.press("Enter")  # nothing is sent meanwhile
    keyboard.press("Escape")
    chat.answer()
    assert len(stage.stub.requests) == 2
    keyboard.press("Control+k")
    assert chat.see("#empty").is_visible()
    assert chat.page.evaluate(focused) == "composer-text"
    # The list's menu: open, walk, close, and the focus is back.
    chat.page.locator(".chat-more").focus()
    keyboard.press("Enter")
    assert chat.page.evaluate(focused) == "menu-rename"
    keyboard.press("ArrowDown")
    assert chat.page.evaluate(focused) == "menu-json"
    keyboard.press("ArrowUp")
    keyboard.press("ArrowUp")
    assert chat.page.evaluate(focused) == "menu-delete"
    keyboard.press("Escape")
    assert "chat-more" in chat.page.evaluate("() => document.activeElement.className")
    keyboard.press("Enter")
    keyboard.press("Enter")
    keyboard.type("named")
    keyboard.press("Enter")
    assert chat.titles() == ["named"]


def test_a_composed_enter_does_not_send(chat: Chat, stage: Stage) -> None:
    """An input method's Enter takes the word (Japanese, Chinese, Korean)."""
    chat.page.locator("#composer-text").fill("にほん")
    chat.page.evaluate(
        "() => document.querySelector('#composer-text').dispatchEvent(new KeyboardEvent('keydown',"
        " { key: 'Enter', isComposing: true, bubbles: true, cancelable: true }))"
    )
    assert stage.stub.requests == []
    chat.page.locator("#composer-text").press("Enter")
    chat.answer()
    assert len(stage.stub.requests) == 1


def test_the_focus_is_visible_everywhere(chat: Chat) -> None:
    chat.ask("hello")
    seen = set()
    for _ in range(30):
        chat.page.keyboard.press("Tab")
        name, is_marked = chat.page.evaluate(
            """() => { const node = document.activeElement;
              const box = node.closest(".composer, .theme label") ?? node;
              const style = getComputedStyle(box);
              return [node.id || node.getAttribute("aria-label") || node.className || node.tagName,
                style.outlineStyle !== "none" || style.boxShadow !== "none"]; }"""
        )
        if name != "BODY":
            seen.add(name)
            assert is_marked, name
    assert {"new-chat", "open-settings", "composer-text", "Copy message", "Edit message"} <= seen


def test_everything_has_a_name(chat: Chat) -> None:
    """Buttons and boxes tell screen readers what they are; answers are announced politely."""
    chat.ask("hello")
    chat.page.locator("#open-settings").click()
    nameless = chat.page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea")].filter((node) => {
          const labels = [...(node.labels ?? [])].map((one) => one.textContent.trim()).join("");
          return !(node.getAttribute("aria-label") || node.textContent.trim() || labels);
        }).map((node) => node.outerHTML)"""
    )
    assert nameless == []
    log = chat.page.locator("#messages")
    assert (log.get_attribute("role"), log.get_attribute("aria-live")) == ("log", "polite")
    assert chat.page.locator("#announcer").inner_text() == "The answer is complete."
    assert chat.page.locator(".message.assistant").get_attribute("aria-busy") == "false"


def test_every_picture_of_the_docs_is_small() -> None:
    from screenshots import FOLDER, MAX_BYTES

    pictures = sorted(FOLDER.glob("chat-*.png"))
    assert [path.stem for path in pictures] == [
        "chat-dark",
        "chat-light",
        "chat-phone",
        "chat-start",
    ]
    assert all(path.stat().st_size < MAX_BYTES for path in pictures)
