"""Keys of GGUF files and fields of the demo, one by one: what a missing, an old or a strange one
means. Oracles: llama.cpp's readers, the shape that the keys were made of, bytes counted by hand.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import hf_oracle as oracle
import numpy as np
import pytest
import torch

from rorqual.errors import CheckpointError, ConfigError, TokenizerError, UsageError
from rorqual.model import ModelConfig, YarnScaling, build, preset
from rorqual.tokenizer import Tokenizer, train_tokenizer
from rorqual.weights import load, save
from rorqual.weights.gguf.metadata import config_of, metadata_of
from rorqual.weights.gguf.tokenizer import tokenizer_metadata, tokenizer_of
from rorqual.weights.gguf.writer import PIECES_AHEAD, GgufOptions, _in_order, write_gguf
from rorqual.weights.open import open_source
from rorqual.weights.shards.model_args import (
    config_from_model_args,
    is_model_args,
    model_args,
    unsaid,
)

BASE = oracle.BASE
NAMES = ["output.weight", "blk.1.exp_probs_b.bias"]
YARN = YarnScaling(
    factor=4, original_max_position_embeddings=16, beta_fast=24, beta_slow=2,
    mscale=0.707, mscale_all_dim=0.707,
)  # fmt: skip


def read(
    config: ModelConfig, changes: dict[str, Any], names: list[str] = NAMES, **kept: Any
) -> ModelConfig:
    """The shape that the config's keys give; `...` removes one."""
    keys = metadata_of(config, 0, **kept)
    keys |= {f"deepseek2.{key}": value for key, value in changes.items()}
    found = config_of({k: v for k, v in keys.items() if v is not ...}, names, Path("m.gguf"))
    return found.with_changes(initializer_range=config.initializer_range)


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({"nextn_predict_layers": 1}, {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}),
        ({"expert_shared_count": ...}, {"n_shared_experts": None}),
        ({"expert_shared_count": 0}, {"n_shared_experts": None}),
        ({"leading_dense_block_count": ...}, {"first_k_dense_replace": 0}),
        ({"expert_weights_norm": ...}, {"norm_topk_prob": False}),
        ({"expert_weights_scale": ...}, {"routed_scaling_factor": 1.0}),
        ({"expert_weights_scale": 0.0}, {"routed_scaling_factor": 1.0}),
        ({"attention.q_lora_rank": ...}, {"q_lora_rank": None}),
        ({"attention.q_lora_rank": 0}, {"q_lora_rank": None}),
        ({"rope.freq_base": 50000.0}, {"rope_theta": 50000.0}),
        ({"rope.freq_base": ...}, {"rope_theta": 10000.0}),
        ({"attention.layer_norm_rms_epsilon": float(np.float32(1e-5))}, {"rms_norm_eps": 1e-5}),
        ({"feed_forward_length": np.array([96, 96, 96])}, {}),
        ({"expert_group_count": 4, "expert_group_used_count": 2}, {"n_group": 4, "topk_group": 2}),
        ({"expert_group_count": 4, "expert_group_used_count": 0}, {}),
        ({"expert_gating_func": 0}, {}),
        ({"expert_gating_func": ...}, {}),
        ({"rope.scaling.type": "none"}, {}),
    ],
)
def test_what_a_key_means(changes: dict[str, Any], shape: dict[str, Any]) -> None:
    assert read(BASE, changes) == BASE.with_changes(**shape)


def test_a_head_of_its_own_and_a_vocabulary_are_seen_in_the_file() -> None:
    tied = read(BASE, {}, ["blk.1.exp_probs_b.bias"])
    assert tied == BASE.with_changes(tie_word_embeddings=True)
    keys = metadata_of(BASE, 0)
    del keys["deepseek2.vocab_size"]
    keys["tokenizer.ggml.tokens"] = ["a"] * 7
    assert config_of(keys, NAMES, Path("m.gguf")).vocab_size == 7
    keys["tokenizer.ggml.tokens"] = np.array([1])
    with pytest.raises(CheckpointError, match="neither"):
        config_of(keys, NAMES, Path("m.gguf"))


