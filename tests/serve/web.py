"""httpx's calls with patience: its own limit of five seconds is met by a busy machine."""

from __future__ import annotations

from functools import partial

import httpx

from patience import HANG_SECONDS

get = partial(httpx.get, timeout=HANG_SECONDS)
head = partial(httpx.head, timeout=HANG_SECONDS)
options = partial(httpx.options, timeout=HANG_SECONDS)
post = partial(httpx.post, timeout=HANG_SECONDS)
stream = partial(httpx.stream, timeout=HANG_SECONDS)
