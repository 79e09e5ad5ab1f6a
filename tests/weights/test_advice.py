"""Ends of answers and advice on sampling through every form. Oracles: gguf-py's names of the keys;
the folder that a form was made of.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import hf_oracle as oracle
import numpy as np
import pytest

import small
from rorqual.config import fill
from rorqual.engine.params import SamplingParams
from rorqual.engine.sampling_state import SamplingState
from rorqual.errors import CheckpointError, ConfigError, RorqualError, TokenizerError, UsageError
from rorqual.model import build
from rorqual.weights import ModelFolder, load, model_reader, save
from rorqual.weights.advice import (
    END_KEYS,
    ENDS_KEY,
    Advice,
    SamplingDefaults,
    advice_of_folder,
    advice_of_gguf,
)
from rorqual.weights.convert.plan import Options, Target
from rorqual.weights.convert.run import Conversion, convert
from rorqual.weights.gguf.file import read_gguf

CONFIG = oracle.BASE.with_changes(vocab_size=320)
ADVICE = {
    "temperature": 0.6,
    "top_p": 0.95,
    "top_k": 40,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
}


def folder_with(path: Path, generation: dict[str, Any], **files: dict[str, Any]) -> Path:
    tokenizer = small.tokenizer()
    save(build(CONFIG), path, "float32", tokenizer, generation=generation)
    for name, table in files.items():
        file = path / f"{name}.json"
        found = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(found | table))
    return path


def converted(source: Path, destination: Path, to: str) -> Conversion:
    return convert(source, destination, Options(Target.parse(to)))


def sampling(path: Path) -> SamplingParams:
    return SamplingParams(**ModelFolder.find(str(path)).sampling())


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "all of it": ({**ADVICE, "do_sample": True, "eos_token_id": [1, 7, 8, 9, 250]}, ADVICE),
    "one other end": ({"eos_token_id": 9}, {}),
    "three ends": ({"eos_token_id": [1, 7, 8]}, {}),
    "greedy": ({**ADVICE, "do_sample": False}, {"temperature": 0.0, "repetition_penalty": 1.1}),
    "greedy alone": ({"do_sample": False}, {"temperature": 0.0}),
    "greedy with a penalty alone": (
        {"do_sample": False, "repetition_penalty": 1.1},
        {"temperature": 0.0, "repetition_penalty": 1.1},
    ),
    "a penalty alone": ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_form_says_the_same(case: str, tmp_path: Path) -> None:
    generation, wanted = CASES[case]
    folder = folder_with(tmp_path / "hf", generation)
    ends = generation.get("eos_token_id", [])
    ends = tuple(end for end in (ends if isinstance(ends, list) else [ends]) if end != 1)
    expected = SamplingParams(**wanted, stop_token_ids=ends)
    assert sampling(folder) == expected
    for name, to in (("shards", "shards:2"), ("a.gguf", "gguf:F32"), ("bf16", "bf16")):
        assert sampling(converted(folder, tmp_path / name, to).destination) == expected, to
    assert sampling(
        converted(tmp_path / "a.gguf", tmp_path / "b.gguf", "gguf:F32").destination
    ) == (expected)
    back = converted(tmp_path / "a.gguf", tmp_path / "back", "bf16").destination
    assert sampling(back) == expected


def test_the_keys_are_llama_cpps(tmp_path: Path) -> None:
    generation = {**ADVICE, "eos_token_id": [1, 7, 8, 9]}
    path = converted(folder_with(tmp_path / "hf", generation), tmp_path / "a.gguf", "gguf:F32")
    with read_gguf(path.destination) as file:
        found = file.metadata
    general, tokenizer = gguf.Keys.General, gguf.Keys.Tokenizer
    assert found[tokenizer.EOS_ID] == 1
    assert found[tokenizer.EOT_ID] == 7
    assert found[tokenizer.EOM_ID] == 8
    assert found["rorqual.stop_token_ids"].tolist() == [1, 7, 8, 9]  # type: ignore[union-attr]
    assert found[general.SAMPLING_TEMP] == pytest.approx(0.6)
    assert found[general.SAMPLING_TOP_P] == pytest.approx(0.95)
    assert found[general.SAMPLING_TOP_K] == 40
    assert found[general.SAMPLING_MIN_P] == pytest.approx(0.05)
    assert found[general.SAMPLING_PENALTY_REPEAT] == pytest.approx(1.1)
    assert found[general.SAMPLING_PENALTY_LAST_N] == -1


def test_the_chat_card_comes_first_and_what_has_no_key_is_said(tmp_path: Path) -> None:
    card = {"opening": "Hello.", "examples": ["sing"], "sampling": {"temperature": 0.3}}
    generation = {"temperature": 0.6, "top_p": 0.9, "no_repeat_ngram_size": 3}
    folder = folder_with(tmp_path / "hf", generation, chat=card)
    done = converted(folder, tmp_path / "a.gguf", "gguf:F32")
    assert sampling(done.destination) == sampling(folder)
    assert sampling(folder).temperature == 0.3
    (note,) = done.notes
    for unsaid in ("opening of chat.json", "examples of chat.json", "no_repeat_ngram_size"):
        assert unsaid in note


def test_the_end_in_config_json_counts(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "hf", {"eos_token_id": None}, config={"eos_token_id": 9})
    assert sampling(folder).stop_token_ids == (9,)
    assert sampling(converted(folder, tmp_path / "a.gguf", "gguf:F32").destination) == (
        sampling(folder)
    )


@pytest.mark.parametrize("impossible", [-1, 320, "1", 1.5, True, [1, 320], [[1]]])
@pytest.mark.parametrize("name", ["generation_config", "config"])
def test_an_impossible_end_is_named(name: str, impossible: object, tmp_path: Path) -> None:
    generation = {"eos_token_id": impossible if name == "generation_config" else None}
    folder = folder_with(tmp_path / "hf", generation, config={"eos_token_id": impossible})
    with pytest.raises(RorqualError, match=f"eos_token_id in {name}.json") as caught:
        sampling(folder)
    assert f"{name}.json" in str(caught.value.where)
    with pytest.raises(RorqualError, match="eos_token_id"):
        converted(folder, tmp_path / "a.gguf", "gguf:F32")
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize("form", ["generation_config", "config", "gguf"])
def test_an_end_beyond_the_tokenizer_is_named_by_its_file(form: str, tmp_path: Path) -> None:
    """Rows of the model that no id stands for are never drawn. The last id may be an end."""
    tokenizer = small.tokenizer()
    num_ids = tokenizer.vocab_size
    assert num_ids < CONFIG.vocab_size
    for token_id in (num_ids - 1, num_ids):
        path = tmp_path / str(token_id)
        own = {"eos_token_id": [1, token_id]}
        is_config = form == "config"
        said = {"eos_token_id": None} if is_config else own
        folder = folder_with(path / "hf", said, config=own if is_config else {})
        name = f"eos_token_id in {form}.json"
        if form == "gguf":
            folder, name = converted(folder, path / "a.gguf", "gguf:F32").destination, "eot_token"
        if token_id < num_ids:
            assert sampling(folder).stop_token_ids == (token_id,)
            continue
        with pytest.raises(RorqualError, match=name) as caught:
            sampling(folder)
        assert str(caught.value.where).endswith("a.gguf" if form == "gguf" else f"{form}.json")
        assert caught.value.expected == f"ids from 0 to {num_ids - 1}"
    with pytest.raises(UsageError, match="stop_token_ids"):  # a request's own keeps its name
        SamplingState(SamplingParams(stop_token_ids=(num_ids,)), [1], tokenizer)


def test_a_penalty_over_no_tokens_is_none(tmp_path: Path) -> None:
    keys = {"general.sampling.penalty_repeat": 1.5, "general.sampling.penalty_last_n": 0}
    assert advice_of_gguf(keys, lambda: 320, tmp_path).sampling == {}


@pytest.mark.parametrize("value", [-1.0, float("nan"), 101.0, "hot", True, np.array([1.0])])
def test_impossible_sampling_in_gguf_is_named_by_its_key(value: Any, tmp_path: Path) -> None:
    keys = {"general.sampling.top_p": 0.9, "general.sampling.penalty_repeat": value}
    with pytest.raises(CheckpointError, match=r"general\.sampling\.penalty_repeat") as caught:
        advice_of_gguf(keys, lambda: 320, tmp_path)
    assert "top_p" not in str(caught.value)
    assert str(value) in str(caught.value.found)
    assert "source" in str(caught.value.fix)


def test_llama_cpps_spellings_of_none(tmp_path: Path) -> None:
    """Its common.h: top_k 0 or less is the whole vocabulary, temp 0 or less is greedy."""
    keys = {"general.sampling.top_k": -1, "general.sampling.temp": -1.0}
    assert advice_of_gguf(keys, lambda: 320, tmp_path).sampling == {"temperature": 0.0}


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    save(build(CONFIG), tmp_path / "hf", "float32", generation={"eos_token_id": [1, 7]})
    path = converted(tmp_path / "hf", tmp_path / "a.gguf", "gguf:F32").destination
    with read_gguf(path) as file:
        assert file.metadata["tokenizer.ggml.model"] == "none"
        assert file.metadata["deepseek2.vocab_size"] == CONFIG.vocab_size
    assert load(path).config.vocab_size == CONFIG.vocab_size
    with pytest.raises(TokenizerError, match="no tokenizer") as caught:
        ModelFolder.find(str(path)).load_tokenizer()
    assert "--tokenizer" in str(caught.value.fix)
    small.tokenizer().save(tmp_path / "tokenizer")
    own = ModelFolder.find(str(path), tmp_path / "tokenizer")
    assert own.sampling()["stop_token_ids"] == (7,)
    back = converted(path, tmp_path / "back", "bf16").destination
    assert json.loads((back / "generation_config.json").read_text()) == {"eos_token_id": [1, 7]}


def read_all(folder: Path) -> None:
    model = ModelFolder.find(str(folder))
    model.card()
    model.sampling()
    model.load_tokenizer()


@pytest.mark.parametrize("to", ["gguf:F32", "bf16"])
@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "chat.json",
        "model.safetensors",
    ],
)
def test_a_link_to_nothing_is_not_left_out(name: str, to: str, tmp_path: Path) -> None:
    """As in a cache whose files were removed: what the link stood for would be lost silently."""
    folder = folder_with(tmp_path / "hf", {"eos_token_id": [1, 7]})
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "removed" / name)
    with pytest.raises(RorqualError, match="link to a file that is not there") as told:
        converted(folder, tmp_path / "out", to)
    assert name in str(told.value)
    if name != "model.safetensors":
        with pytest.raises(RorqualError, match=re.escape(name)):
            read_all(folder)


def test_a_tiktoken_file_is_a_tokenizer_too(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "hf", {})
    (folder / "tokenizer.json").unlink()
    (folder / "tiktoken.model").write_text("IQ== 5\n")  # broken, so it cannot be left out
    with pytest.raises(TokenizerError, match=r"tiktoken\.model"):
        converted(folder, tmp_path / "out.gguf", "gguf:F32")


# (the least and the greatest value that are fine, the nearest ones that are not)
LIMITS: dict[str, tuple[list[float], list[float]]] = {
    "temperature": ([0, 100], [-0.001, 100.5]),
    "top_p": ([0.001, 1], [0, 1.001]),
    "top_k": ([0, 1], [-1]),
    "min_p": ([0, 1], [-0.001, 1.001]),
    "repetition_penalty": ([0.01, 100], [0.009, 100.5]),
    "max_tokens": ([1], [0]),
}


@pytest.mark.parametrize("name", LIMITS)
def test_the_limits_of_sampling(name: str, tmp_path: Path) -> None:
    fine, wrong = LIMITS[name]
    for value in fine:
        assert getattr(fill(SamplingDefaults, {name: value}, "here"), name) == value
    for value in wrong:
        with pytest.raises(ConfigError, match=name):
            fill(SamplingDefaults, {name: value}, "here")


def test_ends_have_a_list_only_where_three_keys_are_too_few() -> None:
    """llama.cpp's keys are eos, eot and eom, in this order."""
    eos, eot, eom = END_KEYS
    assert Advice((7, 8)).gguf_keys(1) == {eos: 1, eot: 7, eom: 8}
    assert Advice((1, 7, 8)).gguf_keys(1) == {eos: 1, eot: 7, eom: 8}
    more = Advice((7, 8, 9)).gguf_keys(1)
    assert more.pop(ENDS_KEY).tolist() == [1, 7, 8, 9]
    assert more == {eos: 1, eot: 7, eom: 8}
    assert Advice().gguf_keys(1) == {eos: 1}
    alone = Advice((7,)).gguf_keys(None)  # without a tokenizer: llama.cpp would look the ids up
    assert alone.pop(ENDS_KEY).tolist() == [7]
    assert alone == {}
    assert Advice().gguf_keys(None) == {}


