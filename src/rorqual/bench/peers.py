"""Other engines on the same weights, as far as they are installed: how they are found and run, and
what they print.

llama.cpp and ik_llama.cpp run a GGUF file, by two programs of theirs: `llama-bench` (prompts) and
`llama-batched-bench` (streams). transformers and vLLM run a Hugging Face folder, by a script that
needs nothing of ours, so that they may have a Python of their own.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rorqual.bench.figures import BYTES, RATE, SECONDS, Figure, Load
from rorqual.bench.processes import BenchError, Ended, find_program, run
from rorqual.bench.weights import Form, folder_form, gguf_form
from rorqual.errors import UsageError, listing

PEERS = ("transformers", "llama.cpp", "ik_llama.cpp", "vllm")
SCRIPT = Path(__file__).parent / "python_peer.py"
PROGRAMS = ("llama-bench", "llama-batched-bench")
# What makes it fastest on a processor: latent attention, flash attention, fused experts; matrices
# that are quantised are brought into rows of its own order while it loads.
IK_BENCH = ["-mla", "3", "-fa", "1", "-fmoe", "1"]
IK_BATCHED = ["-mla", "3", "-fa", "1"]


class Peer(Protocol):
    """An engine that can be measured."""

    @property
    def name(self) -> str: ...

    @property
    def form(self) -> Form:
        """How it runs the weights."""
        ...

    def measure(self, load: Load) -> Iterator[Figure]:
        """One round. BenchError where it fails."""
        ...


@dataclass(frozen=True)
class Places:
    """Where peers are, and what they run; None: on the path, this Python, or not there."""

    folder: Path | None = None  # Hugging Face's
    gguf: Path | None = None
    llama_cpp: Path | None = None
    ik_llama_cpp: Path | None = None
    vllm: Path | None = None
    dtype: str = "bfloat16"  # of the folder's weights


@dataclass(frozen=True)
class LlamaPeer:
    """llama.cpp, or a fork that has the same two programs and flags of its own."""

    name: str
    bench: Path
    batched: Path
    file: Path
    form: Form

    def measure(self, load: Load) -> Iterator[Figure]:
        yield self._first_token(load)
        if load.prefill:
            lengths = ",".join(map(str, load.prefill))
            text = self._run(self.bench, [*self._bench(load), "-p", lengths, "-n", "0"]).out
            yield from read_bench(text)
        peak = 0
        for depth in load.depths if load.streams else ():
            ended = self._run(self.batched, self._batched(load, depth))
            yield from read_batched(ended.out + ended.err)  # the fork's table goes to the latter
            peak = max(peak, ended.peak_bytes or 0)
        if peak:
            yield Figure("memory", peak, BYTES)

    def _first_token(self, load: Load) -> Figure:
        """From the start of the process to a prompt's end, which is its answer's first token."""
        skip = ["-w", "0"] if self._is_fork else ["--no-warmup"]
        prompt = ["-p", str(load.prompt_tokens), "-n", "0", *skip]
        seconds = self._run(self.bench, [*self._bench(load), *prompt]).seconds
        return Figure("start", seconds, SECONDS, load.prompt_tokens)

    def _bench(self, load: Load) -> list[str]:
        flags = [*self._common(load), "-r", "1", "-o", "json"]
        return [*flags, *(self._own_flags(IK_BENCH, ["-rtr", "1"]))]

    def _batched(self, load: Load, depth: int) -> list[str]:
        room = max(load.streams) * (depth + load.decode_tokens)
        streams = ",".join(map(str, load.streams))
        flags = [*self._common(load), "-c", str(room), "-npl", streams]
        flags += ["-npp", str(depth), "-ntg", str(load.decode_tokens)]
        return [*flags, *self._own_flags(IK_BATCHED, ["-rtr"])]

    def _common(self, load: Load) -> list[str]:
        return ["-m", str(self.file.absolute()), "-t", str(load.threads)]

    def _own_flags(self, always: list[str], repack: list[str]) -> list[str]:
        if not self._is_fork:
            return []
        return [*always, *(repack if self.form.operands == "int8" else [])]

    @property
    def _is_fork(self) -> bool:
        return self.name == "ik_llama.cpp"

    def _run(self, program: Path, flags: Sequence[str]) -> Ended:
        with tempfile.TemporaryDirectory() as folder:  # the fork leaves a log where it stands
            return run(self.name, [program.absolute(), *flags], folder)


@dataclass(frozen=True)
class PythonPeer:
    """An engine in Python, by the script that measures it."""

    name: str
    python: str
    folder: Path
    dtype: str
    form: Form

    def measure(self, load: Load) -> Iterator[Figure]:
        asked = load.as_dict() | {"folder": str(self.folder), "dtype": self.dtype}
        asked["started"] = time.time()
        ended = run(self.name, [self.python, SCRIPT, self.name, json.dumps(asked)])
        yield from read_script(self.name, ended.out)
        if ended.peak_bytes:
            yield Figure("memory", ended.peak_bytes, BYTES)


def read_bench(text: str) -> list[Figure]:
    """What `llama-bench -o json` prints of prompts."""
    try:
        rows = json.loads(text)
        return [
            Figure("prefill", float(row["avg_ts"]), RATE, int(row["n_prompt"]), 1)
            for row in rows
            if not row["n_gen"]
        ]
    except (ValueError, KeyError, TypeError):
        raise _strange("llama-bench", text, "a list of tests in JSON") from None


def read_batched(text: str) -> list[Figure]:
    """The table of `llama-batched-bench`: of its columns PP, B and S_TG."""
    figures = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 10 and cells[0].isdecimal():
            with suppress(ValueError):  # another table's
                depth, streams, rate = int(cells[0]), int(cells[2]), float(cells[7])
                figures.append(Figure("decode", rate, RATE, depth, streams))
    if not figures:
        raise _strange("llama-batched-bench", text, "a table with columns PP, TG, B ... S_TG t/s")
    return figures


def read_script(name: str, text: str) -> list[Figure]:
    """A line of JSON for each figure, among whatever else a library prints."""
    lines = [line for line in text.splitlines() if line.startswith('{"what"')]
    if not lines:
        raise _strange(f"the script for {name}", text, "lines of JSON")
    try:
        return [Figure.of(json.loads(line)) for line in lines]
    except (ValueError, TypeError, LookupError):
        raise _strange(f"the script for {name}", text, "lines of JSON") from None


def _strange(program: str, text: str, expected: str) -> BenchError:
    found = text.strip()[-300:] or "nothing"
    return BenchError(f"{program} printed something else", found=found, expected=expected)


def find_peers(names: Sequence[str], places: Places) -> tuple[list[Peer], dict[str, str]]:
    """Those of the names that can run here, and of the others why not. UsageError for a name that
    is none.
    """
    peers: list[Peer] = []
    missing: dict[str, str] = {}
    for name in names:
        if name not in PEERS:
            raise UsageError(f"unknown peer {name!r}", expected=listing(PEERS))
        found = _llama(name, places) if name.endswith("llama.cpp") else _python(name, places)
        if isinstance(found, str):
            missing[name] = found
        else:
            peers.append(found)
    return peers, missing


def has_llama(names: Sequence[str], places: Places) -> bool:
    """Whether some of these runs GGUF files, and is there."""
    forks = [name for name in names if name.endswith("llama.cpp")]
    return any(not isinstance(_programs(name, places), str) for name in forks)


def _programs(name: str, places: Places) -> tuple[Path, Path] | str:
    """Both programs, or why there are none."""
    place = places.ik_llama_cpp if name == "ik_llama.cpp" else places.llama_cpp
    flag = f"--{name.replace('_', '-').replace('.', '-')} DIR"
    if name == "ik_llama.cpp" and place is None:
        return f"its programs have the names of llama.cpp's: say where they are ({flag})"
    bench, batched = (find_program(place, program) for program in PROGRAMS)
    if bench is None or batched is None:
        where = f"in {place}" if place else "on the path"
        return f"not installed: no {' and '.join(PROGRAMS)} {where} ({flag})"
    return bench, batched


def _llama(name: str, places: Places) -> LlamaPeer | str:
    programs = _programs(name, places)
    if isinstance(programs, str):
        return programs
    if places.gguf is None:
        return "runs GGUF files: name one (--gguf FILE)"
    return LlamaPeer(name, *programs, places.gguf, gguf_form(places.gguf))


def _python(name: str, places: Places) -> PythonPeer | str:
    python = str(places.vllm) if name == "vllm" and places.vllm else sys.executable
    if places.folder is None:
        return "runs Hugging Face folders, and the model is none"
    try:
        run(name, [python, "-c", f"import importlib.util as u; assert u.find_spec({name!r})"])
    except BenchError:
        hint = " (--vllm PYTHON)" if name == "vllm" else ""
        return f"not installed for {python}{hint}"
    form = folder_form(places.folder, places.dtype)
    return PythonPeer(name, python, places.folder, places.dtype, form)
