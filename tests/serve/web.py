"""httpx's calls with patience: its own limit of five seconds is met by a busy machine.

And without certificates, which nothing here has: to load them for each call took 30 ms.
"""

from __future__ import annotations

import ssl
from functools import partial
from typing import Any

import httpx

from patience import HANG_SECONDS

PLAIN: dict[str, Any] = {
    "timeout": HANG_SECONDS,
    "verify": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
}
get = partial(httpx.get, **PLAIN)
head = partial(httpx.head, **PLAIN)
options = partial(httpx.options, **PLAIN)
post = partial(httpx.post, **PLAIN)
stream = partial(httpx.stream, **PLAIN)
request = partial(httpx.request, **PLAIN)
