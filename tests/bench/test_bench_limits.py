"""What a step must read and multiply at least. Oracles: counts of parameters in closed form, sizes
of files, and figures worked out by hand.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rorqual.bench.figures import Figure, Load, Work
from rorqual.bench.machine import shapes_of
from rorqual.bench.weights import (
    Form,
    Stored,
    decode_work,
    folder_form,
    form_of,
    gguf_form,
    live_form,
    prefill_work,
)
from rorqual.model import ModelConfig, build, preset
from rorqual.model.flops import count_parameters, distinct_experts, prompt_flops
from rorqual.model.served import use_kernels
from rorqual.ops.native import library
from rorqual.weights import load, save
from rorqual.weights.convert.plan import Options, Target
from rorqual.weights.convert.run import convert
from rorqual.weights.gguf.file import read_gguf
from small import LITTLE, lively

EXACT = 1e-12
CONFIG = LITTLE.with_changes(num_hidden_layers=3, n_shared_experts=1)
NUM_SPARSE = 2


def active(config: ModelConfig) -> int:
    """Parameters that a token's step reads: those it meets, but for the embedding; and the biases
    of the routers.
    """
    count = count_parameters(config)
    embedding = 0 if config.tie_word_embeddings else count.embedding
    return count.activated - embedding + NUM_SPARSE * config.n_routed_experts


@pytest.mark.parametrize("config", [CONFIG, CONFIG.with_changes(tie_word_embeddings=True)])
def test_a_live_models_bytes_are_its_parameters(config: ModelConfig) -> None:
    """Without the MTP layer, which the shape has."""
    assert config.num_nextn_predict_layers == 1
    form = live_form(lively(config))
    assert form.step_bytes(config.num_experts_per_tok) == 4 * active(config)
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    assert form.one_expert == 4 * NUM_SPARSE * expert
    assert (form.storages, form.operands, form.kernels) == ("float32", "float32", "torch")


def test_bfloat16_halves_all_but_the_routers_biases() -> None:
    biases = NUM_SPARSE * CONFIG.n_routed_experts
    model = build(CONFIG).to(torch.bfloat16)
    use_kernels(model, "torch")
    form = live_form(model)
    expected = 2 * (active(CONFIG) - biases) + 4 * biases
    assert form.step_bytes(CONFIG.num_experts_per_tok) == expected
    assert (form.storages, form.operands) == ("bfloat16", "bf16")
    use_kernels(model, "widened")
    assert live_form(model).operands == "float32"


def test_a_folder_and_a_file_count_what_lies_in_them(tmp_path: Path) -> None:
    """The folder run in a dtype; the file as it is: its tensors, less the embedding and the experts
    that are not visited. And the same file's weights as they run from their own bytes.
    """
    config = CONFIG.with_changes(
        hidden_size=64, moe_intermediate_size=32, intermediate_size=64, num_nextn_predict_layers=0
    )
    folder, file = tmp_path / "m", tmp_path / "m.gguf"
    save(lively(config), folder, dtype="float32")
    visited = config.num_experts_per_tok
    assert folder_form(folder, "float32").step_bytes(visited) == 4 * active(config)
    assert folder_form(folder, "bfloat16").step_bytes(visited) == 2 * active(config)
    convert(folder, file, Options(Target.parse("gguf:Q8_0")))
    sizes = {t.name: t.num_bytes for t in read_gguf(file).tensors.values()}
    experts = sum(size for name, size in sizes.items() if "_exps." in name)
    expected = sum(sizes.values()) - sizes["token_embd.weight"] - experts
    expected += experts * visited / config.n_routed_experts
    form = gguf_form(file)
    assert form.step_bytes(visited) == pytest.approx(expected, rel=EXACT)
    assert (form.storages.split("+")[0], form.operands) == ("Q8_0", "int8")
    live = live_form(load(file, "stored"))
    assert live.one_expert == form.one_expert
    assert 1 <= live.fixed / form.fixed < 1.05  # packed in whole tiles of 16 rows
    has_native = library() is not None
    expected_of = ("int8", "native") if has_native else ("float32", "decoded")
    assert (live.operands, live.kernels) == expected_of


@pytest.mark.parametrize(
    ("kernels", "operands"), [("native", "int8"), ("decoded", "float32"), ("", "int8")]
)
def test_what_is_multiplied(kernels: str, operands: str) -> None:
    names = ("blk.0.ffn_up.weight", "blk.1.ffn_up_exps.weight", "blk.9.ffn_up.weight")
    tensors = [Stored(name, "Q4_K", 1000.0, kernels) for name in names]
    tensors.append(Stored("blk.0.ffn_norm.weight", "F32", 10.0, "torch"))
    form = form_of(CONFIG, tensors)
    assert form == Form(1010, 1000 / CONFIG.n_routed_experts, "Q4_K", operands, kernels)


def test_the_limit_is_the_slower_of_both() -> None:
    """100 bytes at 50 a second take 2 seconds; 30 FLOPs at 10 take 3, at 60 half of one."""
    work = Work(100, 30, "bf16", 4, 6.0)
    assert work.limit(50, {"bf16": 10, "int8": 1000}) == (pytest.approx(4 / 3), "compute")
    assert work.limit(50, {"bf16": 60, "int8": 1}) == (pytest.approx(4 / 2), "bandwidth")
    # Nothing multiplies these operands here: the fastest that there is stands for it.
    assert work.limit(50, {"float32": 10}) == (pytest.approx(4 / 3), "compute")


FORM = Form(1000, 10, "bfloat16", "bf16")


def test_a_decode_step_by_hand() -> None:
    """Two streams of 8 tokens each: a layer's latents are 16 + 8 values of 2 bytes."""
    config = CONFIG.with_changes(kv_lora_rank=16, qk_rope_head_dim=8)
    work = decode_work(config, FORM, 2, 16, ("auto", "bfloat16"), 3.5)
    assert work.num_bytes == 1000 + 10 * 3.5 + 3 * 16 * 24 * 2
    assert (work.num_tokens, work.operands, work.experts) == (2, "bf16", 3.5)
    latents = 2 * 3 * config.num_attention_heads * (16 + 8 + 16)  # a cached token's, absorbed
    more = decode_work(config, FORM, 2, 20, ("auto", "bfloat16"), 3.5)
    assert more.flops - work.flops == pytest.approx(4 * latents, rel=EXACT)
    chance = decode_work(config, FORM, 2, 16, ("auto", "bfloat16"))
    assert chance.experts == distinct_experts(config, 2)


