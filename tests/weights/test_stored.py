"""Weights that run as they are stored. Oracle: the same checkpoint, decoded to float32."""

from __future__ import annotations

from pathlib import Path

import hf_oracle as oracle
import pytest
import torch
from test_gguf import WIDE, convert
from test_gguf import stored as saved
from torch import Tensor

import small
from rorqual.engine import Engine, SamplingParams
from rorqual.errors import RorqualError, UsageError
from rorqual.model import DeepseekV3, ModelConfig
from rorqual.model.served import use_kernels
from rorqual.model.stored import StoredExperts, StoredHalves, StoredStack
from rorqual.ops import native
from rorqual.ops.block_fp8 import dequantise_blocks, quantise_blocks
from rorqual.ops.decoded import linear, linear_transposed
from rorqual.ops.kernels import FP8, NATIVE
from rorqual.ops.quant_types import CODED
from rorqual.ops.quantise import decode_blocks, encode_blocks
from rorqual.weights import load, save
from small import lively, relative_error

CLOSE = 1e-5
CONFIG = oracle.CONFIGS["mtp_groups_yarn"]


def checkpoint(form: str, config: ModelConfig, folder: Path) -> Path:
    """A random model on disk: a save's dtype, `gguf:MIX`, or `shards`."""
    if form.startswith("gguf:"):
        return convert(saved(lively(config), folder / "hf"), folder / "m.gguf", form[5:])
    return saved(lively(config), folder / "hf", form)


def plain(path: Path) -> DeepseekV3:
    """As stored, each product by the decoded weights: nothing is rounded."""
    return load(path, "stored", kernels="decoded")


FORMS = ("float32", "bfloat16", "fp8", "gguf:F16", "gguf:Q8_0", "gguf:Q4_K_M", "gguf:Q2_K_L")


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_logits_are_those_of_the_decoded_weights(form: str, tmp_path: Path) -> None:
    path = checkpoint(form, WIDE, tmp_path)
    decoded, found = load(path, "float32"), plain(path)
    ids = torch.arange(2 * 23).reshape(2, 23) % WIDE.vocab_size
    h, expected_h = found.hidden(ids), decoded.hidden(ids)
    assert relative_error(h, expected_h) < CLOSE
    assert relative_error(found.head(h), decoded.head(expected_h)) < CLOSE
    step = found.model.step(ids, use_absorbed=True)
    assert relative_error(found.hidden(ids, step), expected_h) < CLOSE
    for depth in range(1, WIDE.num_nextn_predict_layers + 1):
        h = found.mtp_hidden(depth, h[:, :-1], ids[:, depth:])
        expected_h = decoded.mtp_hidden(depth, expected_h[:, :-1], ids[:, depth:])
        assert relative_error(h, expected_h) < CLOSE, depth
    names = {name.rpartition(".")[2] for name, _ in found.named_parameters()}
    assert names <= {"weight"}, "norms and routers alone are parameters"
    assert all(p.dim() == 1 or "gate" in n for n, p in found.named_parameters())
    assert not any(p.requires_grad for p in found.parameters()), "it is frozen"


@pytest.mark.parametrize("name", ["no_q_lora", "tied_mtp", "v2_groups", "all_dense_but_one"])
@torch.no_grad()
def test_every_shape_runs_from_fp8(name: str, tmp_path: Path) -> None:
    """Widths that are no whole blocks too, a tied head, V2's router."""
    config = oracle.CONFIGS[name]
    path = checkpoint("fp8", config, tmp_path)
    ids = torch.arange(11)[None] % config.vocab_size
    assert relative_error(plain(path)(ids), load(path, "float32")(ids)) < CLOSE


