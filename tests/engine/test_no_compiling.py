"""Nothing is compiled while a model answers: the first answer would wait for it.

Oracle: torch's compiler is no module of a process that has loaded and answered. It is torch alone
that imports it, at the first call of a function that is compiled, or of a custom operator.
"""

from __future__ import annotations

import forked
from patience import HANG_SECONDS

ANSWERS = """
from rorqual.engine import Engine, Grammar, SamplingParams

for options in (
    {},
    {"dtype": "stored"},
    {"dtype": "float32", "kernels": "torch"},
    {"dtype": "bfloat16", "kernels": "widened"},
):
    engine = Engine("tiny", speculate=1, **options)
    same = Engine(engine.model, engine.tokenizer, is_batch_invariant=True)
    prompts = [list(range(3, 3 + length)) for length in (1, 40)]
    for each in (engine, same):
        each.generate(prompts, SamplingParams(max_tokens=2, logprobs=1))
        print(options, compilers())
engine.generate(prompts, SamplingParams(max_tokens=2, grammar=Grammar("regex", "[a-c]{8}")))
print("grammar", compilers())
"""
COMPILES = """
import torch
torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
print(compilers())
"""
COMPILERS = """
import sys

def compilers():
    return [name for name in ("torch._inductor", "torch._dynamo") if name in sys.modules]
"""


def lines_of(program: str) -> list[str]:
    done = forked.run("-c", COMPILERS + program, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().splitlines()


def test_answers_import_no_compiler() -> None:
    found = lines_of(ANSWERS)
    assert len(found) == 9
    assert [line for line in found if not line.endswith(" []")] == []


def test_a_compiler_would_be_seen() -> None:
    assert "torch._dynamo" in lines_of(COMPILES)[-1]
