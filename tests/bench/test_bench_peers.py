"""Peers: how they are found, what they are told, how their output is read.

Oracles: texts that llama.cpp (0.3.36 of llama-cpp-python) and ik_llama.cpp (8337e4c) printed on a
busy machine, with other figures in llama.cpp's table, and
programs written here that print them and keep what they were told.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rorqual.bench import peers
from rorqual.bench.figures import Figure, Load
from rorqual.bench.peers import Places, find_peers, has_llama, read_batched, read_bench, read_script
from rorqual.bench.processes import BenchError
from rorqual.errors import UsageError
from rorqual.weights import save
from rorqual.weights.convert.plan import Options, Target
from rorqual.weights.convert.run import convert
from small import LITTLE, lively

LOAD = Load(prefill=(16, 512), streams=(1, 8), depths=(32, 64), decode_tokens=24, threads=2)
RECORDED = Path(__file__).parent / "recorded"
PROGRAM = """#!{python}
import json, sys
with open({told!r}, "a") as file:
    file.write(json.dumps(sys.argv) + "\\n")
open("llama.log", "w").close()
print(open({text!r}).read(), file=sys.{stream})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model") / "m"
    config = LITTLE.with_changes(num_nextn_predict_layers=0, hidden_size=32)
    save(lively(config), place, dtype="float32")
    return place


@pytest.fixture(scope="module")
def gguf(folder: Path) -> Path:
    file = folder.parent / "m.gguf"
    convert(folder, file, Options(Target.parse("gguf:Q8_0")))
    return file


def install(place: Path, bench: str, batched: str) -> Path:
    """Both programs in `place`/build/bin; they print what others printed, the fork's table to
    standard error as there. What they are told lies in `place`/told.
    """
    programs = place / "build" / "bin"
    programs.mkdir(parents=True)
    for name, text in (("llama-bench", bench), ("llama-batched-bench", batched)):
        (programs / name).write_text(
            PROGRAM.format(
                python=sys.executable,
                told=str(place / "told"),
                text=str(RECORDED / text),
                stream="stderr" if text == "ik-llama-batched-bench.txt" else "stdout",
            )
        )
        (programs / name).chmod(0o755)
    return place


def told(place: Path) -> list[list[str]]:
    return [json.loads(line)[1:] for line in (place / "told").read_text().splitlines()]


def test_what_llama_bench_prints() -> None:
    figures = read_bench((RECORDED / "llama-bench.json").read_text())
    assert [(f.what, f.num_tokens, f.num_streams, f.unit) for f in figures] == [
        ("prefill", 16, 1, "tokens/s"),
        ("prefill", 64, 1, "tokens/s"),
    ]
    assert [f.value for f in figures] == [7.267929, 4.807701]
    figures = read_bench((RECORDED / "ik-llama-bench.json").read_text())
    assert [(f.num_tokens, f.value) for f in figures] == [(16, 3.055975), (64, 15.341024)]


@pytest.mark.parametrize("name", ["llama-batched-bench.txt", "ik-llama-batched-bench.txt"])
def test_what_llama_batched_bench_prints(name: str) -> None:
    figures = read_batched((RECORDED / name).read_text())
    assert [f.key for f in figures] == [("decode", 32, 1), ("decode", 32, 8)]
    assert all(f.unit == "tokens/s" and 1 < f.value < 1000 for f in figures)


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (read_bench, "error: unable to load model"),
        (read_bench, '[{"n_prompt": 3}]'),
        (read_batched, ""),
        (read_batched, "| PP | TG |\n|----|----|"),
        (read_batched, "| 32 | 8 | eight | 9 | 1 | 1 | 1 | nan ms | 1 | 1 |"),
        (lambda text: read_script("vllm", text), "INFO all is well"),
        (lambda text: read_script("vllm", text), '{"what": "decode", cut'),
        (lambda text: read_script("vllm", text), '{"what": "decode", "speed": 3}'),
    ],
)
def test_strange_output_is_told(read: object, text: str) -> None:
    with pytest.raises(BenchError, match="printed something else"):
        read(text)  # type: ignore[operator]


