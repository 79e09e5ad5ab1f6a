"""One model as every kind of checkpoint, and GGUF files of other architectures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from rorqual.engine import Engine, SamplingParams
from rorqual.weights import ModelFolder
from rorqual.weights.convert.plan import Options, Target
from rorqual.weights.convert.run import convert
from rorqual.weights.gguf.writer import GgufOptions, write_gguf
from rorqual.weights.open import open_source

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
PART_BYTES = 60_000


def converted(source: Path, destination: Path, to: str, *, keep_mtp: bool | None = None) -> Path:
    convert(source, destination, Options(Target.parse(to), keep_mtp))
    return destination


def advised(source: Path, folder: Path, **generation: Any) -> Path:
    """A copy of a folder, with this in its generation_config.json."""
    shutil.copytree(source, folder)
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return folder


def greedy_ids(folder: Path, prompt: str, count: int) -> list[int]:
    """What the engine says to a message, whatever ends its answers."""
    found = ModelFolder.find(str(folder))
    params = SamplingParams(**found.sampling(temperature=0, max_tokens=count, ignore_eos=True))
    engine = Engine(found.load_model(), found.load_tokenizer())
    message = {"role": "user", "content": prompt}
    [output] = engine.generate([engine.tokenizer.encode_chat([message])], params)
    return output.token_ids


def split_gguf(source: Path, path: Path) -> Path:
    """The second part of several."""
    with open_source(source) as opened:
        write_gguf(opened, path, GgufOptions("F32", max_file_bytes=PART_BYTES))
    parts = sorted(path.parent.glob(f"{path.stem}-*-of-*.gguf"))
    assert len(parts) > 2
    return parts[1]


def as_the_demo_leaves_it(shards: Path, folder: Path) -> Path:
    """Ranks and tokenizer files alone: DeepSeek's converter copies no configuration."""
    folder.mkdir()
    for file in shards.iterdir():
        if file.suffix == ".safetensors" or file.name in TOKENIZER_FILES:
            shutil.copy(file, folder)
    return folder


def llama_gguf(path: Path) -> Path:
    """A small file of another architecture, written by the `gguf` package."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Not \x1b[31mred")
    writer.add_block_count(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"token{i}" for i in range(999)])
    writer.add_token_types([1] * 999)
    writer.add_array("llama.layer_sizes", [1.5, 2.5])
    values = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    for kind in ("Q4_1", "Q8_0", "F16"):
        coded = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
        writer.add_tensor(
            f"blk.0.{kind.lower()}.weight", coded, raw_dtype=gguf.GGMLQuantizationType[kind]
        )
    writer.add_tensor("output_norm.weight", values[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
