"""How far the same weights' logits lie apart on different ways: `python benchmarks/logit_gap.py`.

Relative error ||a - b|| / ||b|| over all logits of the bundled model, against float32 with
gradients. In float32 a test holds all ways to 1e-5 (tests/engine/test_same_logits.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from rorqual.weights import ModelFolder

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/engine"))
from test_same_logits import TEXT, gap, logits_by_engine

ONE_BY_ONE, AT_ONCE = [1], [1000]


def main() -> None:
    folder = ModelFolder.find("tiny")
    tokens = folder.load_tokenizer().encode(TEXT, bos=True)
    ids_1T = torch.tensor([tokens])
    wanted = folder.load_model("float32")(ids_1T)[0].detach()
    print(f"{'':10}{'gradients':>12}{'no gradients':>14}{'prompt':>12}{'one by one':>12}")
    for dtype in ("float32", "bfloat16"):
        model = folder.load_model(dtype)
        with_gradients = model(ids_1T)[0].detach()
        with torch.no_grad():
            without = model(ids_1T)[0]
        ways = [with_gradients, without]
        ways += [logits_by_engine(model, tokens, chunks) for chunks in (AT_ONCE, ONE_BY_ONE)]
        gaps = [f"{gap(way, wanted):.2e}" for way in ways]
        print(f"{dtype:10}{gaps[0]:>12}{gaps[1]:>14}{gaps[2]:>12}{gaps[3]:>12}")


if __name__ == "__main__":
    main()