def test_llama_cpp_is_run_with_its_two_programs(
    tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both named from here, and nothing left here."""
    place = install(tmp_path / "there", "llama-bench.json", "llama-batched-bench.txt")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").symlink_to(gguf)
    gguf = tmp_path / "m.gguf"
    places = Places(gguf=Path("m.gguf"), llama_cpp=Path("there"))
    (peer,), missing = find_peers(["llama.cpp"], places)
    assert not missing
    assert (peer.form.storages.split("+")[0], peer.form.operands) == ("Q8_0", "int8")
    figures = list(peer.measure(LOAD))
    assert [f.what for f in figures if f.unit == "tokens/s"] == ["prefill"] * 2 + ["decode"] * 4
    assert figures[0].what == "start"
    first, prompts, *batched = told(place)
    common = ["-m", str(gguf), "-t", "2", "-r", "1", "-o", "json"]
    assert first == [*common, "-p", "16", "-n", "0", "--no-warmup"]
    assert prompts == [*common, "-p", "16,512", "-n", "0"]
    assert [line[line.index("-npp") + 1] for line in batched] == ["32", "64"]
    assert batched[1][:6] == ["-m", str(gguf), "-t", "2", "-c", str(8 * (64 + 24))]
    assert batched[1][6:] == ["-npl", "1,8", "-npp", "64", "-ntg", "24"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "there"]


@pytest.mark.parametrize(("form", "is_repacked"), [("Q8_0", True), ("BF16", False)])
def test_its_fork_gets_the_flags_that_make_it_fast(
    tmp_path: Path, folder: Path, form: str, is_repacked: bool
) -> None:
    place = install(tmp_path / "ik", "ik-llama-bench.json", "ik-llama-batched-bench.txt")
    file = tmp_path / "m.gguf"
    convert(folder, file, Options(Target.parse(f"gguf:{form}")))
    (peer,), _ = find_peers(["ik_llama.cpp"], Places(gguf=file, ik_llama_cpp=place))
    figures = list(peer.measure(LOAD))
    assert [f.num_streams for f in figures if f.what == "decode"] == [1, 8, 1, 8]
    first, prompts, batched, _ = (" ".join(line) for line in told(place))
    assert "-mla 3 -fa 1 -fmoe 1" in first
    assert first.endswith("-w 0")
    assert "-mla 3 -fa 1" in batched
    assert ("-rtr 1" in prompts, batched.endswith("-rtr")) == (is_repacked, is_repacked)


def test_nothing_that_was_not_asked_for_is_run(tmp_path: Path, gguf: Path) -> None:
    place = install(tmp_path, "llama-bench.json", "llama-batched-bench.txt")
    (peer,), _ = find_peers(["llama.cpp"], Places(gguf=gguf, llama_cpp=place))
    assert [f.what for f in peer.measure(Load(prefill=(), streams=()))] == ["start"]


def test_what_is_not_there_is_said(
    tmp_path: Path, gguf: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(peers, "run", lambda *_: (_ for _ in ()).throw(BenchError("no")))
    names = list(peers.PEERS)
    found, missing = find_peers(names, Places(folder=folder, gguf=gguf, llama_cpp=tmp_path))
    assert not found
    assert "not installed for" in missing["transformers"]
    assert "(--vllm PYTHON)" in missing["vllm"]
    assert f"in {tmp_path} (--llama-cpp DIR)" in missing["llama.cpp"]
    assert "say where they are (--ik-llama-cpp DIR)" in missing["ik_llama.cpp"]
    _, missing = find_peers(["llama.cpp"], Places(gguf=gguf))
    assert "on the path (--llama-cpp DIR)" in missing["llama.cpp"]
    _, missing = find_peers(["transformers"], Places(gguf=gguf))
    assert "runs Hugging Face folders" in missing["transformers"]
    place = install(tmp_path / "there", "llama-bench.json", "llama-batched-bench.txt")
    _, missing = find_peers(["llama.cpp"], Places(llama_cpp=place))
    assert "name one (--gguf FILE)" in missing["llama.cpp"]
    assert has_llama(["transformers", "llama.cpp"], Places(llama_cpp=place))
    assert not has_llama(["transformers", "ik_llama.cpp"], Places(llama_cpp=place))
    with pytest.raises(UsageError, match="unknown peer 'ollama'"):
        find_peers(["ollama"], Places())


def test_a_script_prints_a_line_a_figure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a Python of its own, which here stands in for one that has the library."""
    script = folder.parent / "fake_peer.py"
    script.write_text(
        "import json, sys; load = json.loads(sys.argv[2]); print(sys.argv[1])\n"
        "figure = {'what': 'prefill', 'value': 7.0, 'unit': 'tokens/s',"
        " 'num_tokens': load['prefill'][1], 'num_streams': 1}\n"
        "assert load['started'] and load['dtype'] == 'float32'\n"
        "print(json.dumps(figure))\n"
    )
    monkeypatch.setattr(peers, "SCRIPT", script)
    find = peers.run

    def run(name: str, command: list[str]) -> object:
        return find(name, [*command[:2], "0"] if command[1] == "-c" else command)

    monkeypatch.setattr(peers, "run", run)
    places = Places(folder=folder, vllm=Path(sys.executable), dtype="float32")
    (peer,), missing = find_peers(["vllm"], places)
    assert not missing
    assert peer.form.storages == "float32"
    first, *rest = peer.measure(LOAD)
    assert first == Figure("prefill", 7.0, "tokens/s", 512, 1)
    assert [f.what for f in rest] in (["memory"], [])


@pytest.mark.slow
def test_transformers_is_measured(folder: Path) -> None:
    pytest.importorskip("transformers")
    (peer,), missing = find_peers(["transformers"], Places(folder=folder, dtype="float32"))
    assert not missing
    load = Load(prefill=(8,), streams=(1, 2), depths=(4,), decode_tokens=2)
    figures = list(peer.measure(load))
    assert [f.key for f in figures if f.unit == "tokens/s"] == [
        ("prefill", 8, 1), ("decode", 4, 1), ("decode", 4, 2)
    ]  # fmt: skip
    assert all(figure.value > 0 for figure in figures)


STUB = """
class SamplingParams:
    def __init__(self, *, temperature, max_tokens, ignore_eos, detokenize):
        assert (temperature, ignore_eos, detokenize) == (0.0, True, False)
        self.max_tokens = max_tokens
class LLM:
    def __init__(self, *, model, dtype, skip_tokenizer_init, max_model_len, max_num_seqs,
                 enable_prefix_caching):
        assert (max_model_len, max_num_seqs, dtype) == (10, 2, "float32")
    def generate(self, prompts, params, use_tqdm):
        for _ in range(params.max_tokens * 1000):
            assert all(3 <= i < 320 for prompt in prompts for i in prompt["prompt_token_ids"])
"""


def test_the_script_asks_vllm_for_what_is_to_be_timed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in with the arguments that vLLM documents: vLLM itself is not installed."""
    (tmp_path / "vllm.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (peer,), missing = find_peers(["vllm"], Places(folder=folder, dtype="float32"))
    assert not missing
    load = Load(prefill=(8,), streams=(1, 2), depths=(4,), decode_tokens=2, prompt_tokens=3)
    figures = list(peer.measure(load))
    keys = [f.key for f in figures if f.what != "memory"]
    assert keys[:3] == [("load", 0, 0), ("first_token", 3, 0), ("start", 3, 0)]
    assert keys[3:] == [("prefill", 8, 1), ("decode", 4, 1), ("decode", 4, 2)]