def test_top_k_stays_a_whole_number_and_only_a_penalty_has_a_range() -> None:
    keys = Advice(sampling={"top_k": 40, "top_p": 1}).gguf_keys(None)
    assert keys == {"general.sampling.top_k": 40, "general.sampling.top_p": 1.0}
    assert [type(value) for value in keys.values()] == [float, int]
    keys = Advice(sampling={"repetition_penalty": 2}).gguf_keys(None)
    assert keys == {"general.sampling.penalty_repeat": 2.0, "general.sampling.penalty_last_n": -1}


@pytest.mark.parametrize(
    ("advice", "table"),
    [
        (Advice(), {}),
        (Advice((7,)), {"eos_token_id": 7}),
        (Advice((7, 8)), {"eos_token_id": [7, 8]}),
        (Advice(sampling={"top_p": 0.9}), {"do_sample": True, "top_p": 0.9}),
        (Advice(sampling={"repetition_penalty": 1.5}), {"repetition_penalty": 1.5}),
        (Advice(sampling={"temperature": 0.0, "top_k": 3}), {"do_sample": False, "top_k": 3}),
        (Advice(sampling={"temperature": 0.5}), {"do_sample": True, "temperature": 0.5}),
    ],
)
def test_generation_config_says_what_transformers_takes(
    advice: Advice, table: dict[str, Any]
) -> None:
    """transformers refuses a temperature of 0, and samples only if told so."""
    assert advice.generation_config() == table


