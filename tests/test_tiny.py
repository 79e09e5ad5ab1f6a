"""The model in the package: its size, its form, that others read it, that it does what it says.

Oracles: transformers on the same folder; the skills' own checkers on questions held out of
training. The accuracy floors lie under the lower ends of the intervals in docs/tiny.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import rorqual
from rorqual.corpus_writer import SKILLS
from rorqual.engine import Engine
from rorqual.eval import evaluate_tasks
from rorqual.weights import ModelFolder

FOLDER = Path(rorqual.__file__).parent / "tiny"
pytestmark = pytest.mark.skipif(
    not FOLDER.exists(), reason="the tiny model has not been shipped yet: see docs/log.md"
)
MAX_BYTES = 20_000_000
MAX_STORED_ELEMENTS = 9_100_000
QUESTIONS = 40
FLOAT32_RELATIVE = 1e-5


@pytest.fixture(scope="module")
def engine() -> Engine:
    folder = ModelFolder.find("tiny")
    return Engine(folder.load_model(), folder.load_tokenizer(), max_batch=QUESTIONS)


def test_it_is_small_and_stored_as_the_recipe_says() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < MAX_BYTES
    elements = 0
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
            tensor = file.get_slice(name)
            elements += torch.Size(tensor.get_shape()).numel()
            is_projection = (
                name.endswith(("proj.weight", "proj_with_mqa.weight")) and "eh_proj" not in name
            )
            assert (tensor.get_dtype() == "F8_E4M3") == is_projection, name
            assert "layers.5.embed_tokens" not in name
            assert "layers.5.shared_head.head" not in name
    assert elements < MAX_STORED_ELEMENTS


def test_its_card_is_whole() -> None:
    card = ModelFolder.find("tiny").card()
    assert card.opening is not None
    assert len(card.examples) >= 3


@torch.no_grad()
def test_transformers_computes_the_same(engine: Engine, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, DeepseekV3ForCausalLM

    # Its own FP8 path rounds to bfloat16 on a CPU (tests/weights compares that one).
    model = rorqual.load(FOLDER)
    rorqual.save(model, str(tmp_path / "float32"), dtype="float32")
    theirs = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "float32").eval()
    messages = [{"role": "user", "content": "What is 47 + 85?"}]
    ids = engine.tokenizer.encode_chat(messages)
    rendered = AutoTokenizer.from_pretrained(FOLDER).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert rendered == ids
    ours = model(torch.tensor([ids]))
    logits = theirs(torch.tensor([ids])).logits
    assert float((ours - logits).norm() / logits.norm()) < FLOAT32_RELATIVE


def test_a_first_conversation_succeeds(engine: Engine) -> None:
    from rorqual.engine import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=100)
    asked = {"What is 47 + 85?": "132", "3 feet in inches": "36 inches", "hello": "Hello"}
    prompts = [engine.tokenizer.encode_chat([{"role": "user", "content": q}]) for q in asked]
    for output, expected in zip(engine.generate(prompts, params), asked.values(), strict=True):
        assert expected in output.text
        assert output.finish_reason == "stop"


FLOORS = {"arithmetic": 0.75, "units": 0.75, "python": 0.65, "capitals": 0.6, "opposites": 0.55}


def test_skills_on_unseen_questions(engine: Engine) -> None:
    found = evaluate_tasks(engine, SKILLS.values(), QUESTIONS, seed=7)
    results = {result.task: result for result in found}
    for skill, floor in FLOORS.items():
        assert results[skill].accuracy >= floor, results[skill]


def test_its_folder_survives_load_and_save(tmp_path: Path) -> None:
    model = rorqual.load(str(FOLDER))
    rorqual.save(model, str(tmp_path / "again"), dtype="fp8", repeat_mtp_embedding=False)
    with (
        safe_open(FOLDER / "model.safetensors", "pt") as first,
        safe_open(tmp_path / "again" / "model.safetensors", "pt") as second,
    ):
        assert set(first.keys()) == set(second.keys())
        for name in first.keys():  # noqa: SIM118
            ours, again = first.get_tensor(name), second.get_tensor(name)
            assert torch.equal(ours.view(torch.uint8), again.view(torch.uint8)), name
