"""Memory of a process that is resident, now and at most; pages of a mapped file count once."""

from __future__ import annotations

import re
import sys
from pathlib import Path

_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)
_NOW = re.compile(r"^VmRSS:\s+(\d+) kB$", re.MULTILINE)


def memory_bytes(process_id: int | str = "self") -> tuple[int | None, int | None]:
    """Now, and at most, of a process that runs; None where the system does not say, or the process
    has ended.
    """
    try:
        text = Path(f"/proc/{process_id}/status").read_text()
    except OSError:
        return None, _largest(process_id)
    now, peak = _NOW.search(text), _PEAK.search(text)
    most = int(peak[1]) * 1024 if peak else _largest(process_id)
    return int(now[1]) * 1024 if now else None, most


def peak_bytes(process_id: int | str = "self") -> int | None:
    """The second of `memory_bytes`."""
    return memory_bytes(process_id)[1]


def _largest(process_id: int | str) -> int | None:
    """As other systems than Linux count it, of this process alone."""
    if process_id != "self" or sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