def test_a_penalty_without_a_range_or_with_one_counts(tmp_path: Path) -> None:
    """llama.cpp's own default for penalty_last_n is 64. Values are float32: 1.1 was meant."""
    keys: dict[str, Any] = {"general.sampling.penalty_repeat": float(np.float32(1.1))}
    for more in ({}, {"general.sampling.penalty_last_n": 64}):
        found = advice_of_gguf(keys | more, lambda: 320, tmp_path)
        assert found.sampling == {"repetition_penalty": 1.1}
    for fine, wrong in (([0, 319], [320]), ([1], [-1])):
        ends = {ENDS_KEY: np.array(fine, dtype=np.int32)}
        assert advice_of_gguf(ends, lambda: 320, tmp_path).end_ids == tuple(fine)
        with pytest.raises(CheckpointError, match=ENDS_KEY):
            advice_of_gguf({ENDS_KEY: np.array(wrong)}, lambda: 320, tmp_path)


def test_what_a_folder_says_twice_or_to_nobody(tmp_path: Path) -> None:
    """generation_config.json comes before config.json; private and silent fields are no loss."""
    silent = {"pad_token_id": 2, "_from_model_config": True, "transformers_version": "5"}
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 7, "top_k": 0, "num_beams": 4, **silent})
    )
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 8, "num_labels": 2}))
    card = {"sampling": {"max_tokens": 9, "top_p": 0.5}}
    (tmp_path / "chat.json").write_text(json.dumps(card))
    found = advice_of_folder(tmp_path, lambda: 320)
    assert found.end_ids == (7,)
    assert found.sampling == {"max_tokens": 9, "top_p": 0.5}
    assert found.unsaid == (
        "num_beams of generation_config.json",
        "sampling.max_tokens of chat.json",
    )