def test_without_a_function_of_scores_a_bias_tells_it() -> None:
    v2 = {"norm_topk_prob": True}
    found = read(BASE, {"expert_gating_func": ...}, ["output.weight"])
    assert (found.scoring_func, found.topk_method) == ("softmax", "greedy")
    groups = {"expert_group_count": 4, "expert_group_used_count": 2, "expert_gating_func": 1}
    found = read(BASE.with_changes(**v2), groups)
    assert (found.scoring_func, found.topk_method) == ("softmax", "group_limited_greedy")
    for wrong in (3, -1):
        with pytest.raises(CheckpointError, match="expert_gating_func has an impossible"):
            read(BASE, {"expert_gating_func": wrong})


@pytest.mark.parametrize(("width", "experts"), [(7168, 255), (7167, 256)])
def test_only_v3_has_v3s_groups(width: int, experts: int) -> None:
    config = preset("671b").with_changes(
        hidden_size=width, n_routed_experts=experts, n_group=1, topk_group=1
    )
    gone = {"expert_group_count": ..., "expert_group_used_count": ...}
    assert read(config, gone) == config


@pytest.mark.parametrize("is_split", [True, False])
def test_both_forms_of_the_widths(is_split: bool) -> None:
    """The newer one has the latent's width beside a head's, the older one a head's alone."""
    assert read(BASE, {}, is_split=is_split) == BASE
    keys = metadata_of(BASE, 0, is_split=is_split)
    last = {key.rpartition(".")[2]: value for key, value in keys.items()}
    found = {k: v for k, v in last.items() if k.startswith(("key_length", "value_length"))}
    mla = {"key_length_mla": 24, "value_length_mla": 12}
    assert found == ({"key_length": 24, "value_length": 16} | mla if is_split else
                     {"key_length": 24, "value_length": 12})  # fmt: skip


def test_yarn_is_kept_and_its_defaults_are_llama_cpps() -> None:
    config = BASE.with_changes(rope_scaling=YARN)
    assert read(config, {}) == config
    keys = metadata_of(config, 0)
    assert "deepseek2.rope.scaling.rorqual_mscale" not in keys
    assert keys["deepseek2.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.0707)
    betas = {f"rope.scaling.yarn_beta_{name}": ... for name in ("fast", "slow")}
    found = read(config, betas).rope_scaling
    assert found is not None
    assert (found.beta_fast, found.beta_slow) == (32.0, 1.0)
    with pytest.raises(CheckpointError, match="yarn_log_multiplier is missing"):
        read(config, {"rope.scaling.yarn_log_multiplier": ...})
    for all_dim in (0.3, 0.6, 0.7, 0.8, 1.1, 1.2):  # divided by 0.1 again, some gain a last digit
        odd = config.with_changes(rope_scaling=replace(YARN, mscale_all_dim=all_dim))
        assert read(odd, {}) == odd
    with pytest.raises(CheckpointError, match="yarn or none"):
        read(config, {"rope.scaling.type": "linear"})


def test_all_groups_kept_are_written_as_none() -> None:
    """llama.cpp stops at such counts; the choice is the same."""
    config = BASE.with_changes(n_group=4, topk_group=4)
    assert read(config, {}) == BASE
    kept = BASE.with_changes(n_group=4, topk_group=3)
    assert read(kept, {}) == kept


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["one whale, two whales 123\n" * 20], 300)