def test_a_prompt_by_hand() -> None:
    """20 tokens in steps of 8: three steps, of which the last has 4; the head meets one row."""
    work = prefill_work(CONFIG, FORM, 20, 8)
    experts = [distinct_experts(CONFIG, size) for size in (8, 8, 4)]
    assert work.num_bytes == pytest.approx(3 * 1000 + 10 * sum(experts), rel=EXACT)
    head = 2 * CONFIG.vocab_size * CONFIG.hidden_size
    wider = CONFIG.with_changes(vocab_size=2 * CONFIG.vocab_size)
    more = prefill_work(wider, FORM, 20, 8).flops - work.flops
    assert more == pytest.approx(head, rel=EXACT)
    assert prompt_flops(CONFIG, 1) == prefill_work(CONFIG, FORM, 1, 8).flops


def test_the_benchmarks_model_reads_what_the_report_of_it_says() -> None:
    """`mid`: 1,765M parameters, 363M of them active, 726 MB a token in bfloat16."""
    count = count_parameters(preset("mid"))
    assert round(count.total / 1e6) == 1765
    assert round((count.activated - count.embedding) / 1e6) == 363
    assert round(2 * (count.activated - count.embedding) / 1e6) == 726


def test_shapes_are_those_of_a_prompts_step() -> None:
    shapes = shapes_of(preset("mid"))
    assert (48, 1024, 1024) in shapes  # an expert's gate and up, 512 rows of 6 in 64
    assert (48, 512, 1024) in shapes
    assert (512, 1024, 4096) in shapes
    assert (512, 768, 16 * 192) in shapes
    assert len(shapes) == len(set(shapes))
    assert all(outputs != 32768 for _, _, outputs in shapes)
    assert (512, 256, 4 * 64) in shapes_of(preset("tiny"))  # queries without a low rank


def test_records_come_back_as_they_went() -> None:
    work = Work(1.0, 2.0, "int8", 3, 4.0)
    for figure in (Figure("decode", 5.0, "tokens/s", 6, 7, work), Figure("load", 1.0, "s")):
        assert Figure.of(figure.as_dict()) == figure
    asked = Load(prefill=(1, 2), streams=(), depths=(3,), decode_tokens=4, threads=5)
    assert Load.of(asked.as_dict()) == asked
