"""A folder in which the commands of pages can be run: texts, conversations, models, and runs of
seconds in place of those of minutes.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from markdown import PAGES, ROOT, Block, blocks, shown
from markdown import simple_commands as commands

import forked
from in_process import run
from patience import HANG_SECONDS, wait_until
from rorqual.bundled import checkpoint_path
from rorqual.config import read_toml

ADDRESS = "127.0.0.1:8000"
"""Where pages say that a server listens."""
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "kv_lora_rank": 16,
}
SHRUNK_LENGTH, SHRUNK_BATCH, TOKENS_SHRUNK_BY = 64, 2, 10_000


def make(folder: Path) -> None:
    """What pages speak of as if it were there."""
    tiny = checkpoint_path("tiny")
    shutil.copytree(tiny, folder / "DIR")
    for name in ("runs/tiny", "runs/tiny-sft"):  # as they were before they were made to be shipped
        shutil.copytree(tiny, folder / name)
        config = folder / name / "config.json"
        table = json.loads(config.read_text())
        config.write_text(json.dumps(table | {"max_position_embeddings": 512}))
    (folder / "recipes").symlink_to(ROOT / "recipes")
    shutil.copy(ROOT / "recipes" / "talks.jsonl", folder)
    (folder / "sharegpt.jsonl").write_text(
        '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}\n'
    )
    (folder / "keys.txt").write_text("a-key-of-this-test\n")
    line = '{{"custom_id": "{}", "method": "POST", "url": "/v1/chat/completions", "body": {}}}\n'
    body = '{"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}]}'
    (folder / "questions.jsonl").write_text("".join(line.format(i, body) for i in range(2)))
    (folder / "texts").mkdir()
    words = (ROOT / "docs" / "log.md").read_text(encoding="utf-8")
    for number in range(8):
        text = words[number * 3000 : (number + 1) * 3000]
        (folder / "texts" / f"{number}.txt").write_text(text, encoding="utf-8")
    for page in PAGES:
        put_files(page, folder)
    _rorqual(["convert", "DIR", "FILE.gguf", "--to", "gguf:Q8_0"], folder)
    _rorqual(["train", "mine.toml"], folder)
    _rorqual(["train", "talks.toml"], folder)


def put_files(page: Path, folder: Path) -> None:
    for block in blocks(page):
        if block.file is not None:
            (folder / block.file).write_text(block.text, encoding="utf-8")


def run_block(block: Block, folder: Path, address: str) -> None:
    """Runs the lines of a block; AssertionError for one that fails, or prints something else."""
    for line in shown(block):
        words = list(commands(line.line))
        out = _run_line(line.line, words, folder, address, is_marked=bool(block.marks))
        if line.output is not None and not block.marks:
            pattern = re.escape(line.output.strip()).replace(r"\.\.\.", ".*")
            assert re.fullmatch(pattern, out.strip(), re.DOTALL), f"{line.line}\n{out}"


def _run_line(
    line: str, words: list[list[str]], folder: Path, address: str, *, is_marked: bool
) -> str:
    """What a line prints."""
    last = words[-1]
    if is_marked:
        if last[:2] == ["rorqual", "train"]:
            return _rorqual([*last[1:], "--dry-run"], folder)
        return ""
    if last[0] == "make":  # its targets are looked up; they are what tests are run by
        return ""
    if last[0] == "rorqual":
        given = ""
        if len(words) == 2:
            assert words[0][0] == "echo", line
            given = " ".join(words[0][1:]) + "\n"
        return _rorqual(last[1:], folder, given)
    line = re.sub(r"^python3? ", f"{shlex.quote(sys.executable)} ", line)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        ["bash", "-ec", line.replace(ADDRESS, address)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert '"error"' not in done.stdout, done.stdout
    return done.stdout


def _rorqual(words: list[str], folder: Path, given: str = "") -> str:
    verb, rest = words[0], words[1:]
    if verb == "serve":
        with served(rest, folder):
            return ""
    done = run(verb, *_smaller(verb, rest, folder), input=given, folder=folder)
    assert done.code in (0, None), f"rorqual {' '.join(words)}\n{done.out}{done.err}"
    return done.out


def _smaller(verb: str, words: list[str], folder: Path) -> list[str]:
    """The same in less time."""
    if verb == "eval":
        asked = words[words.index("--questions") + 1] if "--questions" in words else "1"
        return [*words, "--questions", str(min(int(asked), 1))]
    if verb == "train" and "--keys" not in words and not words[0].startswith("recipes/"):
        table: dict[str, Any] = read_toml(folder / words[0])
        asked = [word for word in words if word.startswith("training.total_tokens=")]
        tokens = int(asked[0].partition("=")[2]) if asked else table["training"]["total_tokens"]
        settings = {
            "training.total_tokens": max(tokens // TOKENS_SHRUNK_BY, SHRUNK_LENGTH * SHRUNK_BATCH),
            "training.sequence_length": SHRUNK_LENGTH,
            "training.micro_batch_size": SHRUNK_BATCH,
            "batch_ramp.start": SHRUNK_BATCH,
            "batch_ramp.end": SHRUNK_BATCH,
        }
        if table.get("init_from") == "tiny":
            settings["init_from"] = "runs/mine"
        if "preset" in table.get("model", {}):
            settings |= {f"model.{key}": value for key, value in SHAPE.items()}
        for key, value in settings.items():
            words = [*words, "--set", f"{key}={value}"]
    return words


@contextmanager
def served(words: list[str], folder: Path) -> Iterator[str]:
    """A server that these options start, at a port that is free; its address."""
    import httpx

    command = [sys.executable, "-m", "rorqual", "serve", *words, "--port", "0"]
    pipe = subprocess.PIPE
    process = forked.Popen(command, cwd=folder, stdin=pipe, stdout=pipe, stderr=pipe)
    try:
        assert process.stderr is not None
        first = b"".join(process.stderr.readline() for _ in range(2)).decode()
        found = re.search(r"http://([\d.]+:\d+)", first)
        assert found is not None, first + process.stderr.read().decode()
        address = found[1].replace("0.0.0.0", "127.0.0.1")

        def is_ready() -> bool:
            try:
                ready = httpx.get(f"http://{address}/ready", timeout=HANG_SECONDS)
            except httpx.TransportError:
                return False
            return ready.status_code == 200

        wait_until(is_ready)
        yield address
    finally:
        process.kill()
        process.communicate()
