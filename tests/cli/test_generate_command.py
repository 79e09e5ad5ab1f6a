"""`rorqual generate`. Oracle: the engine in process, each prompt alone."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from command import run, start

from patience import HANG_SECONDS, wait_until
from rorqual.engine import Engine, Output, SamplingParams
from rorqual.weights import ModelFolder


def expected(model_folder: Path, max_tokens: int, *prompts: str, raw: bool = False) -> list[Output]:
    folder = ModelFolder.find(str(model_folder))
    tokenizer = folder.load_tokenizer()
    engine = Engine(folder.load_model(), tokenizer)
    params = SamplingParams(**folder.sampling(max_tokens=max_tokens))
    outputs = []
    for prompt in prompts:
        chat_ids = tokenizer.encode_chat([{"role": "user", "content": prompt}])
        ids = tokenizer.encode(prompt, bos=True) if raw else chat_ids
        outputs += engine.generate([ids], params)
    return outputs


def test_one_prompt_chat_and_raw(model_folder: Path) -> None:
    flags = ("generate", "--model", model_folder, "--prompt", "The sea", "--max-new-tokens", 9)
    assert run(*flags).out == expected(model_folder, 9, "The sea")[0].text + "\n"
    raw = expected(model_folder, 9, "The sea", raw=True)[0]
    assert run(*flags, "--raw").out == raw.text + "\n"
    as_json = json.loads(run(*flags, "--raw", "--json").out)
    assert as_json["text"] == raw.text
    assert as_json["finish_reason"] == raw.finish_reason
    assert as_json["usage"]["completion_tokens"] == len(raw.token_ids)
    usage = as_json["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    stop = raw.text[3:5]
    stopped = run(*flags, "--raw", "--stop", "never", "--stop", stop).out
    assert stopped == raw.text[: raw.text.index(stop)] + "\n"


def test_names_of_special_tokens_in_raw_prompts(model_folder: Path, tmp_path: Path) -> None:
    text = "<|User|>The sea<｜Assistant｜>"
    flags = ("generate", "--model", model_folder, "--max-new-tokens", 5)
    tokenizer = ModelFolder.find(str(model_folder)).load_tokenizer()
    ids = tokenizer.encode_raw(text, reads_special=True)
    assert tokenizer.user_id in ids
    special = run(*flags, "--raw", "--special", "--json", "--prompt", text)
    assert json.loads(special.out)["usage"]["prompt_tokens"] == len(ids)
    assert "--special" not in special.err
    plain = run(*flags, "--raw", "--json", "--prompt", text)
    assert json.loads(plain.out)["usage"]["prompt_tokens"] > len(ids)
    assert plain.err.count("--special reads them") == 1
    source = tmp_path / "in.txt"
    source.write_text(f"{text}\n{text}\n", encoding="utf-8")
    told = run(*flags, "--raw", "--input-file", source)
    assert told.err.count("--special reads them") == 1
    assert run(*flags, "--chat", "--special", "--prompt", "x").code == 2


def test_a_jsonl_file_of_any_length(model_folder: Path, tmp_path: Path) -> None:
    prompts = [f"{number} whales" for number in range(20)]
    lines: list[dict[str, object]] = [{"prompt": prompt, "id": f"n{prompt}"} for prompt in prompts]
    lines[7] = {"messages": [{"role": "user", "content": prompts[7]}]}
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    flags = ("generate", "--model", model_folder, "--input-file", source, "--max-new-tokens", 6)
    done = run(*flags, "--output-file", target, "--batch-size", 3)
    assert (done.code, done.out) == (0, "")
    answers = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert [a["text"] for a in answers] == [o.text for o in expected(model_folder, 6, *prompts)]
    assert [{k: a[k] for k in line} for a, line in zip(answers, lines, strict=True)] == lines
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]
    printed = run(*flags, "--json").out.splitlines()
    assert [json.loads(line) for line in printed] == answers


def test_a_text_file_has_a_prompt_a_line(model_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("one\n\n two \n", encoding="utf-8")
    flags = ("generate", "--model", model_folder, "--input-file", source, "--max-new-tokens", 6)
    outputs = expected(model_folder, 6, "one", " two ", raw=True)
    assert run(*flags, "--raw").out == "".join(o.text + "\n" for o in outputs)


BAD_LINES = {
    "not_json": (b'{"prompt": "a"}\n{"prompt": \n', "line 2: is not valid JSON"),
    "not_an_object": (b'{"prompt": "a"}\n[1]\n', "line 2: is not one prompt"),
    "no_prompt": (b'\n{"text": "a"}\n', "line 2: is not one prompt"),
    "both": (b'{"prompt": "a", "messages": []}\n', "line 1: is not one prompt"),
    "wrong_type": (b'{"prompt": 3}\n', "line 1: 'prompt' is not a string"),
    "no_messages": (b'{"messages": []}\n', "line 1: cannot be answered"),
    "bad_role": (
        b'{"messages": [{"role": "x", "content": "a"}]}\n',
        "line 1: cannot be answered: messages[0]",
    ),
    "tools_number": (
        b'{"prompt": "a", "tools": 5}\n',
        "line 1: cannot be answered: tools: Input should",
    ),
    "tools_object": (
        b'{"prompt": "a", "tools": {"a": 1}}\n',
        "tools: Input should be a valid list",
    ),
    "tools_zero": (b'{"prompt": "a", "tools": 0}\n', "tools: Input should be a valid list"),
    "tool_text": (b'{"prompt": "a", "tools": ["f"]}\n', "tools[0]: must be a JSON object"),
    "no_such_url": (
        b'{"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {}}\n',
        "expected: /v1/chat/completions or /v1/completions\n",
    ),
    "not_utf8": (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', "line 2: is not UTF-8"),
    "too_long": (b'{"prompt": "' + b"x1" * 9000 + b'"}\n', "does not fit"),
    "empty": (b"\n\n", "has no prompts"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_and_nothing_is_written(
    model_folder: Path, tmp_path: Path, name: str
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(BAD_LINES[name][0])
    target.write_text("precious", encoding="utf-8")
    files = ("--input-file", source, "--output-file", target)
    done = run("generate", "--model", model_folder, *files)
    assert (done.code, done.out) == (2, "")
    assert BAD_LINES[name][1] in done.err
    told = [line.partition(":")[0] for line in done.err.splitlines()]
    assert told[0] == "rorqual"
    assert set(told[1:]) <= {"  found", "  expected", "  fix"}
    assert len(set(told)) == len(told)
    assert target.read_text(encoding="utf-8") == "precious"
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--prompt", "a", "--interactive"),
        ("--prompt", "a", "--output-file", "x.jsonl"),
        ("--input-file", "nothing.txt"),
        ("--prompt", "a", "--raw", "--system", "b"),
        ("--prompt", "a", "--threads", "0"),
        ("--prompt", "a", "--threads", "100000"),
        ("--interactive", "--json"),
    ],
)
def test_flags_without_meaning_are_2(model_folder: Path, flags: tuple[str, ...]) -> None:
    done = run("generate", "--model", model_folder, *flags)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("rorqual: ")


def test_a_flag_is_named_as_it_was_given(model_folder: Path) -> None:
    done = run("generate", "--model", model_folder, "--prompt", "a", "--max-new-tokens", 0)
    assert done.code == 2
    assert "--max-new-tokens" in done.err


@pytest.mark.concurrency
def test_an_interrupted_batch_keeps_its_answers(model_folder: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("one\n" * 5000, encoding="utf-8")
    target.write_text("precious", encoding="utf-8")
    partial = tmp_path / "out.jsonl.partial"
    files = ("--input-file", source, "--output-file", target)
    started = start("generate", "--model", model_folder, *files, "--max-new-tokens", 5)
    wait_until(lambda: partial.exists() and partial.stat().st_size)
    started.send_signal(signal.SIGINT)
    err = started.communicate(timeout=HANG_SECONDS)[1].decode()
    assert started.returncode == 130, err
    assert "Traceback" not in err
    num_lines = partial.read_bytes().count(b"\n")
    assert f"{num_lines} of 5000 answers are in" in err
    assert target.read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize("num_lines", [1, 3])
def test_an_interruption_right_after_a_line_loses_and_miscounts_nothing(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_lines: int
) -> None:
    """Ctrl-C may come between a line's writing and whatever is done next."""
    source, target = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("one\n" * 4, encoding="utf-8")
    partial = tmp_path / "out.jsonl.partial"
    opened = Path.open

    def open_and_watch(self: Path, *arguments: Any, **options: Any) -> Any:
        file = opened(self, *arguments, **options)
        if self == partial and "w" in arguments:
            flush = file.flush

            def flush_and_interrupt() -> None:
                flush()
                if opened(partial, "rb").read().count(b"\n") == num_lines:
                    file.flush = flush
                    raise KeyboardInterrupt

            file.flush = flush_and_interrupt
        return file

    monkeypatch.setattr(Path, "open", open_and_watch)
    files = ("--input-file", source, "--output-file", target)
    done = run("generate", "--model", model_folder, *files, "--max-new-tokens", 5)
    assert done.code == 130
    assert f"{num_lines} of 4 answers are in" in done.err
    assert partial.read_bytes().count(b"\n") == num_lines
    assert not target.exists()


def test_interactive_raw_over_a_pipe(model_folder: Path) -> None:
    flags = ("generate", "--model", model_folder, "--interactive", "--raw", "--max-new-tokens", 6)
    outputs = expected(model_folder, 6, "one", "two", raw=True)
    assert run(*flags, input="one\ntwo\n").out == "".join(o.text + "\n" for o in outputs)