@pytest.mark.parametrize("form", ["fp8", "gguf:Q8_0"])
def test_gradients_pass_through_to_what_learns(form: str, tmp_path: Path) -> None:
    """An adapter over a frozen base: here its embedding's output."""
    path = checkpoint(form, WIDE, tmp_path)
    gradients = []
    for model in (load(path), plain(path)):
        ids = torch.arange(9)[None]
        x = model.model.embed_tokens(ids).detach().requires_grad_()  # type: ignore[misc]
        h = model.model(x, model.model.step(ids))
        targets = torch.arange(9)
        model.lm_head(h[0], targets, targets % 2 == 0).backward()  # type: ignore[misc]
        gradients.append(x.grad)
    assert relative_error(gradients[1], gradients[0]) < CLOSE


@pytest.mark.parametrize("form", ["fp8", "gguf:Q4_K_M"])
@pytest.mark.parametrize("settings", [{}, {"speculate": 1}, {"is_batch_invariant": True}])
def test_the_engine_writes_the_same_tokens(
    form: str, settings: dict[str, int], tmp_path: Path
) -> None:
    path = checkpoint(form, WIDE, tmp_path)
    tokenizer = small.tokenizer()
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    texts = []
    for model, kernels in ((load(path), "auto"), (plain(path), "decoded")):
        engine = Engine(model, tokenizer, kernels=kernels, **settings)  # type: ignore[arg-type]
        answers = engine.generate([[5, 9, 2, 7], [11, 3]], params)
        texts.append([answer.token_ids for answer in answers])
    assert texts[0] == texts[1]


needs_native = pytest.mark.skipif(
    native.library() is None, reason="no C++ compiler built the kernels"
)
# Of the median token: activations are rounded to 8 bits or to bfloat16, and in a random model a
# router then makes another choice for some. `tests/ops/test_packed.py` holds the products to 1e-5.
ROUNDED = {"gguf:Q8_0": 0.15, "gguf:Q4_K_M": 0.15, "gguf:BF16": 2e-2, "bfloat16": 2e-2}


@needs_native
@pytest.mark.parametrize("form", ROUNDED)
@torch.no_grad()
def test_the_native_kernels_run_what_they_can_pack(form: str, tmp_path: Path) -> None:
    """Close to the decoded weights; and back again, to the last bit. A packed matrix takes the
    bytes of its rows, but for its last tile.
    """
    model = plain(checkpoint(form, WIDE, tmp_path))
    ids = torch.arange(2 * 23).reshape(2, 23) % WIDE.vocab_size
    exact, num_bytes = model(ids), stored_bytes(model)
    use_kernels(model, "native")
    stacks = [module for module in model.modules() if isinstance(module, StoredStack)]
    assert any(stack.kernels is NATIVE for stack in stacks)
    for stack in stacks:
        is_packable = stack.kind in native.KINDS
        assert (stack.packed_EP is not None) is (stack.kernels is NATIVE) is is_packable
        assert (stack.codes_EOB.numel() > 0) is not is_packable
    assert stored_bytes(model) <= num_bytes + 16 * 4 * WIDE.hidden_size * len(stacks)
    assert 0 < median_error(model(ids), exact) < ROUNDED[form]
    step = model.model.step(ids, use_absorbed=True)
    assert median_error(model.head(model.hidden(ids, step)), exact) < ROUNDED[form]
    use_kernels(model, "decoded")
    assert torch.equal(model(ids), exact)


def median_error(found: Tensor, exact: Tensor) -> float:
    return float(((found - exact).norm(dim=-1) / exact.norm(dim=-1)).median())


def stored_bytes(model: DeepseekV3) -> int:
    return sum(buffer.nbytes for buffer in model.buffers())


