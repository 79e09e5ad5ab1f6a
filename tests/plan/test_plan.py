"""The plan's figures. Oracles: the released model's counts and unsloth's list, closed forms
written out here, the engine's own cache, a simulation of routing.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rorqual.engine.cache_formats import bytes_per_token
from rorqual.errors import UsageError
from rorqual.model import build, preset
from rorqual.model.flops import count_parameters, distinct_experts, forward_flops_per_token
from rorqual.plan import HARDWARE, find_hardware, plan_inference
from rorqual.plan.hardware import USABLE_SHARE, Hardware, Source
from rorqual.plan.inference import disk_table, longest_context
from rorqual.plan.memory import fits, memory_of
from rorqual.plan.sizes import GIB, check_format, disk_bytes, main_part, memory_bytes, nearest_mix
from rorqual.plan.speed import read_bytes, speed_of
from rorqual.plan.wish import KV_FORMATS, Wish, cache_bytes_by_format
from rorqual.weights import save
from rorqual.weights.convert.plan import Options, Target
from rorqual.weights.convert.run import convert
from rorqual.weights.gguf.file import read_gguf
from rorqual.weights.gguf.mixes import MIXES, gguf_bytes

V3 = preset("671b")
# unsloth's list of V3's files, in its own mixed units: GiB rounded up, but Q8_0 in decimal GB.
UNSLOTH = {
    "Q2_K_XS": 207,
    "Q2_K_L": 228,
    "Q3_K_M": 298,
    "Q4_K_M": 377,
    "Q5_K_M": 443,
    "Q6_K": 513,
    "Q8_0": 712,
}
UNSLOTH_TOLERANCE = 0.005  # the list is rounded to whole gigabytes, 0.5 of 207 at most
EXACT = 1e-12


@pytest.mark.parametrize("mix", UNSLOTH)
def test_disk_sizes_are_those_of_unsloths_list(mix: str) -> None:
    """Their files have no MTP layer."""
    num_bytes = disk_bytes(main_part(V3), mix)
    size = round(num_bytes / 1e9) if mix == "Q8_0" else math.ceil(num_bytes / GIB)
    assert size == pytest.approx(UNSLOTH[mix], rel=UNSLOTH_TOLERANCE)


def test_disk_sizes_of_safetensors() -> None:
    count = count_parameters(V3)
    biases = 256 * (58 + 1)
    stored = count.total + count.mtp_repeated
    assert disk_bytes(V3, "float32") == 4 * stored
    assert disk_bytes(V3, "bf16") == 2 * stored + 2 * biases
    # V3's index: 684,531,386,000 elements, scales included; the files of the release have 688.6 GB.
    num_scales = 684_531_386_000 - stored
    extra = disk_bytes(V3, "fp8") - stored - 4 * num_scales  # of BF16 and float32 over FP8
    assert 0 < extra < 0.01 * stored
    assert disk_bytes(V3, "fp8") == pytest.approx(688.6e9, rel=1e-3)


@pytest.mark.parametrize("name", ["tiny", "16b", "671b"])
@pytest.mark.parametrize("format", ["fp8", "Q8_0", "Q4_K_M"])
def test_memory_is_disk_without_mtp(name: str, format: str) -> None:
    """GGUF pads each tensor to a multiple of 32 bytes."""
    config = preset(name).with_changes(num_nextn_predict_layers=0)
    padding = disk_bytes(config, format) - memory_bytes(config, format)
    assert 0 <= padding <= (0 if format == "fp8" else 31 * 30 * config.num_hidden_layers)
    assert memory_bytes(preset(name), format) == memory_bytes(config, format)


@pytest.mark.parametrize("num_mtp", [0, 1])
def test_a_gguf_files_mix_is_found_by_its_size(num_mtp: int) -> None:
    config = preset("16b").with_changes(num_hidden_layers=9, num_nextn_predict_layers=num_mtp)
    as_safetensors = {"F32": "float32", "F16": "bf16", "BF16": "bf16"}
    for mix in MIXES:
        assert nearest_mix(config, gguf_bytes(config, mix)) == as_safetensors.get(mix, mix)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("keep_mtp", [True, False])
def test_gguf_sizes_are_those_that_convert_writes(mix: str, keep_mtp: bool, tmp_path: Path) -> None:
    """To the byte: the file from where the header ends."""
    config = preset("tiny").with_changes(
        num_hidden_layers=2, vocab_size=300, n_routed_experts=4, n_group=1, topk_group=1
    )
    config = config.with_changes(num_nextn_predict_layers=1, hidden_size=256)
    save(build(config), tmp_path / "hf", "bfloat16")
    options = Options(Target.parse(f"gguf:{mix}"), keep_mtp)
    path = convert(tmp_path / "hf", tmp_path / "a.gguf", options).destination
    with read_gguf(path) as file:
        first = min(info.offset for info in file.tensors.values())
    planned = config if keep_mtp else config.with_changes(num_nextn_predict_layers=0)
    format = check_format(f"gguf:{mix}")
    assert path.stat().st_size - first == disk_bytes(planned, format)
    (row,) = [row for row in disk_table(config) if row["format"] == mix] or [None]
    if row is not None and mix != "BF16":
        assert row["bytes" if keep_mtp else "bytes_without_mtp"] == path.stat().st_size - first


@pytest.mark.parametrize("mix", MIXES)
def test_formats_are_spelled_as_convert_does(mix: str) -> None:
    assert check_format(f"gguf:{mix}") == check_format(f"GGUF:{mix.lower()}") == mix
    planned = plan_inference(V3, find_hardware("8xH200"), weights=f"gguf:{mix}")
    assert planned.memory.weights == memory_bytes(V3, mix)
    for name in ("fp8", "bf16", "float32"):
        assert check_format(name) == name
    with pytest.raises(UsageError) as caught:
        check_format("gguf:Q9_K")
    for name in ("Q4_K_M", "fp8", "gguf:BF16"):
        assert name in str(caught.value.expected)


def test_cache_bytes_of_v3() -> None:
    """By hand for BF16 and llama.cpp's types (61 layers of 576 values; q8_0 takes 34 bytes for 32
    values, q4_0 18); our engine's own count for its formats.
    """
    assert Wish(V3, "bf16", "bf16").cache_bytes_per_token == 70_272
    assert Wish(V3, "bf16", "q8_0").cache_bytes_per_token == 37_332
    assert Wish(V3, "bf16", "q4_0").cache_bytes_per_token == 19_764
    table = cache_bytes_by_format(Wish(V3, "bf16"))
    assert (table["bf16"], table["q8_0"], table["q4_0"]) == (70_272, 37_332, 19_764)
    assert set(table) == set(KV_FORMATS) - {"auto"}
    assert not set(cache_bytes_by_format(Wish(V3, "bf16", engine="rorqual"))) & {"q8_0", "q4_0"}
    for kv in ("float32", "bf16", "fp8", "q8"):
        for name in ("tiny", "671b"):
            config = preset(name)
            ours = config.num_hidden_layers * bytes_per_token(config, kv, torch.bfloat16)  # type: ignore[arg-type]
            assert Wish(config, "bf16", kv).cache_bytes_per_token == ours, (name, kv)


def test_distinct_experts_in_expectation() -> None:
    config = preset("small")
    source = random.Random(0)
    num_rounds, num_tokens = 2000, 8
    total = 0
    for _ in range(num_rounds):
        chosen: set[int] = set()
        for _ in range(num_tokens):
            chosen |= set(source.sample(range(config.n_routed_experts), config.num_experts_per_tok))
        total += len(chosen)
    assert distinct_experts(config, num_tokens) == pytest.approx(total / num_rounds, rel=0.01)
    assert distinct_experts(config, 1) == pytest.approx(config.num_experts_per_tok, rel=EXACT)
    assert distinct_experts(V3, 10**6) == 256


def test_a_token_reads_the_activated_parameters() -> None:
    """One stream in BF16: two bytes each of the activated parameters without the embedding, and
    the float32 biases, which are not among them.
    """
    count = count_parameters(V3)
    biases = 256 * 58
    expected = 2 * (count.activated - count.embedding) + 4 * biases
    assert read_bytes(V3, "bf16", 1) == pytest.approx(expected, rel=EXACT)
    everything = memory_bytes(V3, "bf16") - 2 * count.embedding
    assert read_bytes(V3, "bf16", 10**6) == pytest.approx(everything, rel=EXACT)


def test_speed_is_the_roofline() -> None:
    device = Hardware(
        "toy", 1e12, 1e12, {"bf16": 1e15}, Source("a toy", "nobody", 2025), step_tokens=4096
    )
    one = speed_of(Wish(V3, "bf16", "bf16", 4096, 1), device)
    seconds = (read_bytes(V3, "bf16", 1) + 4096 * 70_272) / 1e12
    assert one.decode_bound == "bandwidth"
    assert one.decode_tokens_per_second == pytest.approx(1 / seconds, rel=EXACT)
    fast = replace(device, bandwidth=1e18)
    many = speed_of(Wish(V3, "bf16", "bf16", 4096, 64), fast)
    flops = forward_flops_per_token(V3, 4096, use_absorbed=True)
    assert many.decode_bound == "compute"
    assert many.decode_tokens_per_second == pytest.approx(1e15 / flops, rel=EXACT)
    assert many.decode_tokens_per_second_per_stream == pytest.approx(1e15 / flops / 64, rel=EXACT)
    prefill = 1e15 / forward_flops_per_token(V3, 4097 / 2)
    assert many.prefill_tokens_per_second == pytest.approx(prefill, rel=EXACT)


def test_fp8_uses_the_faster_products() -> None:
    h800 = HARDWARE["H800"]
    fast = replace(h800, bandwidth=1e18)
    eight = speed_of(Wish(V3, "fp8", "bf16", 4096, 256), fast)
    wide = speed_of(Wish(V3, "bf16", "bf16", 4096, 256), fast)
    ratio = eight.decode_tokens_per_second / wide.decode_tokens_per_second
    assert ratio == pytest.approx(2, rel=EXACT)


def test_v3_on_eight_devices() -> None:
    """The README's ways to run it: FP8 fits on eight H200 and not on eight H100."""
    fits = plan_inference(V3, find_hardware("8xH200"), weights="fp8", context=32768, batch=8)
    assert fits.is_fitting
    assert fits.suggestions == []
    fails = plan_inference(V3, find_hardware("8xH100"), weights="fp8", context=32768, batch=8)
    assert not fails.is_fitting
    assert fails.max_context == 0
    assert any(s.startswith("--weights Q6_K") for s in fails.suggestions)
    assert any(s.startswith("--on 16xH100") for s in fails.suggestions)


