"""lm-eval asks the server, the weights through our adapter, and transformers: the same scores.

Oracles: lm-eval's own clients of OpenAI's routes and its own `hf` model over a float32 export. The
engines compute batch-invariantly, so that a log-likelihood is the same float wherever it was asked
for and in whatever company; transformers sums in another order.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval_questions as questions
import pytest
import torch

from patience import HANG_SECONDS
from rorqual.errors import UsageError
from rorqual.tokenizer import Tokenizer
from rorqual.weights import ModelFolder, save

ROOT = Path(__file__).parents[2]
FOLDER = ModelFolder.find("tiny").path
BOTH = ["rorqual_choice", "rorqual_arithmetic"]
# float32 sums in another order, over up to a hundred tokens whose logits are of order 10.
LIKELIHOOD_ABSOLUTE = 1e-3
needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is missing: pip install 'rorqual[eval]'"
)
slow = [pytest.mark.slow, needs_lm_eval]


@dataclass
class Scored:
    """The scores by task and metric, and what each question was answered."""

    scores: dict[str, dict[str, float]]
    answers: dict[str, list[Any]]


Harness = Callable[[str, dict[str, Any], list[str], bool], Scored]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    """lm-eval's `simple_evaluate` over the tasks beside this file, without its network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # the tasks name their data from there
        import datasets
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        import rorqual.eval.lm_eval_model  # noqa: F401  registers `rorqual`

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        manager = TaskManager(include_path=str(questions.TASKS), include_defaults=False)

        def run(model: str, settings: dict[str, Any], tasks: list[str], is_chat: bool) -> Scored:
            found = simple_evaluate(
                model=model,
                model_args=settings,
                tasks=tasks,
                task_manager=manager,
                apply_chat_template=is_chat,
                bootstrap_iters=0,
            )
            assert found is not None
            return Scored(
                {
                    task: {k: v for k, v in values.items() if isinstance(v, float)}
                    for task, values in found["results"].items()
                },
                {task: list(map(answer_of, rows)) for task, rows in found["samples"].items()},
            )

        yield run


def answer_of(row: dict[str, Any]) -> Any:
    """One question's log-likelihoods or text, as plain lists: some clients give tuples."""
    return json.loads(json.dumps([row["doc_id"], row["resps"], row["filtered_resps"]]))


class Served(NamedTuple):
    """The clients' settings."""

    completions: dict[str, Any]
    chat: dict[str, Any]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """`rorqual serve` as a program, with one thread as the tests have."""
    flags = "serve --model tiny --port 0 --threads 1 --batch-invariant --max-batch 6"
    flags += " --dtype float32"
    command = [sys.executable, "-m", "rorqual", *flags.split()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline() + process.stderr.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert address is not None, line + process.stderr.read()
        common = {
            "model": "tiny",
            "tokenizer": str(FOLDER),
            "tokenizer_backend": "huggingface",
            "max_length": 256,
            "num_concurrent": 4,
        }
        yield Served(
            common | {"base_url": f"{address[0]}/v1/completions"},
            {
                "model": "tiny",
                "base_url": f"{address[0]}/v1/chat/completions",
                "num_concurrent": 4,
            },
        )
    finally:
        process.kill()
        process.communicate()


def weights(**settings: Any) -> dict[str, Any]:
    """As transformers computes."""
    fixed = {"pretrained": "tiny", "is_batch_invariant": True, "batch_size": 7}
    return fixed | {"dtype": "float32"} | settings


def test_the_questions_are_those_of_the_held_out_split() -> None:
    for name in questions.FILES:
        stored = (questions.TASKS / name).read_text(encoding="utf-8")
        assert stored == questions.lines(name), "run tests/eval/lm_eval_questions.py"
        num_lines = stored.count("\n")
        assert num_lines >= (4 if name == "stories.jsonl" else 15)


class TestScores:
    pytestmark = slow

    def test_of_chats(self, harness: Harness, served: Served, tmp_path: Path) -> None:
        direct = harness("rorqual", weights(), BOTH, True)
        assert 0.4 < direct.scores["rorqual_choice"]["acc,none"] < 1, "says nothing"
        assert 0.6 < direct.scores["rorqual_arithmetic"]["exact_match,last_number"] <= 1
        drafted = harness("rorqual", weights(speculate=2, batch_size=3), BOTH, True)
        assert drafted == direct
        assert harness("local-completions", served.completions, BOTH, True) == direct
        chatted = harness("local-chat-completions", served.chat, BOTH[1:], True)
        assert chatted.scores == {BOTH[1]: direct.scores[BOTH[1]]}
        assert chatted.answers == {BOTH[1]: direct.answers[BOTH[1]]}
        stored = harness("rorqual", weights(dtype="stored"), BOTH, True)
        assert stored.scores == direct.scores
        assert stored.answers[BOTH[1]] == direct.answers[BOTH[1]]
        self.compare_with_transformers(harness, direct, tmp_path)

    def compare_with_transformers(self, harness: Harness, ours: Scored, folder: Path) -> None:
        tiny = ModelFolder.find("tiny")
        save(tiny.load_model("float32"), folder / "export", tokenizer=tiny.load_tokenizer())
        settings = {"pretrained": str(folder / "export"), "dtype": "float32", "device": "cpu"}
        theirs = harness("hf", settings | {"batch_size": 4}, BOTH, True)
        assert theirs.scores == ours.scores
        assert theirs.answers[BOTH[1]] == ours.answers[BOTH[1]]
        found, wanted = likelihoods(ours), likelihoods(theirs)
        assert found.shape == wanted.shape == (2 * questions.NUM_QUESTIONS, 4)
        torch.testing.assert_close(found, wanted, atol=LIKELIHOOD_ABSOLUTE, rtol=0)

    def test_of_plain_texts(self, harness: Harness, served: Served) -> None:
        """The server puts begin-of-sentence before a text, and takes ids as they are."""
        ids = harness("local-completions", served.completions, BOTH, False)
        assert ids == harness("rorqual", weights(add_bos_token=False), BOTH, False)
        texts = served.completions | {"tokenized_requests": False}
        begun = harness("local-completions", texts, BOTH, False)
        assert begun == harness("rorqual", weights(), BOTH, False)
        assert begun != ids

    def test_of_texts_longer_than_the_context(self, harness: Harness, served: Served) -> None:
        rolled = harness("rorqual", weights(), ["rorqual_stories"], False)
        assert rolled == harness(
            "local-completions", served.completions, ["rorqual_stories"], False
        )
        assert 0 < rolled.scores["rorqual_stories"]["bits_per_byte,none"] < 1


def likelihoods(scored: Scored) -> torch.Tensor:
    """By question and choice; lm-eval's [[[log-likelihood, is greedy]], ...] of every question."""
    rows = [[choice[0][0] for choice in resps] for _, resps, _ in scored.answers[BOTH[0]]]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.slow
@needs_lm_eval
def test_the_command_line(tmp_path: Path) -> None:
    arguments = [
        *("run --model rorqual --model_args pretrained=tiny --apply_chat_template".split()),
        *(f"--tasks rorqual_arithmetic --include_path {questions.TASKS} --limit 3".split()),
        *("--output_path", str(tmp_path / "scores")),
    ]
    subprocess.run(
        [sys.executable, "-m", "rorqual.eval.lm_eval_model", *arguments],
        check=True,
        cwd=ROOT,
        timeout=HANG_SECONDS,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "datasets")},
    )
    [file] = (tmp_path / "scores").rglob("results*.json")
    results = json.loads(file.read_text(encoding="utf-8"))["results"]["rorqual_arithmetic"]
    assert results["exact_match,last_number"] == pytest.approx(1, abs=0.34)


