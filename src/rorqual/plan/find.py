"""Hardware by what a user calls it: a name of the table, a file, or this machine."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from rorqual.errors import UsageError
from rorqual.ops.ceilings import this_machine
from rorqual.plan.devices import HARDWARE
from rorqual.plan.hardware import CPU_STEP_TOKENS, HERE, Hardware, Source
from rorqual.plan.machine_file import read_machine

_ALIASES = {
    "ascend910b": "910B",
    "3090": "RTX3090",
    "4090": "RTX4090",
    "5090": "RTX5090",
    "h100sxm": "H100",
    "h200sxm": "H200",
}
_COUNTED = re.compile(r"(?:(\d{1,6})\s*[x×*]\s*)?(.+)", re.IGNORECASE)


def find_hardware(text: str, *, remeasure: bool = False) -> Hardware:
    """`H800`, `8xH200`, `2 x RTX 4090`, `box.toml`, `2xbox.toml`, `here`; UsageError with the list
    for any other name, ConfigError for a file that is none.

    `remeasure` measures this machine although its figures are known; UsageError for another.
    """
    found = _COUNTED.fullmatch(text.strip())
    assert found is not None, "the expression takes any text"
    name = _plain(found[2])
    num_devices = int(found[1] or 1)
    if name == HERE and num_devices == 1:
        return _here(remeasure=remeasure)
    if remeasure:
        raise UsageError("--remeasure is for this machine", found=f"--on {text}", expected=HERE)
    if text.strip().lower().endswith(".toml"):
        return _from_file(text.strip(), found)
    known = {_plain(key): key for key in HARDWARE} | _ALIASES
    if name not in known or num_devices < 1:
        near = [known[plain] for plain in known if name and plain.startswith(name)]
        near = near or [known[p] for p in difflib.get_close_matches(name, known, n=1)]
        raise UsageError(
            f"unknown hardware {text!r}",
            expected=f"{', '.join(HARDWARE)}, {HERE} or a file that ends in .toml, with a number "
            "before it as in 8xH200",
            fix=f"did you mean {' or '.join(near)}?" if near else None,
        )
    return HARDWARE[known[name]].times(num_devices)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()


def _from_file(text: str, counted: re.Match[str]) -> Hardware:
    """The file of that name, if there is one, before a number of them."""
    if Path(text).exists() or not counted[1] or int(counted[1]) < 1:
        return read_machine(Path(text))
    return read_machine(Path(counted[2])).times(int(counted[1]))


def _here(*, remeasure: bool) -> Hardware:
    found = this_machine(remeasure=remeasure)
    return Hardware(
        HERE,
        found.memory_bytes,
        found.bandwidth,
        found.flops,
        Source(f"measured on {found.day}", found.machine, None, is_data_sheet=False),
        step_tokens=CPU_STEP_TOKENS,
        is_cpu=True,
        node_devices=1,
    )
