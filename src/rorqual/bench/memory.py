"""The most memory that a process had resident; pages of a mapped file count once."""

from __future__ import annotations

import re
import sys
from pathlib import Path

_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)


def peak_bytes(process_id: int | str = "self") -> int | None:
    """Of a process that runs; None where the system does not say, or the process has ended."""
    try:
        found = _PEAK.search(Path(f"/proc/{process_id}/status").read_text())
    except OSError:
        found = None
    if found is not None:
        return int(found[1]) * 1024
    if process_id != "self" or sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
