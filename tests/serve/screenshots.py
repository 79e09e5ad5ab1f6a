"""Takes the pictures of docs/images: `python tests/serve/screenshots.py [FOLDER]`.

The answers are scripted (`page_stub.py`), so that the pictures change only with the page.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import page_stub
from browser import launch

MAX_BYTES = 200_000
FOLDER = Path(__file__).parents[2] / "docs" / "images"
ATTENTION = """Multi-head **latent** attention (§2.1.1 of the report) keeps one small vector per \
token instead of all keys and values:

1. A projection squeezes the hidden state into `kv_lora_rank` values, the *latent*.
2. Keys and values are expanded from it when they are needed.
3. A few more values carry the position, by [rotary embedding](https://arxiv.org/abs/2104.09864).

| Cache of one token and layer | Values | Share |
|:--|--:|--:|
| All heads (128 × 128, keys and values) | 32,768 | 100 % |
| Latent and position (512 + 64) | 576 | **1.8 %** |

In code, the cache's whole content is one line:

```python
latent_TC = self.kv_norm(h_TD @ self.wkv_a[:, :kv_lora_rank])
```
"""
THOUGHTS = (
    "The reader asks about the cache. V3 has 128 heads of 128; the latent has 512 + 64 values."
)
STORY = """Mia was a small whale who lived in a wide blue bay. One day she lost her shell.

"Do not be sad," said a kind crab. "We will look together." They looked under the stones and \
behind the weeds, and there it was!

Mia was so happy that she sang. The whole bay heard her song."""
SUM = "347 + 586 = **933**"


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stub = page_stub.start()
    stub.answers = {
        "How does latent attention save memory?": (THOUGHTS, ATTENTION),
        "Tell me a short story about a whale": ("", STORY),
        "What is 347 + 586?": ("", SUM),
    }
    stub.piece_seconds = 0.04
    desktop: dict[str, Any] = {"viewport": {"width": 1240, "height": 800}}
    phone: dict[str, Any] = {
        "viewport": {"width": 390, "height": 780},
        "has_touch": True,
        "is_mobile": True,
        "device_scale_factor": 1.5,
    }
    with launch() as browser:
        for name, options, question in [
            (
                "chat-light",
                {**desktop, "color_scheme": "light"},
                "How does latent attention save memory?",
            ),
            (
                "chat-dark",
                {**desktop, "color_scheme": "dark"},
                "How does latent attention save memory?",
            ),
            (
                "chat-phone",
                {**phone, "color_scheme": "light"},
                "Tell me a short story about a whale",
            ),
            ("chat-start", {**desktop, "color_scheme": "light"}, None),
        ]:
            page = browser.new_context(**options).new_page()
            page.goto(stub.url)
            if question:
                for asked in ("What is 347 + 586?", question):
                    page.locator(
                        "#new-chat" if page.locator("#new-chat").is_visible() else "#new-chat-bar"
                    ).click()
                    page.locator("#composer-text").fill(asked)
                    page.locator("#send").click()
                    page.locator(".figures").wait_for()
            page.mouse.move(0, 0)
            page.wait_for_timeout(400)
            path = folder / f"{name}.png"
            page.screenshot(path=path)
            assert path.stat().st_size < MAX_BYTES, f"{path}: {path.stat().st_size} bytes"
            print(path, path.stat().st_size)
            page.context.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
