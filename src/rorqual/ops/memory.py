"""Memory of a process that is resident, now and at most; pages of a mapped file count once."""

from __future__ import annotations

import re
import sys
from pathlib import Path

_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)
_NOW = re.compile(r"^VmRSS:\s+(\d+) kB$", re.MULTILINE)


def resident_bytes() -> int | None:
    """Of this process, now; None where the system does not say."""
    return _read("self", _NOW)


def peak_bytes(process_id: int | str = "self") -> int | None:
    """Of a process that runs; None where the system does not say, or the process has ended."""
    if (found := _read(process_id, _PEAK)) is not None:
        return found
    if process_id != "self" or sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _read(process_id: int | str, pattern: re.Pattern[str]) -> int | None:
    try:
        found = pattern.search(Path(f"/proc/{process_id}/status").read_text())
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024