@pytest.mark.parametrize("with_tokenizer", [True, False])
@pytest.mark.parametrize("form", ["hf", "gguf", "shards"])
def test_what_is_loaded_and_saved_ends_and_samples_as_before(
    tmp_path: Path, form: str, with_tokenizer: bool
) -> None:
    tokenizer = small.tokenizer()
    ends = {"eos_token_id": [tokenizer.eos_id, 262, 75]}
    card = {} if form == "gguf" else {"opening": "I am Sei.", "sampling": {"temperature": 0.4}}
    source = folder_with(tmp_path / "w", ADVICE | ends, **({"chat": card} if card else {}))
    if form != "hf":
        place = tmp_path / ("w.gguf" if form == "gguf" else "shards")
        to = "gguf:F32" if form == "gguf" else "shards:1"
        source = converted(source, place, to).destination
    before = ModelFolder.find(str(source))
    given = before.load_tokenizer() if with_tokenizer else None
    save(load(source), tmp_path / "again", "float32", given)
    after = ModelFolder.find(str(tmp_path / "again"), None if with_tokenizer else source)
    assert after.sampling() == before.sampling()
    assert set(after.sampling()["stop_token_ids"]) == {262, 75}
    assert after.card() == before.card()


def test_ends_of_another_tokenizer_are_left_out(tmp_path: Path) -> None:
    source = folder_with(tmp_path / "w", {"eos_token_id": [7, 8], "top_p": 0.9})
    model, tokenizer = load(source), ModelFolder.find(str(source)).load_tokenizer()
    assert tokenizer.eos_id not in (7, 8)
    save(model, tmp_path / "again", "float32", tokenizer, generation={"top_k": 5})
    table = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert (table["eos_token_id"], table["top_p"], table["top_k"]) == (tokenizer.eos_id, 0.9, 5)


def test_the_end_that_only_config_json_has_is_kept(tmp_path: Path) -> None:
    source = folder_with(tmp_path / "w", {"eos_token_id": None}, config={"eos_token_id": 9})
    save(load(source), tmp_path / "again")
    after = ModelFolder.find(str(tmp_path / "again"), source)
    assert after.sampling()["stop_token_ids"] == (9,)


@pytest.mark.parametrize("name", ["generation_config.json", "chat.json"])
def test_a_broken_file_is_told_before_any_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = folder_with(tmp_path, {})
    (folder / name).write_text("{")

    def read(*arguments: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(model_reader, "load_from", read)
    with pytest.raises(ConfigError, match=f"{name}: is not valid JSON"):
        load(folder)