@pytest.mark.slow
@needs_lm_eval
def test_what_cannot_be_scored_is_refused() -> None:
    from lm_eval.api.instance import Instance

    from rorqual.eval.lm_eval_model import RorqualLM

    model = RorqualLM("tiny")

    def ask(kind: Any, *arguments: Any) -> Any:
        instance = Instance(request_type=kind, doc={}, arguments=arguments, idx=0)
        return getattr(model, kind)([instance], disable_tqdm=True)

    with pytest.raises(UsageError, match="'num_beams'"):
        ask("generate_until", "The", {"until": ["\n"], "num_beams": 4})
    with pytest.raises(UsageError, match="do not fit"):
        ask("generate_until", "The", {"until": ["\n"], "max_gen_toks": 255})
    with pytest.raises(UsageError, match="continuation"):
        ask("loglikelihood", "The", " whale" * 300)
    # The context is cut instead: its end is what the continuation follows.
    [(cut, _)] = ask("loglikelihood", "a fox and " * 200, "a dog")
    assert -100 < cut < 0


@pytest.mark.slow
@needs_lm_eval
def test_answers_end_where_the_checkpoint_says(tmp_path: Path) -> None:
    """Oracle: the same answer without the end, cut before it; a task's own ends come first."""
    from lm_eval.api.instance import Instance

    from rorqual.eval.lm_eval_model import RorqualLM

    def answer(folder: Path, **settings: Any) -> str:
        asked = {"until": [], "max_gen_toks": 20, "ignore_eos": True} | settings
        instance = Instance("generate_until", {}, ("A fox and a crow", asked), 0)
        [text] = RorqualLM(str(folder)).generate_until([instance], disable_tqdm=True)
        return text

    shutil.copytree(FOLDER, tmp_path / "tiny")
    text = answer(tmp_path / "tiny")
    ids = ModelFolder.find("tiny").load_tokenizer().encode(text, allow_special=True)
    end_id = next(each for at, each in enumerate(ids) if at > 2 and each not in ids[:at])
    table = json.dumps({"eos_token_id": [1, end_id]})
    (tmp_path / "tiny" / "generation_config.json").write_text(table)
    cut = answer(tmp_path / "tiny")
    assert 0 < len(cut) < len(text)
    assert text.startswith(cut)
    assert answer(tmp_path / "tiny", stop_token_ids=()) == text


@pytest.mark.slow
@needs_lm_eval
def test_a_template_ends_where_the_answer_goes_on() -> None:
    """Oracle: transformers' rendering, which lm-eval's own models use."""
    from transformers import AutoTokenizer

    from rorqual.eval.lm_eval_model import RorqualLM

    model, theirs = RorqualLM("tiny"), AutoTokenizer.from_pretrained(FOLDER)
    assert isinstance(model.tokenizer, Tokenizer)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "7 + 8?"}]
    begun = [*turns, {"role": "assistant", "content": "Answer:"}]
    for chat, is_question in ((turns, True), (begun, False)):
        text = model.apply_chat_template(chat, is_question)
        assert text == theirs.apply_chat_template(
            chat,
            tokenize=False,
            add_generation_prompt=is_question,
            continue_final_message=not is_question,
        )
        ids = model.tok_encode(text)
        assert ids == theirs(text, add_special_tokens=False).input_ids
        assert ids.count(model.tokenizer.bos_id) == 1
    assert model.tok_encode("Once")[0] == model.tokenizer.bos_id
    assert model.tok_encode("Once", add_special_tokens=False)[0] != model.tokenizer.bos_id
