"""Where llama.cpp is, if there: `build/llama-cpp`, or the Python that RORQUAL_LLAMA_CPP names.

    python3 -m venv build/llama-cpp
    CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF \
        -DLLAMA_USE_PREBUILT_UI=OFF" build/llama-cpp/bin/pip install llama-cpp-python==0.3.36

takes about ten minutes of a processor.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rorqual.ops.quant_types import QUANT_TYPES

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("RORQUAL_LLAMA_CPP", ROOT / "build" / "llama-cpp" / "bin" / "python"))

needs_llama_cpp = pytest.mark.skipif(
    not PYTHON.is_file(),
    reason=f"llama.cpp is not built: no {PYTHON} (see tests/weights/llama_cpp_oracle.py)",
)

LOGITS = """
import json, sys
import numpy as np
from llama_cpp import Llama
model, texts, cache_type, out = sys.argv[1:]
texts = json.load(open(texts))
llama = Llama(model, n_ctx=max(64, *map(len, texts)), n_batch=512, logits_all=True, n_threads=1,
              n_threads_batch=1, type_k=int(cache_type), type_v=int(cache_type), verbose=False)
rows = []
for tokens in texts:
    llama.reset()
    llama.eval(tokens)
    rows.append(np.array(llama.scores[: len(tokens)], dtype=np.float32))
np.save(out, np.concatenate(rows))
"""
CACHE_TYPES = {"float32": 0, "float16": 1}  # the latter is llama.cpp's own choice


def logits(model: Path, tokens: list[int], folder: Path) -> Tensor:
    """llama.cpp's logits (tokens, vocabulary) of a GGUF file, with a float32 cache."""
    (found,) = logits_of_texts(model, [tokens], folder)
    return found


def logits_of_texts(
    model: Path, texts: Sequence[list[int]], folder: Path, cache: str = "float32"
) -> list[Tensor]:
    """llama.cpp's logits (tokens, vocabulary) of each text."""
    given, out = folder / "texts.json", folder / "logits.npy"
    given.write_text(json.dumps(list(texts)))
    kind = str(CACHE_TYPES[cache])
    arguments = [str(PYTHON), "-c", LOGITS, str(model), str(given), kind, str(out)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"llama.cpp does not run {model.name}: {done.stderr[-2000:]}"
    return list(torch.from_numpy(np.load(out)).split([len(text) for text in texts]))


def vocabulary(model: Path, text: str, folder: Path) -> list[int]:
    """llama.cpp's ids of a text, with the begin-of-sentence that it adds."""
    code = (
        "import sys, json; from llama_cpp import Llama; "
        "l = Llama(sys.argv[1], vocab_only=True, verbose=False); "
        "json.dump(l.tokenize(sys.argv[2].encode(), add_bos=True, special=True), "
        "open(sys.argv[3], 'w'))"
    )
    out = folder / "ids.json"
    subprocess.run([str(PYTHON), "-c", code, str(model), text, str(out)], check=True)
    return [int(number) for number in out.read_text().strip("[]").split(",")]


@functools.cache
def _library() -> ctypes.CDLL:
    found = subprocess.run(
        [str(PYTHON), "-c", "import llama_cpp, os; print(os.path.dirname(llama_cpp.__file__))"],
        capture_output=True,
        text=True,
        check=True,
    )
    library = ctypes.CDLL(str(Path(found.stdout.strip()) / "lib" / "libggml-base.so"))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def quantised(x: Tensor, type_name: str, importance: Tensor | None = None) -> Tensor:
    """ggml's own encoding of (rows, columns) float32."""
    kind = QUANT_TYPES[type_name]
    rows, columns = x.shape
    out = torch.empty(rows, kind.num_bytes(columns), dtype=torch.uint8)
    _library().ggml_quantize_chunk(
        ctypes.c_int(kind.type_id),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int64(0),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        ctypes.c_void_p(None if importance is None else importance.data_ptr()),
    )
    return out
