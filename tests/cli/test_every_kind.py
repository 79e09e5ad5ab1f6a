"""Every kind of checkpoint through the verbs that run a model.

Oracle: the Hugging Face folder that each was made of, with the same weights bit for bit, so the
greedy text is the same to the letter.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import (
    TOKENIZER_FILES,
    advised,
    as_the_demo_leaves_it,
    converted,
    greedy_ids,
    llama_gguf,
    split_gguf,
)
from command import Done, run
from openai import OpenAI
from serving import serving

import rorqual
from patience import HANG_SECONDS

TINY = Path(rorqual.__file__).parent / "tiny"
KINDS = ("shards", "demo shards", "gguf", "gguf folder", "gguf by another name", "split gguf")
PROMPTS = ("The sea", "3 feet in inches", "What day is it 10 days after Monday?")


@pytest.fixture(scope="module")
def kinds(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    shards = converted(model_folder, root / "shards", "shards:2")
    demo = as_the_demo_leaves_it(shards, root / "demo")
    shutil.copy(shards / "model_args.json", demo)
    (root / "folder").mkdir()
    gguf = converted(model_folder, root / "folder/sei-F32.gguf", "gguf:F32")
    shutil.copy(model_folder / "chat.json", root / "folder")
    shutil.copy(gguf, root / "weights.bin")
    split = split_gguf(model_folder, root / "parts.gguf")
    paths = (shards, demo, gguf, root / "folder", root / "weights.bin", split)
    return dict(zip(KINDS, paths, strict=True))


def generate(model: object, prompt: str = "The sea", *flags: object) -> Done:
    greedy = ("--temperature", 0, "--max-new-tokens", 24, "--json")
    return run("generate", "--model", model, "--prompt", prompt, *greedy, *flags)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_greedy_text(model_folder: Path, kinds: dict[str, Path], kind: str) -> None:
    for flags in ((), ("--raw",), ("--dtype", "bfloat16"), ("--dtype", "stored")):
        wanted = generate(model_folder, "The sea", *flags)
        assert wanted.code == 0
        assert json.loads(wanted.out)["usage"]["completion_tokens"] == 24
        assert generate(kinds[kind], "The sea", *flags) == wanted


def test_the_same_text_by_the_checkpoints_own_advice(model_folder: Path, tmp_path: Path) -> None:
    """Several ends, a penalty, and no sampling, which the flags do not say."""

    def advised_text(model: Path) -> tuple[str, int]:
        flags = ("--prompt", "The sea", "--max-new-tokens", 24, "--json")
        done = run("generate", "--model", model, *flags)
        assert done.code == 0, done.err
        answer = json.loads(done.out)
        return answer["text"], answer["usage"]["completion_tokens"]

    advice = {"repetition_penalty": 1.6, "do_sample": False}
    endless = advised(model_folder, tmp_path / "endless", **advice)
    text, num_tokens = advised_text(endless)
    assert num_tokens == 24
    assert text != json.loads(generate(model_folder).out)["text"], "the penalty is not seen"
    ids = greedy_ids(endless, "The sea", 24)
    new = [token_id for place, token_id in enumerate(ids) if ids.index(token_id) == place]
    ends = [1, 9, new[9], new[6]]
    folder = advised(model_folder, tmp_path / "hf", **advice, eos_token_id=ends)
    wanted = advised_text(folder)
    assert 0 < wanted[1] < 24
    assert wanted[1] == ids.index(new[6]) + 1
    for name, to in (("shards", "shards:2"), ("a.gguf", "gguf:F32")):
        assert advised_text(converted(folder, tmp_path / name, to)) == wanted, to


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(TINY, tmp_path_factory.mktemp("tiny") / "tiny.gguf", "gguf:F32")


def test_the_bundled_model_says_the_same(tiny_gguf: Path, tmp_path: Path) -> None:
    """FP8 in the folder and in the shards, float32 in the GGUF file."""
    shards = converted(TINY, tmp_path / "shards", "shards:1", keep_mtp=True)
    for prompt in PROMPTS:
        wanted = generate("tiny", prompt)
        assert len(json.loads(wanted.out)["text"]) > 8
        assert generate(shards, prompt) == wanted
        assert generate(tiny_gguf, prompt) == wanted


@pytest.mark.parametrize(
    "to",
    [
        "gguf:Q8_0",
        *(pytest.param(to, marks=pytest.mark.slow) for to in ("gguf:Q4_K_M", "shards:1", "fp8")),
    ],
)
def test_what_runs_as_it_is_stored_says_the_same(to: str, tmp_path: Path) -> None:
    """As the same file decoded to float32: generated, and in a chat, where MTP drafts."""
    made = converted(TINY, tmp_path / ("m.gguf" if to.startswith("gguf") else "m"), to)
    stored, decoded = ("--dtype", "stored"), ("--dtype", "float32")
    assert generate(made, PROMPTS[1], *stored) == generate(made, PROMPTS[1], *decoded)
    chat = ("chat", "--model", made, "--temperature", 0, "--max-new-tokens", 12)
    assert run(*chat, *stored, input=PROMPTS[2]) == run(*chat, *decoded, input=PROMPTS[2])


def test_bfloat16_shards_say_what_the_bfloat16_folder_says(tmp_path: Path) -> None:
    folder = converted(TINY, tmp_path / "bf16", "bf16")
    shards = converted(TINY, tmp_path / "shards", "shards:4:bf16")
    for prompt in PROMPTS:
        assert generate(shards, prompt) == generate(folder, prompt)


@pytest.mark.parametrize("kind", ["demo shards", "gguf", "split gguf"])
def test_chat(model_folder: Path, kinds: dict[str, Path], kind: str) -> None:
    flags = ("--temperature", 0, "--max-new-tokens", 12)
    said = "The sea\nThe whale\n/clear\nThe sea\n"
    wanted = run("chat", "--model", model_folder, *flags, input=said)
    assert wanted.code == 0
    assert wanted.out.strip()
    assert run("chat", "--model", kinds[kind], *flags, input=said) == wanted


def test_eval(tiny_gguf: Path) -> None:
    flags = ("--tasks", "arithmetic", "--questions", 8, "--json")
    wanted = run("eval", "tiny", *flags)
    assert json.loads(wanted.out)["tasks"][0]["total"] == 8
    assert run("eval", tiny_gguf, *flags) == wanted


@pytest.mark.parametrize(("kind", "dtype"), [("shards", "auto"), ("split gguf", "stored")])
def test_serve(model_folder: Path, kinds: dict[str, Path], kind: str, dtype: str) -> None:
    wanted = json.loads(generate(model_folder).out)["text"]
    flags = ("--cache-memory", "64MiB", "--dtype", dtype)
    with serving(kinds[kind], *flags) as (_, address):
        client = OpenAI(base_url=address + "/v1", api_key="none", timeout=HANG_SECONDS)
        (served,) = client.models.list()
        assert served.id == {"shards": "shards", "split gguf": "parts"}[kind]
        answer = client.chat.completions.create(
            model=served.id,
            messages=[{"role": "user", "content": "The sea"}],
            temperature=0,
            max_tokens=24,
        )
    assert answer.choices[0].message.content == wanted


VERBS = (("generate", "--prompt", "a"), ("chat",), ("serve", "--port", 0), ("demo-generate",))


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])
def test_another_architecture_is_refused_by_name(tmp_path: Path, verb: tuple[object, ...]) -> None:
    flag = "--ckpt-path" if verb[0] == "demo-generate" else "--model"
    source = ("--interactive",) if verb[0] == "demo-generate" else ()
    done = run(*verb, flag, llama_gguf(tmp_path / "llama.gguf"), *source)
    assert (done.code, done.out) == (2, "")
    assert "architecture llama" in done.err
    assert "rorqual inspect" in done.err


def test_a_tokenizer_of_ones_own(
    model_folder: Path, kinds: dict[str, Path], tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(kinds["shards"], bare)
    for name in TOKENIZER_FILES:
        (bare / name).unlink()
    done = generate(bare)
    assert (done.code, done.out) == (2, "")
    assert "tokenizer.json" in done.err
    assert "--tokenizer" in done.err
    wanted = generate(model_folder)
    for tokenizer in (model_folder, model_folder / "tokenizer.json", kinds["gguf"]):
        assert generate(bare, "The sea", "--tokenizer", tokenizer) == wanted
    (bare / "chat.json").unlink()  # so that nothing but the tokenizer's template says "chat"
    assert generate(bare, "The sea", "--tokenizer", kinds["gguf"]) == wanted


def test_a_file_that_is_no_gguf(model_folder: Path, tmp_path: Path) -> None:
    done = generate(model_folder / "model.safetensors")
    assert done.code == 2
    assert "name the folder" in done.err
    (tmp_path / "m.gguf").write_text("no weights")
    done = generate(tmp_path / "m.gguf")
    assert done.code == 2
    assert "GGUF" in done.err
    assert "no such" not in done.err


def test_shards_without_a_configuration(kinds: dict[str, Path], tmp_path: Path) -> None:
    done = generate(as_the_demo_leaves_it(kinds["shards"], tmp_path / "bare"))
    assert done.code == 2
    assert "model_args.json" in done.err
