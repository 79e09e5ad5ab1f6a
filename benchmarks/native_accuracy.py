"""How far the logits of packed weights are from those of float32, and how far llama.cpp's are.

Over the shipped model's own dialogues; the bundled model, or another checkpoint with its tokenizer.

1. Each type of GGUF file: our engine's steps and llama.cpp on the same file, against the float32
   logits of that file's decoded weights. llama.cpp is taken from `build/llama-cpp` or from
   RORQUAL_LLAMA_CPP (see tests/weights/llama_cpp_oracle.py); without it only ours is measured.
2. The forms that the checkpoint itself runs in (`--dtype`), against its own float32 logits.

The relative error is ||a - b|| / ||b|| over all logits, and the median of that of a token; KL is
KL(float32 || a) of a token, its mean with the standard error of the mean, and its median. Means are
ruled by the one token in a hundred for which some layer chooses other experts.

    python benchmarks/native_accuracy.py
    python benchmarks/native_accuracy.py --mixes Q8_0 Q4_K_M --form stored --tokens 2000
    RORQUAL_CPU=avx2 python benchmarks/native_accuracy.py    # attention in float32
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from rorqual.bundled import checkpoint_path
from rorqual.ops import native
from rorqual.tokenizer import load_tokenizer
from rorqual.weights import load
from rorqual.weights.gguf.mixes import MIXES
from rorqual.weights.gguf.writer import GgufOptions, write_gguf
from rorqual.weights.open import open_source

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "weights")]
import llama_cpp_oracle as llama_cpp  # noqa: E402
from native_logits import dialogues, engine_logits, gap_of, model_logits  # noqa: E402

Texts = list[list[int]]
HEAD = f"{'weights':10}{'run by':12}{'cache':10}{'steps':12}{'relative':>10}{'median':>10}"
HEAD += f"{'mean KL':>10}{'+-':>9}{'median':>10}"


def show(names: Iterable[str], logits: Iterable[Tensor], wanted: list[Tensor]) -> None:
    gap = gap_of(logits, wanted)
    widths = (10, 12, 10, 12)
    name = "".join(f"{part:{width}}" for part, width in zip(names, widths, strict=True))
    errors = f"{gap.relative:10.2e}{gap.median_relative:10.2e}"
    kl = f"{gap.mean_kl:10.2e}{gap.mean_kl_error:9.0e}{gap.median_kl:10.1e}"
    print(f"{name}{errors}{kl}", flush=True)


def show_ours(name: str, path: Path | str, form: str, texts: Texts, wanted: list[Tensor]) -> None:
    model = load(path, form)  # type: ignore[arg-type]
    for way in ("prompt", "one by one"):
        for cache in ("bf16", "float32"):
            logits: Iterator[Tensor] = engine_logits(model, texts, way, cache)  # type: ignore[arg-type]
            show((name, form, cache, way), logits, wanted)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--longest", type=int, default=256, help="tokens of a dialogue")
    parser.add_argument("--mixes", nargs="*", default=list(MIXES))
    parser.add_argument("--forms", nargs="*", default=["native", "int8", "bfloat16"])
    parser.add_argument("--form", default="native", help="in which GGUF files run")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = checkpoint_path(arguments.model)
    texts = dialogues(load_tokenizer(path), arguments.tokens, arguments.longest)
    print(f"{len(texts)} dialogues of {sum(map(len, texts)):,} tokens, {native.level()}")
    print(HEAD)
    wanted = list(model_logits(load(path, "float32"), texts))
    for form in arguments.forms:
        if form == "bfloat16":
            show(("itself", form, "none", "prompt"), model_logits(load(path, form), texts), wanted)
        else:
            show_ours("itself", path, form, texts, wanted)
    for mix in arguments.mixes:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{mix}.gguf"
            with open_source(path) as source:
                write_gguf(source, file, GgufOptions(mix))
            wanted = list(model_logits(load(file, "float32"), texts))
            show_ours(mix, file, arguments.form, texts, wanted)
            for cache in llama_cpp.CACHE_TYPES if llama_cpp.PYTHON.is_file() else ():
                logits = llama_cpp.logits_of_texts(file, texts, Path(folder), cache)
                show((mix, "llama.cpp", cache, "prompt"), logits, wanted)


if __name__ == "__main__":
    main()
