"""Nothing is compiled while a model answers: the first answer would wait for it.

Oracle: torch's compiler is no module of a process that has loaded and answered. It is torch alone
that imports it, at the first call of a function that is compiled, or of a custom operator.
"""

from __future__ import annotations

import pytest

import forked
from patience import HANG_SECONDS

ANSWER = """
import sys
from rorqual.engine import Engine, Grammar, SamplingParams
import torch

engine = Engine("tiny", speculate=1, **OPTIONS)
same = Engine(engine.model, engine.tokenizer, is_batch_invariant=True)
prompts = [list(range(3, 3 + length)) for length in (1, 40)]
for grammar in (None, Grammar("regex", "[a-c]{8}")):
    params = SamplingParams(max_tokens=2, logprobs=1, grammar=grammar)
    engine.generate(prompts, params)
    same.generate(prompts, params)
EXTRA
print([name for name in ("torch._inductor", "torch._dynamo") if name in sys.modules])
"""


def compilers(options: str, extra: str = "") -> str:
    program = ANSWER.replace("OPTIONS", options).replace("EXTRA", extra)
    done = forked.run("-c", program, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


@pytest.mark.parametrize(
    "options",
    [
        "{}",
        "{'dtype': 'stored'}",
        "{'dtype': 'float32', 'kernels': 'torch'}",
        "{'dtype': 'bfloat16', 'kernels': 'widened'}",
    ],
)
def test_answers_import_no_compiler(options: str) -> None:
    assert compilers(options) == "[]"


def test_a_compiler_would_be_seen() -> None:
    extra = "torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1))"
    assert "torch._dynamo" in compilers("{}", extra)