def test_special_tokens_and_templates_that_are_not_there(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    size = tokenizer.vocab_size
    keys = tokenizer_metadata(tokenizer, size)
    assert len(keys["tokenizer.ggml.tokens"]) == len(keys["tokenizer.ggml.token_type"]) == size
    plain = tokenizer_of(keys, tmp_path)
    assert plain.vocab_size == size
    for strange in (size, -1, True, "1"):
        changes = {f"tokenizer.ggml.{name}_token_id": strange for name in ("eos", "padding")}
        found = tokenizer_of(keys | changes, tmp_path)
        assert (found.eos_id, found.pad_id) == (plain.eos_id, plain.pad_id)
    own = {"tokenizer.ggml.eos_token_id": tokenizer.pad_id}
    assert tokenizer_of(keys | own, tmp_path).eos_id == tokenizer.pad_id
    template = tokenizer_of(keys | {"tokenizer.chat_template": "{{ messages }}"}, tmp_path)
    assert template.chat_template == "{{ messages }}"
    assert tokenizer_of(keys | {"tokenizer.chat_template": 3}, tmp_path).chat_template


def test_lists_of_tokens_that_do_not_fit(tokenizer: Tokenizer, tmp_path: Path) -> None:
    keys = tokenizer_metadata(tokenizer, 320)
    kinds, merges = keys["tokenizer.ggml.token_type"], list(keys["tokenizer.ggml.merges"])
    for change in (
        {"tokenizer.ggml.token_type": kinds[:-1]},
        {"tokenizer.ggml.token_type": kinds.tolist()},
        {"tokenizer.ggml.merges": None},
    ):
        with pytest.raises(TokenizerError, match="do not belong together"):
            tokenizer_of(keys | change, tmp_path)
    for merge in ("a", " a", "a ", "a b c", ""):
        with pytest.raises(TokenizerError, match="no pair of tokens"):
            tokenizer_of(keys | {"tokenizer.ggml.merges": [*merges, merge]}, tmp_path)
    for whole, said in (("{", "is not JSON"), ("[]", "is not an object")):
        with pytest.raises(TokenizerError, match=said):
            tokenizer_of(keys | {"tokenizer.huggingface.json": whole}, tmp_path)


def test_a_tokenizer_may_have_an_id_for_every_row(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for rows, is_fine in ((tokenizer.vocab_size, True), (tokenizer.vocab_size - 1, False)):
        folder = tmp_path / str(rows)
        save(build(BASE.with_changes(vocab_size=rows)), folder)
        with open_source(folder) as source:
            if is_fine:
                write_gguf(source, tmp_path / "m.gguf", GgufOptions("F32", tokenizer=tokenizer))
                continue
            with pytest.raises(UsageError, match="more ids"):
                write_gguf(source, tmp_path / "n.gguf", GgufOptions("F32", tokenizer=tokenizer))
    assert load(tmp_path / "m.gguf").config.vocab_size == tokenizer.vocab_size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8"])
def test_progress_is_told_of_every_byte_of_a_weight(dtype: Any, tmp_path: Path) -> None:
    """kv_b_proj, which becomes two tensors, is counted once; scales of FP8 are no weights."""
    save(build(BASE), tmp_path / "hf", dtype)
    counts: list[int] = []
    with open_source(tmp_path / "hf") as source:
        write_gguf(source, tmp_path / "m.gguf", GgufOptions("F16"), advance=counts.append)
        sizes = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
        wanted = sum(
            torch.Size(entry.shape).numel() * sizes[entry.dtype]
            for entry in source.entries.values()
            if not entry.name.endswith("_scale_inv")
        )
    assert sum(counts) == wanted


def test_few_pieces_are_ahead_and_none_after_an_error() -> None:
    """Twice as many as workers, in their order; what nobody waits for is given up."""
    begun: list[int] = []
    gate = threading.Event()

    def job(number: int) -> Any:
        def run() -> Any:
            gate.wait(60)
            return number

        begun.append(number)
        return run

    with ThreadPoolExecutor(2) as pool:
        results = _in_order(pool, (job(i) for i in range(20)), 2)
        gate.set()
        assert next(results) == 0
        assert begun == list(range(2 * PIECES_AHEAD))
        assert list(results) == list(range(1, 20))  # type: ignore[comparison-overlap]
        gate.clear()
        begun.clear()
        waiting = _in_order(pool, (job(i) for i in range(20)), 2)
        gate.set()
        next(waiting)
        waiting.close()  # type: ignore[attr-defined]
        assert len(begun) == 2 * PIECES_AHEAD


ARGS: dict[str, Any] = {"dim": 64, "n_layers": 2, "score_func": "sigmoid"}


@pytest.mark.parametrize(
    ("more", "has_yarn", "length"),
    [
        ({}, True, 163840),  # ModelArgs: 16384 > 4096, times 40
        ({"max_seq_len": 4096}, False, 4096),
        ({"max_seq_len": 4097}, True, 163840),
        ({"max_seq_len": 512, "original_seq_len": 512}, False, 512),
        ({"original_seq_len": 100, "rope_factor": 2.5}, True, 250),
    ],
)
def test_the_demo_has_yarn_beyond_its_original_length(
    more: dict[str, Any], has_yarn: bool, length: int
) -> None:
    found = config_from_model_args(ARGS | more)
    assert (found.rope_scaling is not None, found.max_position_embeddings) == (has_yarn, length)
    if found.rope_scaling is not None:
        yarn = found.rope_scaling
        assert (yarn.mscale, yarn.mscale_all_dim, yarn.beta_fast, yarn.beta_slow) == (1, 1, 32, 1)


def test_what_the_demos_fields_say() -> None:
    found = config_from_model_args(ARGS)
    assert (found.q_lora_rank, found.n_shared_experts, found.norm_topk_prob) == (None, 2, True)
    v2 = config_from_model_args({"dim": 64, "n_layers": 2})
    assert (v2.scoring_func, v2.topk_method, v2.norm_topk_prob) == ("softmax", "greedy", False)
    groups = {"dim": 64, "n_layers": 2, "n_expert_groups": 8, "n_limited_groups": 3}
    grouped = config_from_model_args(groups)
    assert (grouped.topk_method, grouped.topk_group) == ("group_limited_greedy", 3)
    assert is_model_args({"dim": 1, "n_layers": 1})
    assert not is_model_args({"dim": 1, "n_layers": 1, "hidden_size": 1})
    assert not is_model_args({"dim": 1})
    assert not is_model_args({"n_layers": 1})
    for name in ("max_seq_len", "original_seq_len", "rope_factor", "mscale"):
        for wrong in (True, None, "1"):
            with pytest.raises(ConfigError, match=f"{name} is not a number"):
                config_from_model_args(ARGS | {name: wrong})
    bare = BASE.with_changes(n_shared_experts=None, q_lora_rank=None)
    table = model_args(bare, "bf16")
    assert (table["n_shared_experts"], table["q_lora_rank"], table["dtype"]) == (0, 0, "bf16")
    assert "scale_fmt" not in table
    assert table["max_seq_len"] == table["original_seq_len"] == 256
    assert model_args(bare, "fp8", is_ue8m0=True)["scale_fmt"] == "ue8m0"


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ()),
        ({"tie_word_embeddings": True}, ("tie_word_embeddings",)),
        ({"rms_norm_eps": 1e-5}, ("rms_norm_eps",)),
        ({"norm_topk_prob": False}, ("norm_topk_prob",)),
        ({"num_nextn_predict_layers": 1}, ("num_nextn_predict_layers",)),
        ({"rope_scaling": YARN}, ()),
        (
            {"rope_scaling": YarnScaling(4, 16, mscale=1.0, mscale_all_dim=0.5)},
            ("rope_scaling.mscale",),
        ),
        ({"hidden_size": 7167}, ("hidden_size other than 7168 with a router bias",)),
    ],
)
def test_what_the_demo_has_no_field_for(changes: dict[str, Any], names: tuple[str, ...]) -> None:
    config = BASE.with_changes(hidden_size=7168)
    assert unsaid(config.with_changes(**changes)) == list(names)
    assert unsaid(oracle.SOFTMAX) == []
