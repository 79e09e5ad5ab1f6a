"""`rorqual demo-generate`, the flags of DeepSeek's generate.py. Oracle: `rorqual generate` and
`rorqual chat` on the Hugging Face folder that the shards were made of.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from checkpoints import advised, as_the_demo_leaves_it, converted, greedy_ids
from command import Done, run, start

import rorqual
from patience import HANG_SECONDS

PROMPTS = [f"{number} whales" for number in range(11)]  # the demo takes eight
TINY = Path(rorqual.__file__).parent / "tiny"


@pytest.fixture(scope="module")
def demo(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, configuration) as the demo's converter leaves them: in two places."""
    root = tmp_path_factory.mktemp("demo")
    shards = converted(model_folder, root / "shards", "shards:2")
    return as_the_demo_leaves_it(shards, root / "ckpt"), shards / "model_args.json"


def demo_run(demo: tuple[Path, Path], *flags: object, input: str = "") -> Done:
    """Runs it in this process."""
    return run("demo-generate", "--ckpt-path", demo[0], "--config", demo[1], *flags, input=input)


def program(demo: tuple[Path, Path], *flags: object, input: str = "") -> tuple[int, str, str]:
    """Runs it as a program of its own."""
    process = start("demo-generate", "--ckpt-path", demo[0], "--config", demo[1], *flags)
    out, err = process.communicate(input.encode(), timeout=HANG_SECONDS)
    return process.returncode, out.decode(), err.decode()


def test_an_input_file(model_folder: Path, demo: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"  {prompt} " for prompt in PROMPTS), encoding="utf-8")
    flags = ("--temperature", 0, "--max-new-tokens", 9)
    code, out, err = program(demo, "--input-file", file, *flags)
    assert (code, err) == (0, "")
    wanted = ""
    for prompt in PROMPTS:
        done = run("generate", "--model", model_folder, "--prompt", prompt, *flags, "--json")
        wanted += f"Prompt: {prompt}\nCompletion: {json.loads(done.out)['text']}\n\n"
    assert out == wanted


def test_a_file_of_any_name_is_plain_text(demo: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n\n', encoding="utf-8")
    checkpoint = ("demo-generate", "--ckpt-path", demo[0], "--config", demo[1])
    done = run(*checkpoint, "--input-file", file, "--max-new-tokens", 3)
    assert done.out.startswith('Prompt: {"prompt": "a"}\nCompletion: ')
    assert done.out.count("Prompt:") == 1


def test_interactive(model_folder: Path, demo: tuple[Path, Path]) -> None:
    flags = ("--temperature", 0, "--max-new-tokens", 9)
    said = "The sea\nThe whale\n/clear\nThe sea\n/exit\nunheard\n"
    code, out, err = demo_run(demo, "--interactive", *flags, input=said)
    assert code == 0
    assert "Traceback" not in err
    wanted = run("chat", "--model", model_folder, *flags, input=said)
    assert out == wanted.out
    first = run("generate", "--model", model_folder, "--prompt", "The sea", *flags).out
    assert out.startswith(first)
    assert out.endswith(first)
    assert len(out) > 2 * len(first)


def test_its_defaults_are_the_demos(demo: tuple[Path, Path], model_folder: Path) -> None:
    """200 tokens at temperature 0.2, whatever the model advises; the same text each time."""
    code, out, _ = demo_run(demo, "--interactive", input="The sea\n")
    assert code == 0
    flags = ("--temperature", 0.2, "--max-new-tokens", 200, "--seed", 0)
    wanted = run("generate", "--model", model_folder, "--prompt", "The sea", *flags)
    assert out == wanted.out
    help_text = re.sub(r"\s+", " ", run("demo-generate", "--help").out)
    assert "default: 200" in help_text
    assert "default: 0.2" in help_text


def test_answers_end_where_the_checkpoint_says(model_folder: Path, tmp_path: Path) -> None:
    """At any of its ends, as with `generate`; how to sample, the demo's flags alone say."""
    ids = greedy_ids(model_folder, "The sea", 24)
    end_id = next(
        token_id for place, token_id in enumerate(ids) if ids.index(token_id) == place > 5
    )
    ends = [1, 9, end_id]
    ended = advised(model_folder, tmp_path / "ended", eos_token_id=ends)
    folder = advised(model_folder, tmp_path / "hf", eos_token_id=ends, repetition_penalty=3.0)
    shards = converted(folder, tmp_path / "shards", "shards:2")
    flags = ("--temperature", 0, "--max-new-tokens", 24)
    wanted = run("generate", "--model", ended, "--prompt", "The sea", *flags)
    done = run("demo-generate", "--ckpt-path", shards, "--interactive", *flags, input="The sea\n")
    assert (done.code, done.out) == (0, wanted.out)
    whole = run("generate", "--model", model_folder, "--prompt", "The sea", *flags).out
    assert 1 < len(done.out) < len(whole)


def test_the_configuration_may_lie_in_the_folder(demo: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "ckpt"
    shutil.copytree(demo[0], folder)
    flags = ("--interactive", "--temperature", 0, "--max-new-tokens", 5)
    done = run("demo-generate", "--ckpt-path", folder, *flags, input="The sea\n")
    assert done.code == 2
    assert "model_args.json" in done.err
    shutil.copy(demo[1], folder)
    done = run("demo-generate", "--ckpt-path", folder, *flags, input="The sea\n")
    assert done.out == demo_run(demo, *flags, input="The sea\n").out


def test_shards_with_mtp_run_under_the_demos_configuration(tmp_path: Path) -> None:
    """The demo's configuration has no word for MTP; a main layer too many stays a fault."""
    shards = converted(TINY, tmp_path / "shards", "shards:1", keep_mtp=True)
    args = shards / "model_args.json"
    flags = ("--interactive", "--temperature", 0)
    checkpoint = ("demo-generate", "--ckpt-path", shards, "--config")
    done = run(*checkpoint, args, *flags, input="3 feet in inches\n")
    wanted = run("generate", "--prompt", "3 feet in inches", "--temperature", 0).out
    assert (done.code, done.out) == (0, wanted)
    table = json.loads(args.read_text()) | {"n_layers": 4}
    (tmp_path / "four.json").write_text(json.dumps(table))
    done = run(*checkpoint, tmp_path / "four.json", *flags, input="3 feet in inches\n")
    assert (done.code, done.out) == (2, "")
    assert "unexpected: layers.4" in done.err


def test_what_it_refuses(demo: tuple[Path, Path], model_folder: Path, tmp_path: Path) -> None:
    table = json.loads(demo[1].read_text()) | {"dim": 64}
    (tmp_path / "wide.json").write_text(json.dumps(table))
    (tmp_path / "no.json").write_text('{"dimm": 3}')
    talk = "--interactive"
    for checkpoint, config, flags, words in (
        (demo[0], demo[1], (), "one of --input-file, --interactive"),
        (demo[0], demo[1], ("--input-file", tmp_path / "none.txt"), "no such file"),
        (demo[0], tmp_path / "wide.json", (talk,), "wrong shape"),
        (demo[0], tmp_path / "no.json", (talk,), "no.json"),
        (demo[0], tmp_path / "none.json", (talk,), "none.json"),
        (model_folder, demo[1], (talk,), "--config"),
        (demo[0], demo[1], (talk, "--temperature", -1), "temperature"),
    ):
        done = run("demo-generate", "--ckpt-path", checkpoint, "--config", config, *flags)
        assert (done.code, done.out) == (2, ""), (flags, done)
        assert words in done.err
