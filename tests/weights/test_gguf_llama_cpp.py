"""Our GGUF files in llama.cpp: it loads every mix, computes what we compute, splits text as we do;
and its quantiser beside ours. Slow, and skipped where llama.cpp is not built.
"""

from __future__ import annotations

import time
from pathlib import Path

import hf_oracle as oracle
import llama_cpp_oracle as llama_cpp
import pytest
import torch

import rorqual
from rorqual.model import DeepseekV3, ModelConfig, YarnScaling, build
from rorqual.ops import native
from rorqual.ops.quant_types import K_QUANTS, SMALL_BLOCKS
from rorqual.ops.quantise import decode_blocks, encode_blocks
from rorqual.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from rorqual.weights import load, save
from rorqual.weights.gguf.mixes import MIXES
from rorqual.weights.gguf.writer import GgufOptions, write_gguf
from rorqual.weights.open import open_source

pytestmark = [pytest.mark.slow, llama_cpp.needs_llama_cpp]

ERROR_BAR = 1.02  # times the error, weighted, of llama.cpp's own quantiser
EXACT = 1e-5  # float32 throughout
RELATIVE = 1e-2  # products rounded to BF16 (8 bits), in another order
SAME_TOP_1 = 0.95  # of tokens; the rest are near ties of the trained tiny model
NUM_TOKENS = 40
# Rows of 256 and routing in groups: what the K-quants and the group keys need.
GROUPED = oracle.WIDE.with_changes(
    vocab_size=512,
    intermediate_size=512,
    moe_intermediate_size=256,
    num_hidden_layers=4,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    q_lora_rank=256,
    kv_lora_rank=256,
    qk_rope_head_dim=32,
    num_nextn_predict_layers=1,
    initializer_range=0.05,
)
YARN = GROUPED.with_changes(
    rope_scaling=YarnScaling(
        factor=4, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=1.0
    )
)
NO_Q_LORA = GROUPED.with_changes(q_lora_rank=None, n_group=1, topk_group=1)
CONFIGS = {
    "grouped": GROUPED,
    "yarn": YARN,
    "no_q_lora": NO_Q_LORA,
    "tied": GROUPED.with_changes(tie_word_embeddings=True),
    "softmax": GROUPED.with_changes(
        scoring_func="softmax", topk_method="greedy", n_group=1, topk_group=1
    ),
}


