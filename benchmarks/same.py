"""Does this commit compute what its parent does? The bytes of 20 losses, logits, tokens and files.

Both run on this machine, on one thread: training with MTP, balance loss and validation, isolated
conversations, a run in bfloat16, greedy and sampled answers with and without drafts, conversions.
`--close OUTPUT ...` names the outputs whose bits may differ: in float32 logits and the first loss
stay within 1e-6, the 20th within 1e-5. Exits with 1 if something differs that must not.

    python benchmarks/same.py                  # the working tree against HEAD; if clean, its parent
    python benchmarks/same.py --parent main    # against another commit
    python benchmarks/same.py --close logits tokens
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CLOSE_LOGITS, CLOSE_FIRST_LOSS, CLOSE_LAST_LOSS = 1e-6, 1e-6, 1e-5


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def unpack(commit: str, folder: Path) -> None:
    command = ["git", "archive", commit, "src"]
    archive = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)


def outputs_of(source: Path, folder: Path) -> dict[str, Any]:
    """What the package under `source` computes."""
    script = Path(__file__).with_name("same_outputs.py")
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(script), str(folder)], env=environment, check=True)
    outputs: dict[str, Any] = json.loads((folder / "outputs.json").read_text())
    return outputs


def differences(parent: Any, child: Any, place: str = "") -> list[str]:
    """The places in two trees of JSON where they differ."""
    if isinstance(parent, dict) and isinstance(child, dict):
        names = dict.fromkeys([*parent, *child])
        pairs = [(f"{place} > {n}" if place else n, parent.get(n), child.get(n)) for n in names]
    elif isinstance(parent, list) and isinstance(child, list) and len(parent) == len(child):
        pairs = [(f"{place}[{i}]", *pair) for i, pair in enumerate(zip(parent, child, strict=True))]
    else:
        return [] if parent == child else [place]
    return [found for where, a, b in pairs for found in differences(a, b, where)]


def distances(parent: dict[str, Any], child: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(what, how far apart, how far it may be) of the float32 outputs."""
    found = []
    for number in (0, 2):  # float32; the others are bfloat16
        found.append((f"logits[{number}]", _gap(parent, child, number), CLOSE_LOGITS))
    for name in parent:
        if name.endswith("float32 losses"):
            for step, limit in ((0, CLOSE_FIRST_LOSS), (-1, CLOSE_LAST_LOSS)):
                gap = abs(parent[name][step]["loss"] - child[name][step]["loss"])
                found.append((f"{name}[{step}]", gap, limit))
    return found


def _gap(parent: dict[str, Any], child: dict[str, Any], number: int) -> float:
    rows = [bytes.fromhex(outputs["logits"][number]) for outputs in (parent, child)]
    values = [struct.unpack(f"<{len(row) // 4}f", row) for row in rows]
    gaps = [abs(a - b) for a, b in zip(*values, strict=True)]
    return math.nan if any(map(math.isnan, gaps)) else max(gaps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parent", help="a commit")
    parser.add_argument("--close", nargs="+", default=[], help="outputs that may differ a little")
    arguments = parser.parse_args()
    is_changed = bool(git("status", "--porcelain", "src"))
    parent_name = arguments.parent or ("HEAD" if is_changed else "HEAD~1")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        unpack(parent_name, folder / "parent")
        # A copy, so that the tree may change meanwhile; and the same paths in both runs, since some
        # files name them.
        shutil.copytree(ROOT / "src", folder / "child" / "src")
        found = []
        for name in ("parent", "child"):
            found.append(outputs_of(folder / name / "src", folder / "outputs"))
            (folder / "outputs").rename(folder / f"outputs-{len(found)}")
    parent, child = found
    different = differences(parent, child)
    short = git("rev-parse", "--short", parent_name)
    print(f"{len(parent)} outputs against {parent_name} ({short})")
    for place in different[:40]:
        print(f"  differs: {place}")
    if not different:
        print("the same bytes")
        return
    changed = {place.split(" > ")[0].split("[")[0] for place in different}
    print(f"changed outputs: {', '.join(sorted(changed))}")
    is_good = changed <= set(arguments.close) and parent.keys() == child.keys()
    if parent.keys() == child.keys():
        for what, gap, limit in distances(parent, child):
            print(f"  {what}: {gap:.2e} apart, at most {limit:g} with --close")
            is_good &= gap <= limit  # false for NaN
    raise SystemExit(0 if is_good else 1)


if __name__ == "__main__":
    main()
