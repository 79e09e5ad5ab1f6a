"""A machine on which the C++ kernels were not built: `auto` is what it was before there were any.

Oracle: the answers in float32, which no kernel of theirs computes.
"""

from __future__ import annotations

import json

import forked
from patience import HANG_SECONDS

PROGRAM = """
import json
import sysconfig

sysconfig.get_config_var = lambda name: ".gone"  # the library's name ends so

from rorqual.engine import Engine, SamplingParams
from rorqual.model.served import Served
from rorqual.ops.native import library

prompts = [list(range(3, 3 + length)) for length in (1, 5, 40)]
params = SamplingParams(temperature=0, max_tokens=6)
answers, kernels = {}, {}
for dtype, speculate in (("auto", 0), ("auto", 1), ("float32", 0), ("native", 0)):
    engine = Engine("tiny", dtype=dtype, speculate=speculate)
    parts = [part for part in engine.model.modules() if isinstance(part, Served)]
    found = [output.token_ids for output in engine.generate(prompts, params)]
    answers[f"{dtype}, {speculate}"] = found
    kernels[dtype] = sorted({f"{part.storage()[0]} by {part.kernels.name}" for part in parts})
print(json.dumps({"library": library(), "answers": answers, "kernels": kernels}))
"""


def test_auto_answers_as_float32() -> None:
    done = forked.run("-c", PROGRAM, timeout=HANG_SECONDS)
    told = done.stderr.decode()
    assert done.returncode == 0, told
    found = json.loads(done.stdout)
    assert found["library"] is None
    assert found["kernels"]["auto"] == ["float32 by torch"]
    assert found["kernels"]["native"] == ["BF16 by decoded", "float32 by torch"]
    answers = found["answers"]
    assert answers["auto, 0"] == answers["auto, 1"] == answers["float32, 0"]
    assert len(answers["native, 0"]) == 3
    assert told.count("the C++ kernels were not built here") == 1, "only who names them is told"