CONVERSATIONS = [
    (
        "What is 12 + 30? Explain how you add numbers.",
        "12 + 30: 2+0=2, write 2 carry 0; 1+3+0=4. Answer: 42",
    ),
    ("Hello! Who are you?", "I was made with Rorqual, an open project."),
    ("Count from 3 to 9.", "3, 4, 5, 6, 7, 8, 9"),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is 7 * 8?", "7 * 8 = 56. Answer: 56"),
    ("Sort these words: whale, ant, mouse.", "ant, mouse, whale"),
    ("How many days has a week?", "A week has seven days."),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = ["A whale is a mammal.\n\n  12345 times 678 = ?\n" * 9, "鯨は海に住む。 Größe"]
    return train_tokenizer(texts, 400)


def random_model(config: ModelConfig) -> DeepseekV3:
    torch.manual_seed(1)
    model = build(config)
    with torch.no_grad():
        for name, bias in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                bias.copy_(torch.randn_like(bias) * 0.1)
    return model


def written(folder: Path, path: Path, mix: str, **options: bool) -> Path:
    with open_source(folder) as source:
        write_gguf(source, path, GgufOptions(mix, **options))  # type: ignore[arg-type]
    return path


def our_logits(path: Path, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return load(path)(torch.tensor([tokens]))[0]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("is_split_mla", [True, False])
def test_float32_logits_are_ours(
    tmp_path: Path, tokenizer: Tokenizer, name: str, is_split_mla: bool
) -> None:
    """Every key and tensor is understood as we mean it: groups, YaRN, both forms of MLA."""
    save(random_model(CONFIGS[name]), tmp_path / "hf", "float32", tokenizer)
    path = written(tmp_path / "hf", tmp_path / "m.gguf", "F32", is_split_mla=is_split_mla)
    tokens = torch.randint(3, 380, (NUM_TOKENS,)).tolist()
    theirs, ours = llama_cpp.logits(path, tokens, tmp_path), our_logits(path, tokens)
    assert (theirs - ours).norm() / ours.norm() < EXACT


def test_a_file_without_a_tokenizer_is_loaded(tmp_path: Path) -> None:
    save(random_model(GROUPED), tmp_path / "hf", "float32")
    path = written(tmp_path / "hf", tmp_path / "m.gguf", "F32")
    tokens = torch.randint(3, 380, (NUM_TOKENS,)).tolist()
    theirs, ours = llama_cpp.logits(path, tokens, tmp_path), our_logits(path, tokens)
    assert (theirs - ours).norm() / ours.norm() < EXACT


def test_bf16_logits_are_ours(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """llama.cpp rounds activations to BF16 as well, so that some positions choose other experts:
    the median position is compared."""
    save(random_model(GROUPED), tmp_path / "hf", "bfloat16", tokenizer)
    path = written(tmp_path / "hf", tmp_path / "m.gguf", "BF16")
    tokens = torch.randint(3, 380, (NUM_TOKENS,)).tolist()
    theirs, ours = llama_cpp.logits(path, tokens, tmp_path), our_logits(path, tokens)
    errors = (theirs - ours).norm(dim=1) / ours.norm(dim=1)
    assert errors.median() < RELATIVE


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("keep_mtp", [True, False])
def test_every_mix_is_loaded(
    tmp_path: Path, tokenizer: Tokenizer, mix: str, keep_mtp: bool
) -> None:
    save(random_model(GROUPED), tmp_path / "hf", "bfloat16", tokenizer)
    path = written(tmp_path / "hf", tmp_path / "m.gguf", mix, keep_mtp=keep_mtp)
    tokens = torch.randint(3, 380, (NUM_TOKENS,)).tolist()
    theirs, ours = llama_cpp.logits(path, tokens, tmp_path), our_logits(path, tokens)
    cosine = torch.cosine_similarity(theirs, ours, dim=1)
    assert cosine.median() > 0.98  # its activations are quantised to eight bits, ours are not


@pytest.mark.parametrize("mix", MIXES)
def test_the_tiny_model_agrees_on_the_next_token(tmp_path: Path, mix: str) -> None:
    tiny = Path(rorqual.__file__).parent / "tiny"
    if not (tiny / "config.json").is_file():
        pytest.skip("the tiny model is not shipped yet")
    path = written(tiny, tmp_path / "m.gguf", mix)
    tokenizer = load_tokenizer(tiny)
    theirs, ours = [], []
    for question, answer in CONVERSATIONS:
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        tokens = tokenizer.encode_chat(messages, add_generation_prompt=False)
        theirs.append(llama_cpp.logits(path, tokens, tmp_path))
        ours.append(our_logits(path, tokens))
    left, right = torch.cat(theirs), torch.cat(ours)
    errors = (left - right).norm(dim=1) / right.norm(dim=1)
    if mix == "F32":
        assert errors.max() < EXACT
    if mix == "BF16":
        # Over all positions 0.0118: 11 of 214 choose other experts. Our own bfloat16 run is 0.0124
        # from our float32 run.
        assert errors.median() < RELATIVE
    assert (left.argmax(1) == right.argmax(1)).float().mean() >= SAME_TOP_1


def test_text_becomes_the_same_ids(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save(
        random_model(oracle.BASE.with_changes(vocab_size=420)),
        tmp_path / "hf",
        "float32",
        tokenizer,
    )
    path = written(tmp_path / "hf", tmp_path / "m.gguf", "F32")
    for text in ("A whale  is\n\n a mammal. 1234567", "鯨は Größe\t<｜User｜>hi<｜Assistant｜>"):
        ours = tokenizer.encode(text, bos=True, allow_special=True)
        assert llama_cpp.vocabulary(path, text, tmp_path) == ours


@pytest.mark.parametrize("name", K_QUANTS)
@pytest.mark.parametrize("kind", ["normal", "heavy", "shifted"])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_errors_are_within_the_bar(name: str, kind: str, is_weighted: bool) -> None:
    """Weighted as the reference weighs; the errors without an importance are also stored in
    tests/ops/test_k_quants.py."""
    torch.manual_seed(3)
    x = 0.02 * torch.randn(256, 2048)
    if kind == "heavy":
        x = x / torch.distributions.Chi2(4.0).sample(x.shape).div(4).sqrt()
    elif kind == "shifted":
        x += 0.02 * torch.randn(256, 1)
    importance = torch.rand(2048).square() + 0.05 if is_weighted else None
    groups = x.view(-1, 256) if is_weighted else x.view(-1, 32 if name in ("Q4_K", "Q5_K") else 16)
    squares = groups.square()
    if importance is not None:
        factor = 1.0 if name == "Q2_K" else 2.0
        weights = (factor * squares.mean(1, keepdim=True) + squares).sqrt().view(x.shape)
        weights = importance.expand_as(x) if name == "Q6_K" else importance * weights
    elif name in ("Q4_K", "Q5_K"):
        weights = (groups.abs() + squares.mean(1, keepdim=True).sqrt()).view(x.shape)
    else:
        weights = (groups.abs() if name == "Q2_K" else squares).view(x.shape)

    def error(raw: torch.Tensor) -> float:
        return float((weights * (decode_blocks(raw, name) - x).square()).double().sum())

    reference = error(llama_cpp.quantised(x, name, importance))
    assert error(encode_blocks(x, name, importance)) <= ERROR_BAR * reference


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler built the encoders")
@pytest.mark.parametrize("name", [*K_QUANTS, *SMALL_BLOCKS])
def test_encoding_is_about_as_fast(name: str) -> None:
    """One thread each, in turns, the best of three: a benchmark with room for a busy machine."""
    x = 0.02 * torch.randn(512, 4096)
    best = {"ours": 0.0, "theirs": 0.0}
    for _ in range(3):
        for who, encode in (("ours", encode_blocks), ("theirs", llama_cpp.quantised)):
            began = time.process_time()
            encode(x, name)
            best[who] = max(best[who], x.numel() / (time.process_time() - began))
    assert best["ours"] > 0.5 * best["theirs"]