def test_every_suggestion_fits() -> None:
    cases = [
        ("8xH100", "fp8", 163840, 64),
        ("RTX4090", "bf16", 4096, 1),
        ("8xH200", "fp8", 163840, 64),
    ]
    num_suggestions = 0
    for on, weights, context, batch in cases:
        hardware = find_hardware(on)
        planned = plan_inference(V3, hardware, weights=weights, context=context, batch=batch)
        assert not planned.is_fitting
        for suggestion in planned.suggestions:
            changes = suggestion.partition("(")[0].split()
            flags = dict(zip(changes[::2], changes[1::2], strict=True))
            wish = Wish(
                V3,
                flags.get("--weights", weights),
                flags.get("--kv", "bf16"),
                int(flags.get("--context", context)),
                int(flags.get("--batch", batch)),
            )
            assert fits(wish, find_hardware(flags.get("--on", on))), suggestion
            num_suggestions += 1
    assert num_suggestions >= 6


def test_the_longest_context_is_the_longest() -> None:
    hardware = find_hardware("8xH200")
    wish = Wish(V3, "fp8", "bf16", 4096, 64)
    longest = longest_context(wish, hardware)
    assert 4096 < longest < V3.max_position_embeddings
    assert fits(replace(wish, context=longest), hardware)
    assert not fits(replace(wish, context=longest + 1), hardware)


