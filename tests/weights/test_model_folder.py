"""Oracle: the files' own text; whose advice wins is written out case by case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import hf_oracle as oracle
import pytest
import torch
from test_stored import needs_native

import small
from rorqual.engine import SamplingParams
from rorqual.errors import CheckpointError, ConfigError, UsageError
from rorqual.model import DeepseekV3, build
from rorqual.model.stored import StoredStack
from rorqual.ops.kernels import AUTO
from rorqual.tokenizer import Tokenizer
from rorqual.weights import ModelFolder, model_folder, save

CONFIG = oracle.BASE.with_changes(vocab_size=320)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small.tokenizer()


@pytest.fixture(scope="module")
def model() -> DeepseekV3:
    return build(CONFIG)


def folder_with(path: Path, **files: Any) -> ModelFolder:
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    if not (path / "config.json").exists():  # without it there is no model
        (path / "config.json").write_text("{}", encoding="utf-8")
    return ModelFolder.find(str(path))


def test_the_users_choice_wins_then_the_card_then_generation_config(
    tmp_path: Path, model: DeepseekV3, tokenizer: Tokenizer
) -> None:
    save(model, tmp_path, "float32", tokenizer)
    folder = folder_with(
        tmp_path,
        generation_config={"temperature": 0.6, "top_p": 0.95, "top_k": 0, "eos_token_id": [1, 7]},
        chat={"sampling": {"temperature": 0.1}},
    )
    params = SamplingParams(**folder.sampling(top_p=0.5, seed=None))
    assert (params.temperature, params.top_p, params.top_k) == (0.1, 0.5, None)
    assert params.stop_token_ids == (7,)  # 1 is the tokenizer's own end, which always counts


def test_without_advice_the_defaults_stand(tmp_path: Path) -> None:
    assert SamplingParams(**folder_with(tmp_path).sampling()) == SamplingParams()
    greedy = folder_with(tmp_path, generation_config={"do_sample": False, "temperature": 1.0})
    assert greedy.sampling()["temperature"] == 0


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({"openning": "Hi"}, "did you mean 'opening'"),
        ({"sampling": {"temperature": -1}}, "sampling.temperature"),
        ({"examples": "Hi"}, "examples"),
    ],
)
def test_a_faulty_card_is_named(tmp_path: Path, card: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        folder_with(tmp_path, chat=card).card()
    assert "chat.json" in str(error.value)


def test_a_chat_template_makes_a_chat_model(tmp_path: Path) -> None:
    assert not folder_with(tmp_path).is_chat()
    assert folder_with(tmp_path, tokenizer_config={"chat_template": "x"}).is_chat()


def test_what_is_saved_is_loaded(tmp_path: Path, model: DeepseekV3, tokenizer: Tokenizer) -> None:
    save(model, tmp_path / "m", "float32", tokenizer)
    folder = ModelFolder.find(str(tmp_path / "m"))
    assert folder.name == "m"
    assert folder.max_positions() == CONFIG.max_position_embeddings
    assert folder.load_tokenizer().vocab_size == tokenizer.vocab_size
    assert next(folder.load_model("float32").parameters()).dtype.itemsize == 4
    assert next(folder.load_model("bfloat16").parameters()).dtype.itemsize == 2
    with pytest.raises(UsageError, match="dtype"):
        folder.load_model("int4")


@pytest.mark.parametrize("has_library", [True, False])
@pytest.mark.parametrize("kernels", [AUTO, "native", "torch"])
def test_auto_is_native_where_the_kernels_are(
    tmp_path: Path,
    model: DeepseekV3,
    has_library: bool,
    kernels: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And others were not asked for; else float32, as so small a model was before them."""
    save(model, tmp_path / "m", "float32")
    monkeypatch.setattr(model_folder, "library", lambda: object() if has_library else None)
    monkeypatch.setattr(model_folder, "level", lambda: "avx2")
    loaded = []
    monkeypatch.setattr(model_folder, "load_from", lambda _, *how: loaded.append(how))
    folder = ModelFolder.find(str(tmp_path / "m"))
    folder.load_model("auto", "cpu", kernels)
    ((dtype, _, _),) = loaded
    assert dtype == ("native" if has_library and kernels != "torch" else "float32")
    assert not model_folder.has_kernels(torch.device("cuda"))
    monkeypatch.setattr(model_folder, "level", lambda: "portable")
    assert not model_folder.has_kernels(torch.device("cpu"))
    assert model_folder.has_kernels(torch.device("cpu"), "native") is has_library


@needs_native
def test_auto_keeps_what_the_kernels_multiply(tmp_path: Path, model: DeepseekV3) -> None:
    save(model, tmp_path / "m", "bfloat16")
    loaded = ModelFolder.find(str(tmp_path / "m")).load_model(device="cpu")
    assert loaded.is_stored
    assert {m.kind for m in loaded.modules() if isinstance(m, StoredStack)} == {"BF16"}


def gguf_with(path: Path, **advice: float) -> ModelFolder:
    """A file of keys only, written by the `gguf` package."""
    writer = gguf.GGUFWriter(path, "deepseek2")
    for name, value in advice.items():
        getattr(writer, f"add_sampling_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ModelFolder.find(str(path))


def test_a_gguf_file_has_advice_too(tmp_path: Path) -> None:
    folder = gguf_with(tmp_path / "m.gguf", temp=0.7, top_k=40, top_p=0.9, min_p=0.05)
    params = SamplingParams(**folder.sampling(top_p=0.5))
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.7, 0.5, 40, 0.05)
    (tmp_path / "chat.json").write_text('{"sampling": {"temperature": 0.1}}', encoding="utf-8")
    assert folder.sampling()["temperature"] == 0.7  # the file was named, not the folder
    whole = ModelFolder.find(str(tmp_path)).sampling()
    assert (whole["temperature"], whole["top_k"]) == (0.1, 40)
    greedy = gguf_with(tmp_path / "greedy.gguf", temp=-3.0)
    assert greedy.sampling()["temperature"] == 0  # as llama.cpp has it
    with pytest.raises(CheckpointError, match="temp cannot be"):
        gguf_with(tmp_path / "hot.gguf", temp=3000.0).sampling()


@pytest.mark.parametrize("name", ["m.gguf", "m.bin", "m-00001-of-00001.gguf"])
def test_names_of_files(tmp_path: Path, name: str) -> None:
    found = {"m.gguf": "m", "m.bin": "m.bin", "m-00001-of-00001.gguf": "m"}
    folder = gguf_with(tmp_path / name)
    assert (folder.name, folder.kind) == (found[name], "gguf")
    assert not folder.is_chat()


@pytest.mark.parametrize(
    ("content", "said", "mend"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "pointer", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page", "download"),
        (b"PK\x03\x04archive/data.pkl", "no GGUF model", "convert it to safetensors"),
        (b"whale", "no GGUF model", "name a GGUF file"),
    ],
)
def test_a_file_that_is_no_model_is_called_what_it_is(
    tmp_path: Path, content: bytes, said: str, mend: str
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as caught:
        ModelFolder.find(str(file))
    assert mend in str(caught.value.fix)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        ModelFolder.find(str(tmp_path / "nothing"))
