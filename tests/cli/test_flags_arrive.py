"""Every flag reaches what it is for. Oracle: the value on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command import run

import rorqual.cli.serve
import rorqual.engine
import rorqual.eval
import rorqual.weights
from rorqual.corpus_writer import SKILLS
from rorqual.engine import EngineOptions, SamplingParams
from rorqual.errors import UsageError
from rorqual.serve.store import default_folder
from rorqual.weights.convert import run as conversion
from rorqual.weights.convert import verify as verification
from rorqual.weights.convert.files import default_workers
from rorqual.weights.convert.plan import Target
from rorqual.weights.convert.run import Conversion

ENGINE_FLAGS: list[tuple[list[object], str, object]] = [
    (["--speculate", 1], "speculate", 1),
    (["--cache-memory", "2MiB"], "cache_memory", 2 << 20),
    (["--cache-memory", "0.25"], "cache_memory", 0.25),
    (["--kv-cache-dtype", "fp8"], "kv_cache_dtype", "fp8"),
    (["--max-model-len", 77], "max_model_len", 77),
    (["--batch-invariant"], "is_batch_invariant", True),
    (["--dtype", "stored"], "dtype", "stored"),
    (["--kernels", "plain"], "kernels", "plain"),
]
SERVE_FLAGS: list[tuple[list[object], str, object]] = [
    (["--max-batch", 3], "max_batch", 3),
    (["--set", "engine.max_step_tokens=64"], "max_step_tokens", 64),
    (["--set", "engine.block_tokens=8"], "block_tokens", 8),
    (["--set", "engine.use_prefix_cache=false"], "use_prefix_cache", False),
]
SERVER_FLAGS: list[tuple[list[object], str, object]] = [
    (["--request-timeout", 7.5], "request_timeout_seconds", 7.5),
    (
        ["--cors-origin", "http://a", "--cors-origin", "http://b"],
        "cors_origins",
        ("http://a", "http://b"),
    ),
    (["--strict-fields"], "has_strict_fields", True),
    (["--set", "server.max_body_bytes=1234"], "max_body_bytes", 1234),
]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> Any:
    """Runs `serve` as far as the start of the server; what it was given, by name."""
    seen: dict[str, Any] = {}
    real = rorqual.engine.Engine

    def engine(*arguments: Any, **options: Any) -> Any:
        seen["engine"] = vars(arguments[2])
        return real(*arguments, **options)

    def start(
        engine: Any,
        defaults: Any,
        facts: Any,
        names: Any,
        max_queue: int,
        server: Any,
        bound: Any,
    ) -> None:
        seen.update(defaults=defaults, names=names, max_queue=max_queue, server=server)

    monkeypatch.setattr(EngineOptions, "check", lambda *_: None)  # the model has no MTP module
    monkeypatch.setattr(rorqual.engine, "Engine", engine)
    monkeypatch.setattr(rorqual.cli.serve, "_run", start)

    def serve(*flags: object) -> dict[str, Any]:
        seen.clear()
        done = run("serve", "--model", model_folder, "--port", 0, *flags)
        return seen | {"code": done.code, "err": done.err}

    return serve


def test_flags_of_the_engine(served: Any) -> None:
    plain = served()
    assert plain["code"] == 0
    for flags, name, value in ENGINE_FLAGS + SERVE_FLAGS:
        found = served(*flags)
        assert found["engine"] == plain["engine"] | {name: value}, flags


@pytest.mark.parametrize(
    ("verb", "target", "more"),
    [
        ("chat", "--model", ()),
        ("generate", "--model", ("--prompt", "The sea", "--max-new-tokens", 1)),
        ("demo-generate", "--ckpt-path", ("--interactive",)),
        ("eval", None, ("--questions", 1, "--tasks", "dates")),
    ],
)
def test_every_verb_that_runs_a_model_has_the_flags_of_its_engine(
    monkeypatch: pytest.MonkeyPatch,
    model_folder: Path,
    verb: str,
    target: str | None,
    more: tuple[object, ...],
) -> None:
    """With the engine's own defaults; a number of prompts at once is the verb's."""
    seen: list[EngineOptions] = []

    def engine(*arguments: Any) -> Any:
        seen.append(arguments[2])
        raise UsageError("far enough")

    monkeypatch.setattr(EngineOptions, "check", lambda *_: None)  # the model has no MTP module
    monkeypatch.setattr(rorqual.engine, "Engine", engine)
    model = (model_folder,) if target is None else (target, model_folder)

    def given(*flags: object) -> dict[str, Any]:
        done = run(verb, *model, *more, *flags)
        assert "far enough" in done.err, done.err
        return vars(seen.pop())

    plain = given()
    standard = vars(EngineOptions(device=torch.device("cpu")))
    assert {**standard, "max_batch": plain["max_batch"], "speculate": plain["speculate"]} == plain
    assert plain["speculate"] == 0, "this model has no MTP module"
    assert plain["max_batch"] == (8 if "generate" in verb else 32)
    for flags, name, value in ENGINE_FLAGS:
        assert given(*flags) == plain | {name: value}, flags
    assert given("--speculate", 0)["speculate"] == 0
    if verb == "chat":
        for flags, drafts in (((), 2), (("--seed", 1), 0), (("--speculate", 1), 1)):
            assert "far enough" in run("chat", *flags).err
            assert seen.pop().speculate == drafts, "with an MTP module, unless the seed is given"
    for flags, fault in (
        (("--kernels", "fast"), "unknown kernels 'fast'"),
        (("--cache-memory", "much"), "--cache-memory is no size"),
        (("--device", "tpu"), "tpu"),
        (("--dtype", "int3"), "int3"),
    ):
        done = run(verb, *model, *more, *flags)
        assert (done.code, fault in done.err) == (2, True), done.err


def test_flags_of_the_server(served: Any, tmp_path: Path) -> None:
    plain = vars(served()["server"])
    for flags, name, value in SERVER_FLAGS:
        assert vars(served(*flags)["server"]) == plain | {name: value}, flags
    assert served("--set", "engine.max_queue=5")["max_queue"] == 5
    names = served("--served-model-name", "a", "--served-model-name", "b")["names"]
    assert names == ["a", "b"]
    assert plain["state_dir"] == default_folder()
    chosen = served("--state-dir", tmp_path / "state")["server"]
    assert chosen.state_dir == tmp_path / "state"
    (tmp_path / "keys.txt").write_text(f"{'a' * 32}\n{'b' * 32}\n", encoding="utf-8")
    assert len(served("--api-key-file", tmp_path / "keys.txt")["server"].api_keys) == 2
    assert served()["names"] == ["sei"]
    assert served()["defaults"] == SamplingParams(temperature=0)


@pytest.mark.parametrize("flags", [("--request-timeout", 0), ("--request-timeout", -1)])
def test_a_value_that_cannot_be_is_refused_and_not_dropped(
    served: Any, flags: tuple[object, ...]
) -> None:
    found = served(*flags)
    assert found["code"] == 2
    assert "request_timeout" in found["err"]


def test_flags_of_eval(monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> None:
    seen: list[Any] = []

    def evaluate(engine: Any, *arguments: Any) -> list[Any]:
        seen.append(arguments)
        return []

    monkeypatch.setattr(rorqual.eval, "evaluate_tasks", evaluate)
    flags = ("--questions", 7, "--seed", 9, "--tasks", "dates,units", "--threads", 1)
    assert run("eval", model_folder, *flags).code == 0
    older = ("--skills", 7, "--seed", 9, "--skill", "dates", "--skill", "units")
    assert run("eval", model_folder, *older).code == 0
    assert run("eval", model_folder).code == 0
    given, again, standard = (arguments for arguments in seen)
    assert given[:3] == again[:3] == ([SKILLS["dates"], SKILLS["units"]], 7, 9)
    assert standard[:3] == (list(SKILLS.values()), 200, 0)
    assert all(params.temperature == 0 for *_, params in seen)


def test_eval_is_greedy_whatever_a_model_advises(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, tmp_path: Path
) -> None:
    """What it penalises stays: without that its answers are others."""
    copy = shutil.copytree(model_folder, tmp_path / "advised")
    advised = {"temperature": 0.9, "max_tokens": 2, "repetition_penalty": 1.3}
    (copy / "chat.json").write_text(json.dumps({"sampling": advised}), encoding="utf-8")
    seen: list[SamplingParams] = []
    monkeypatch.setattr(rorqual.eval, "evaluate_tasks", lambda *given: seen.append(given[-1]) or [])
    assert run("eval", copy).code == 0
    (params,) = seen
    found = (params.temperature, params.max_tokens, params.repetition_penalty)
    assert found == (0.0, 200, 1.3)


def test_flags_of_convert(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []

    def convert(source: Any, destination: Any, options: Any, **others: Any) -> None:
        seen.append((source, destination, vars(options), others["workers"]))
        raise UsageError("far enough")

    monkeypatch.setattr(conversion, "convert", convert)

    def given(*flags: object, to: str = "fp8") -> tuple[dict[str, Any], object]:
        assert run("convert", "tiny", tmp_path / "b", "--to", to, *flags).code == 2
        source, destination, options, workers = seen.pop()
        assert (source, destination, options["target"]) == (
            "tiny",
            tmp_path / "b",
            Target.parse(to),
        )
        return {name: value for name, value in options.items() if name != "target"}, workers

    plain, workers = given()
    assert plain.pop("is_ema") is False
    assert set(plain.values()) == {None}
    plain["is_ema"] = False
    assert workers is None
    for flags, name, value in (
        (["--keep-mtp"], "keep_mtp", True),
        (["--drop-mtp"], "keep_mtp", False),
        (["--scale-format", "ue8m0"], "scale_format", "ue8m0"),
        (["--ema"], "is_ema", True),
        (["--max-file-gb", "0.5"], "max_shard_bytes", 500_000_000),  # decimal, as files are listed
    ):
        assert given(*flags) == (plain | {name: value}, None), flags
    assert given("--workers", 3) == (plain, 3)
    imatrix = tmp_path / "i.dat"
    assert given("--imatrix", imatrix, to="gguf:Q4_K_M")[0] == plain | {"imatrix": imatrix}


@pytest.mark.parametrize("has_importance", [False, True])
@pytest.mark.parametrize("workers", [None, 3])
def test_flags_of_convert_reach_its_verification(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_importance: bool, workers: int | None
) -> None:
    """An importance matrix excuses values that weigh little: without one none is excused."""
    seen: list[Any] = []

    def verify(*arguments: Any, **options: Any) -> list[Any]:
        seen.append((arguments, options["has_importance"], options["workers"]))
        return []

    done = Conversion(tmp_path / "b.gguf", [], 0, 0, 0.0)
    monkeypatch.setattr(conversion, "convert", lambda *_, **__: done)
    monkeypatch.setattr(verification, "verify", verify)
    flags: list[object] = ["--imatrix", tmp_path / "i.dat"] if has_importance else []
    flags += [] if workers is None else ["--workers", workers]
    command = ("convert", "tiny", tmp_path / "b.gguf", "--to", "gguf:Q4_K_M", *flags)
    assert run(*command).code == 0
    assert not seen
    assert run(*command, "--verify").code == 0
    expected = (("tiny", done.destination), has_importance, workers or default_workers())
    assert seen == [expected]


def test_a_failed_answer_is_shown(monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> None:
    """A model that has learnt nothing: as many of its failures are printed as were asked for."""
    flags = ("--questions", 3, "--tasks", "arithmetic")
    printed = {n: run("eval", model_folder, *flags, "--failures", n).out for n in (0, 2)}
    assert printed[0].count("said ") == printed[0].count("why ") == 0
    assert printed[2].count("said ") == printed[2].count("why ") == 2
    written = json.loads(run("eval", model_folder, *flags, "--failures", 2, "--json").out)
    (result,) = written["tasks"]
    assert (result["task"], result["correct"], result["total"]) == ("arithmetic", 0, 3)
    assert (result["mean_reward"], result["low"]) == (0.0, 0.0)
    first = next(SKILLS["arithmetic"].questions("held_out", 0))
    shown = result["failures"]
    assert (len(shown), shown[0]["prompt"], shown[0]["answer"]) == (2, first.prompt, first.answer)
    assert all(f"why  {failure['why']}" in printed[2] for failure in shown)


@pytest.mark.parametrize("verb", ["chat", "generate"])
def test_every_advice_can_be_overridden(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, tmp_path: Path, verb: str
) -> None:
    copy = tmp_path / "advised"
    shutil.copytree(model_folder, copy)
    advised = {"temperature": 0.9, "top_p": 0.8, "top_k": 7, "min_p": 0.2}
    advised |= {"repetition_penalty": 1.3, "max_tokens": 2}
    (copy / "chat.json").write_text(json.dumps({"sampling": advised}), encoding="utf-8")
    chosen = {"temperature": 0.0, "top_p": 1.0, "top_k": 9, "min_p": 0.0}
    chosen |= {"repetition_penalty": 1.0, "max_tokens": 3}
    names = {"max_tokens": "max_new_tokens"}
    seen: list[dict[str, Any]] = []
    real = rorqual.weights.ModelFolder.sampling

    def sampling(self: Any, **values: Any) -> dict[str, Any]:
        seen.append(real(self, **values))
        return seen[-1]

    monkeypatch.setattr(rorqual.weights.ModelFolder, "sampling", sampling)
    flags: list[object] = ["--prompt", "a"] if verb == "generate" else []
    for given, expected in [({}, advised), (chosen, chosen)]:
        pairs = [(f"--{names.get(n, n).replace('_', '-')}", value) for n, value in given.items()]
        done = run(verb, "--model", copy, *flags, *[part for pair in pairs for part in pair])
        assert done.code == 0, done.err
        assert {name: seen[-1][name] for name in expected} == expected