@pytest.mark.parametrize(("context", "is_suggested"), [(255, False), (256, True), (257, True)])
def test_a_context_too_short_for_use_is_not_suggested(context: int, is_suggested: bool) -> None:
    """With memory for just so many tokens. 256 are the least that are worth a suggestion."""
    wished = Wish(V3, "fp8", "bf16", 4096, 4096)
    needed = memory_of(replace(wished, context=context), find_hardware("8xH200")).total
    hardware = replace(find_hardware("H200"), memory_bytes=needed / USABLE_SHARE + 1)
    planned = plan_inference(V3, hardware, weights="fp8", context=4096, batch=4096)
    assert planned.max_context == context
    suggested = [text for text in planned.suggestions if text.startswith("--context ")]
    assert suggested == [f"--context {context} (with everything else as it is)"] * is_suggested


def test_names_of_hardware() -> None:
    assert find_hardware("8xh200") == find_hardware("8 x H200") == HARDWARE["H200"].times(8)
    assert find_hardware("RTX 4090").label == "RTX4090"
    assert find_hardware("16xAscend910B").label == "16x910B"
    assert find_hardware("8xH200").usable_bytes == pytest.approx(USABLE_SHARE * 8 * 141e9)
    for text in ("H300", "0xH100", "2xhere", ""):
        with pytest.raises(UsageError, match="unknown hardware"):
            find_hardware(text) if text else find_hardware("x")


def test_wrong_wishes() -> None:
    hardware = HARDWARE["H800"]
    with pytest.raises(UsageError, match="unknown format 'int3'"):
        plan_inference(V3, hardware, weights="int3")
    with pytest.raises(UsageError, match="unknown format of the cache"):
        plan_inference(V3, hardware, kv="int3")
    with pytest.raises(UsageError, match="longer than the model's positions"):
        plan_inference(V3, hardware, context=200_000)
    assert "fp8" in KV_FORMATS