@needs_native
def test_packed_weights_differentiate_by_their_input(tmp_path: Path) -> None:
    """As the decoded ones do: an adapter over them learns."""
    model = load(checkpoint("gguf:Q8_0", WIDE, tmp_path), "stored")
    linear = model.model.layers["0"].self_attn.o_proj
    gradients = []
    for name in ("decoded", "native"):
        use_kernels(model, name)
        x = torch.randn(3, linear.stack.shape[2], generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        linear(x).square().sum().backward()
        gradients.append(x.grad)
    assert relative_error(gradients[1], gradients[0]) < 2e-2


@needs_native
@pytest.mark.parametrize("settings", [{}, {"speculate": 1}, {"is_batch_invariant": True}])
def test_the_engine_runs_packed_weights(settings: dict[str, int], tmp_path: Path) -> None:
    """Alone and together, with drafts and without: the same tokens."""
    path = checkpoint("gguf:Q4_K_M", WIDE, tmp_path)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    prompts = [[5, 9, 2, 7], [11, 3]]
    model = load(path, "stored")
    together = Engine(model, small.tokenizer()).generate(prompts, params)
    engine = Engine(model, small.tokenizer(), **settings)  # type: ignore[arg-type]
    answers = [*engine.generate(prompts[:1], params), *engine.generate(prompts[1:], params)]
    assert [a.token_ids for a in answers] == [a.token_ids for a in together]


def test_a_gguf_files_halves_stay_halves(tmp_path: Path) -> None:
    model = plain(checkpoint("gguf:Q8_0", WIDE, tmp_path))
    halves = model.model.layers["0"].self_attn.kv_b_proj
    assert isinstance(halves, StoredHalves)
    assert (halves.keys.kind, halves.values.kind) == ("Q8_0", "Q8_0")
    experts = next(module for module in model.modules() if isinstance(module, StoredExperts))
    assert experts.gate.kind == "Q8_0"
    inner, dim = WIDE.moe_intermediate_size, WIDE.hidden_size
    assert experts.gate.codes_EOB.shape == (WIDE.n_routed_experts, inner, dim // 32 * 34)


@pytest.mark.parametrize("kind", CODED)
def test_a_stack_multiplies_by_tiles(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of each matrix, rows of the second one, both directions."""
    from rorqual.model import stored

    monkeypatch.setattr(stored, "TILE_ELEMENTS", 3 * 256)
    values = torch.randn(2, 10, 256, generator=torch.Generator().manual_seed(1))
    raw = encode_blocks(values.flatten(0, 1), kind)
    stack = StoredStack(kind, (2, 10, 256), raw.shape[1], (128, 128))
    stack.codes_EOB.copy_(raw.view(2, 10, -1))
    exact = decode_blocks(raw, kind).view(2, 10, 256)
    for index in range(2):
        x, y = torch.randn(3, 2, 256), torch.randn(3, 2, 10)
        torch.testing.assert_close(linear(x, stack, index), x @ exact[index].t())
        torch.testing.assert_close(linear_transposed(y, stack, index), y @ exact[index])
    assert torch.equal(stack.rows(torch.tensor([7, 0])), exact[0, [7, 0]])
    half = torch.randn(4, 256).bfloat16()
    assert linear(half, stack).dtype == torch.bfloat16


@pytest.mark.parametrize("size", [128, 32])
def test_fp8_blocks_that_end_in_the_middle(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from rorqual.model import stored

    monkeypatch.setattr(stored, "TILE_ELEMENTS", 1)  # a block of rows at a time
    values = torch.randn(2, 200, 150, generator=torch.Generator().manual_seed(1))
    block = size, size
    stack = StoredStack(FP8, (2, 200, 150), 150, block)
    exact = []
    for index in range(2):
        codes, scales = quantise_blocks(values[index], size)
        stack.codes_EOB[index] = codes.view(torch.uint8)
        stack.scales_EXY[index] = scales  # type: ignore[index]
        exact.append(dequantise_blocks(codes, scales, block=block))
    x = torch.randn(5, 150)
    for index in range(2):
        torch.testing.assert_close(linear(x, stack, index), x @ exact[index].t())
        assert torch.equal(stack.dense(index, 130, 190), exact[index][130:190])
    assert torch.equal(stack.rows(torch.tensor([199, 3])), exact[0][[199, 3]])


def test_what_it_cannot_do_is_said(tmp_path: Path) -> None:
    path = checkpoint("fp8", CONFIG, tmp_path)
    with pytest.raises(UsageError, match="on the CPU only"):
        load(path, "stored", torch.device("meta"))
    with pytest.raises(RorqualError, match="as they are stored"):
        save(load(path, "stored"), tmp_path / "again", "bfloat16")
