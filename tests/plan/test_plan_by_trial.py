"""The plan's searches and parts. Oracles: trying every value in turn, figures of V3 worked out by
hand, and files and clocks written here in place of the machine's.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from rorqual.errors import UsageError
from rorqual.model import preset
from rorqual.model.flops import forward_flops_per_token
from rorqual.ops.ceilings import Measured
from rorqual.plan import HARDWARE, find, find_hardware, plan_inference
from rorqual.plan.hardware import USABLE_SHARE, Hardware, Source
from rorqual.plan.memory import activation_width, fits, memory_of
from rorqual.plan.sizes import WEIGHT_FORMATS, memory_bytes
from rorqual.plan.speed import read_bytes, speed_of
from rorqual.plan.wish import Wish

# V3 with fewer layers: what a token takes in one is the same, and less is counted up.
V3 = preset("671b").with_changes(num_hidden_layers=4, num_nextn_predict_layers=0)
TINY = preset("tiny").with_changes(max_position_embeddings=1024)
EXACT = 1e-12
TOY = Hardware("toy", 1e12, 1e12, {"bf16": 1e15}, Source("a toy", "nobody", 2025))


def holding(wish: Wish, name: str = "toy") -> Hardware:
    """A device that has room for this and for not a byte more."""
    needed = memory_of(wish, TOY).total
    return replace(TOY, name=name, memory_bytes=(needed + 0.5) / USABLE_SHARE)


def suggested(wish: Wish, device: Hardware) -> dict[str, str]:
    """The changes, each by its first flag."""
    planned = plan_inference(
        wish.config, device, weights=wish.weights, kv=wish.kv, context=wish.context,
        batch=wish.batch,
    )  # fmt: skip
    return {text.split()[0]: text.partition(" (")[0] for text in planned.suggestions}


@pytest.mark.parametrize("batch", [1, 2, 5, 15])
def test_the_largest_batch_is_found(batch: int) -> None:
    wish = Wish(TINY, "bf16", "bf16", 1024, 16)
    device = holding(replace(wish, batch=batch))
    fitting = [b for b in range(1, 17) if fits(replace(wish, batch=b), device)]
    assert max(fitting) == batch
    assert suggested(wish, device)["--batch"] == f"--batch {batch}"


@pytest.mark.parametrize("context", [256, 700, 1023])
def test_the_longest_context_is_found(context: int) -> None:
    wish = Wish(TINY, "bf16", "bf16", 1024, 1)
    device = holding(replace(wish, context=context))
    fitting = [c for c in range(1, 1025) if fits(replace(wish, context=c), device)]
    assert max(fitting) == context
    found = suggested(wish, device)
    assert found["--context"] == f"--context {context}"
    assert "--batch" not in found, "there is one stream already"


def test_a_plan_for_all_positions_and_for_none() -> None:
    wish = Wish(TINY, "bf16", "bf16", 1024, 1)
    whole = plan_inference(TINY, holding(wish), context=1024)
    assert (whole.is_fitting, whole.max_context) == (True, 1024)
    nothing = plan_inference(TINY, replace(TOY, memory_bytes=1.0), context=1024)
    assert (nothing.is_fitting, nothing.max_context) == (False, 0)


@pytest.mark.parametrize(
    ("now", "room_for", "change"),
    [
        ("float32", "bf16", "--kv bf16"),  # the least change that is enough
        ("float32", "fp8", "--kv fp8"),
        ("bf16", "fp8", "--kv fp8"),
        ("fp8", None, None),
    ],
)
def test_a_smaller_cache_is_suggested(now: str, room_for: str | None, change: str | None) -> None:
    wish = Wish(TINY, "bf16", now, 1024, 64)
    device = holding(replace(wish, kv=room_for) if room_for else replace(wish, batch=63))
    assert suggested(wish, device).get("--kv") == change


@pytest.mark.parametrize("place", [0, 1, -1])
def test_the_largest_weights_that_fit_are_suggested(place: int) -> None:
    sizes = {name: memory_bytes(TINY, name) for name in WEIGHT_FORMATS}
    smaller = sorted((n for n in sizes if sizes[n] < sizes["bf16"]), key=lambda n: -sizes[n])
    wish = Wish(TINY, "bf16", "bf16", 1024, 1)
    device = holding(replace(wish, weights=smaller[place]))
    assert suggested(wish, device)["--weights"] == f"--weights {smaller[place]}"


@pytest.mark.parametrize(
    ("context", "room", "batch"), [(1024, 300, 1), (1024, 256, 1), (1024, 255, 1), (200, 200, 3)]
)
def test_where_no_single_change_is_enough_all_are_made(context: int, room: int, batch: int) -> None:
    """The largest weights that leave one stream its context or 256 tokens; then what fits."""
    sizes = {name: memory_bytes(TINY, name) for name in WEIGHT_FORMATS}
    falling = sorted((n for n in sizes if sizes[n] <= sizes["bf16"]), key=lambda n: -sizes[n])
    wish = Wish(TINY, "bf16", "bf16", context, 16)
    device = holding(Wish(TINY, falling[-1], "fp8", room, batch))
    wanted = None
    for weights in falling:
        one = Wish(TINY, weights, "fp8", 1, 1)
        fitting = [c for c in range(1, context + 1) if fits(replace(one, context=c), device)]
        if max(fitting, default=0) >= min(context, 256):
            one = replace(one, context=max(fitting))
            streams = max(b for b in range(1, 17) if fits(replace(one, batch=b), device))
            wanted = f"--weights {weights} --kv fp8 --context {one.context} --batch {streams}"
            break
    assert (wanted is None) == (room == 255)
    assert suggested(wish, device).get("--weights") == wanted


@pytest.mark.parametrize("num_devices", [1, 3])
def test_the_least_number_of_devices(num_devices: int) -> None:
    """That a machine has, and that divides eight experts and four heads: 2, 4, or two machines."""
    wish = Wish(TINY, "bf16", "bf16", 1024, 64)
    share = memory_of(wish, TOY).total / USABLE_SHARE
    node = replace(TOY, node_devices=4, network_rate=1e9)
    device = replace(node, memory_bytes=share / 4.5, num_devices=num_devices)
    assert suggested(wish, device)["--on"] == "--on 8xtoy"
    assert "--on" not in suggested(wish, replace(device, network_rate=None))
    four = replace(device, memory_bytes=share / 3.5)
    assert suggested(wish, four)["--on"] == "--on 4xtoy"
    assert "--on" not in suggested(wish, replace(four, node_devices=1, network_rate=None))
    assert "--on" not in suggested(wish, replace(device, memory_bytes=share / 8.5))


def test_several_devices_are_their_sum() -> None:
    eight = HARDWARE["H200"].times(8)
    assert eight.total_memory_bytes == pytest.approx(8 * 141e9)
    assert eight.total_bandwidth == pytest.approx(8 * 4.8e12)
    assert eight.total_flops("fp8") == pytest.approx(8 * 1979e12)
    assert eight.total_flops("float32") == pytest.approx(8 * 989.5e12)  # no faster way
    assert HARDWARE["910B"].total_flops("fp8") == pytest.approx(376e12)


def test_activations_and_workspace_of_v3_by_hand() -> None:
    """A token: twice the residual stream (7168), and the experts' rows: 8 of three times 2048 in
    and out of 7168, and the shared one.
    """
    width = 2 * 7168 + 8 * (3 * 2048 + 2 * 7168) + 3 * 2048
    assert activation_width(V3) == width
    few = V3.with_changes(num_experts_per_tok=1, n_group=1, topk_group=1)
    assert activation_width(few) == 2 * 7168 + 3 * 18432, "the dense layers are the widest"
    attention = 128 * 192 + 1536 + 576 + 128 * 128
    sparse = few.with_changes(first_k_dense_replace=0)
    assert activation_width(sparse) == 2 * 7168 + attention
    assert activation_width(sparse.with_changes(q_lora_rank=None)) == (2 * 7168 + attention - 1536)
    for weights, itemsize in (("bf16", 2), ("fp8", 2), ("float32", 4)):
        for step_tokens, step in ((4096, 3000), (512, 512)):
            wish, device = Wish(V3, weights, "bf16", 1000, 3), replace(TOY, step_tokens=step_tokens)
            found = memory_of(wish, device)
            expanded = 1000 * 128 * (128 + 128 + 192) * itemsize
            assert found.workspace == expanded + 3 * 129280 * 4
            here = memory_of(wish, replace(device, is_cpu=True))
            scores = 128 * 128 * 1000 * (itemsize + 4)
            assert here.workspace == found.workspace + scores
            assert found.activations == step * width * itemsize
            assert found.cache == 3 * 1000 * 4 * 1152
            parts = found.as_dict()
            assert parts.pop("total") == sum(parts.values()) == found.total


@pytest.mark.parametrize("context", [100, 8192])
def test_prefill_reads_the_weights_once_a_step(context: int) -> None:
    slow = replace(TOY, bandwidth=1e9)
    found = speed_of(Wish(V3, "bf16", "bf16", context, 1), slow)
    step = min(context, 4096)
    assert found.prefill_bound == "bandwidth"
    rate = step / (read_bytes(V3, "bf16", step) / 1e9)
    assert found.prefill_tokens_per_second == pytest.approx(rate, rel=EXACT)
    fast = speed_of(Wish(V3, "bf16", "bf16", context, 1), replace(TOY, bandwidth=1e20))
    assert fast.prefill_bound == "compute"
    rate = 1e15 / forward_flops_per_token(V3, (context + 1) / 2)
    assert fast.prefill_tokens_per_second == pytest.approx(rate, rel=EXACT)


def test_every_stream_reads_its_own_cache() -> None:
    found = speed_of(Wish(V3, "Q4_K_M", "fp8", 1000, 7), TOY)
    bytes_a_step = read_bytes(V3, "Q4_K_M", 7) + 7 * 1000 * 4 * (512 + 4 + 2 * 64)
    assert found.decode_bytes_per_step == pytest.approx(bytes_a_step, rel=EXACT)
    assert found.decode_tokens_per_second == pytest.approx(7e12 / bytes_a_step, rel=EXACT)
    assert found.decode_tokens_per_second_per_stream == pytest.approx(1e12 / bytes_a_step)


def test_what_is_left_out_of_a_wish() -> None:
    planned = plan_inference(TINY, TOY)
    assert (planned.wish.context, planned.wish.batch) == (1024, 1)
    assert (planned.wish.weights, planned.wish.cache_format) == ("bf16", "bf16")
    assert plan_inference(V3, replace(TOY, memory_bytes=1e15)).wish.context == 4096
    assert plan_inference(TINY, TOY, context=1024, batch=1).wish.context == 1024
    for wrong in ({"context": 1025}, {"context": 0}, {"batch": 0}):
        with pytest.raises(UsageError):
            plan_inference(TINY, TOY, **wrong)  # type: ignore[arg-type]


def test_this_machine_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fake(*, remeasure: bool) -> Measured:
        asked.append(remeasure)
        return Measured("a CPU", "2025-01-31", 8e9, 2e10, {"bf16": 1e11, "float32": 3e11})

    monkeypatch.setattr(find, "this_machine", fake)
    found = find_hardware(" Here ")
    assert (found.label, found.memory_bytes, found.bandwidth) == ("here", 8e9, 2e10)
    assert (found.total_flops("float32"), found.step_tokens) == (3e11, 512)
    assert (found.source.year, found.source.is_data_sheet) == (None, False)
    assert find_hardware("1xhere", remeasure=True).flops == found.flops
    assert asked == [False, True]
    with pytest.raises(UsageError, match="--remeasure"):
        find_hardware("H100", remeasure=True)
