"""What replies of every route are made with: ids, and JSON that is one line to every reader."""

from __future__ import annotations

import secrets

LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
"""Line breaks that only Unicode knows, which JSON leaves as they are: for `str.translate`."""


def new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(12)
