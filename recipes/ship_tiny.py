"""Makes the folder that ships out of the tiny model's last checkpoint (FP8 projections).

    python recipes/ship_tiny.py runs/tiny-anneal src/rorqual/tiny

The repeated copies of embedding and head in the MTP module are left out; `chat.json` holds what a
chat says first and how the model likes to be sampled.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import rorqual
from rorqual.files import write_json
from rorqual.train.checkpoint import find_checkpoint
from rorqual.weights import load, save

# What it does well on unseen questions (docs/tiny.md); its spelling is too weak to be named here.
OPENING = (
    "Hello! I am Rorqual tiny. I can do sums, dates, units, simple definitions, capitals, "
    "short stories and one-line Python. What would you like?"
)
EXAMPLES = (
    "47 + 85",
    "What day is it 10 days after Monday?",
    "3 feet in inches",
    "what is a castle?",
    "Tell me a story about a fox.",
    "Write Python to add the numbers from 1 to 20.",
)
# Conversations were isolated from each other in training and none was longer than about 205 tokens:
# what lies beyond was never learnt.
CONTEXT = 256
# Sums want the likeliest token, stories want variety: min_p cuts only what is far less likely.
SAMPLING = {"temperature": 0.3, "min_p": 0.3}


def main(run: str, target: str) -> None:
    """Writes `target` anew from the run's latest checkpoint."""
    folder = find_checkpoint(run)
    tokenizer = rorqual.load_tokenizer(str(folder))
    model = load(folder, "float32")
    model.config = replace(model.config, max_position_embeddings=CONTEXT)
    save(
        model,
        target,
        "fp8",
        tokenizer=tokenizer,
        repeat_mtp_embedding=False,
        replace=True,
    )
    card = {"opening": OPENING, "examples": list(EXAMPLES), "sampling": SAMPLING}
    write_json(Path(target) / "chat.json", card)
    size = sum(file.stat().st_size for file in Path(target).iterdir())
    print(f"{folder} -> {target}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(*sys.argv[1:])
