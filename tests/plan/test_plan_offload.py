"""What does not fit, what devices send, and the whole table of plans. Oracles: closed forms written
out here for V3, the exchange that DeepSeek's paper on hardware works out, and the plan's own rules
held against each other.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from rorqual.model import preset
from rorqual.plan import HARDWARE, WEIGHT_FORMATS, plan_inference
from rorqual.plan.find import find_hardware
from rorqual.plan.hardware import USABLE_SHARE, Hardware, Source
from rorqual.plan.inference import InferencePlan, why_no_machine
from rorqual.plan.memory import fits, memory_of
from rorqual.plan.offload import disk_reads
from rorqual.plan.sizes import expert_bytes, memory_bytes
from rorqual.plan.speed import speed_of
from rorqual.plan.transfers import WORD, places_visited, sent
from rorqual.plan.wish import Wish

V3 = preset("671b")
BOX = Hardware(
    "box", 40e9 / USABLE_SHARE, 80e9, {"bf16": 2e12}, Source("a toy", "nobody", 2025), is_cpu=True
)
SHORT = V3.with_changes(num_hidden_layers=7)  # four of them sparse
ONE_EXPERT = 3 * 7168 * 2048  # parameters


def test_unsloths_forty_gigabytes() -> None:
    """'Q2_K_XS should run ok in ~40GB': it runs. V3 has 58 layers of 256 experts, of which a token
    uses 8; all else is used by each token, but for the embedding.
    """
    planned = plan_inference(V3, BOX, weights="Q2_K_XS", kv="q8_0")
    assert not planned.is_fitting
    assert planned.speed is None
    assert planned.offloaded is not None
    memory = planned.memory
    room = 40e9 - memory.cache - memory.activations - memory.workspace
    one = expert_bytes(V3, "Q2_K_XS")
    assert one == pytest.approx(ONE_EXPERT * 2.625 / 8, rel=1e-3)  # Q2_K: 84 bytes for 256
    embedding = 129_280 * 7168 * 144 / 256  # Q4_K
    always = memory.weights - 58 * 256 * one - embedding
    missing = 58 * 256 * one - (room - always)
    assert planned.offloaded.disk_bytes_per_step == pytest.approx(missing * 8 / 256)
    assert 5e9 < planned.offloaded.disk_bytes_per_step < 6e9
    assert planned.offloaded.decode_bound == "disk"
    rate = planned.offloaded.decode_tokens_per_second
    assert rate == pytest.approx(7e9 / (missing * 8 / 256))
    assert 1.2 < rate < 1.3
    fast = plan_inference(V3, replace(BOX, disk_rate=14e9), weights="Q2_K_XS", kv="q8_0")
    assert fast.offloaded is not None
    assert fast.offloaded.decode_tokens_per_second == pytest.approx(2 * rate)


def test_what_is_read_from_the_disk() -> None:
    """Nothing where there is room; without any room all that a step uses."""
    one = expert_bytes(V3, "bf16")
    routed = 58 * 256 * one
    always = memory_bytes(V3, "bf16") - routed - 2 * 129_280 * 7168
    assert disk_reads(V3, "bf16", 1, always + routed) == 0
    assert disk_reads(V3, "bf16", 1, always) == pytest.approx(58 * 8 * one)
    assert disk_reads(V3, "bf16", 1, always - 1e9) == pytest.approx(58 * 8 * one + 1e9)
    assert disk_reads(V3, "bf16", 1, 0) == pytest.approx(always + 58 * 8 * one)
    assert disk_reads(V3, "bf16", 10**6, always + routed / 4) == pytest.approx(routed * 3 / 4)


def test_no_speed_where_nothing_runs() -> None:
    """Our engine holds all weights; a cache beyond the memory runs nowhere."""
    ours = plan_inference(V3, BOX, weights="Q2_K_XS", engine="rorqual", dtype="stored")
    assert (ours.speed, ours.offloaded) == (None, None)
    large = plan_inference(V3, BOX, weights="Q2_K_XS", context=163_840, batch=64)
    assert (large.speed, large.offloaded) == (None, None)
    drafted = plan_inference(V3, BOX, weights="Q2_K_XS", num_drafts=1)
    assert (drafted.speed, drafted.offloaded) == (None, None)
    report = plan_inference(SHORT, replace(BOX, memory_bytes=1e6)).as_dict()
    assert report["speed_limit"] is report["speed_limit_from_disk"] is None


def test_a_token_goes_to_each_device_once() -> None:
    """Two devices: the chance that none of 8 lies on the other is 2^-8. Eight: half are open to a
    token (4 of 8 groups). Without groups all are.
    """
    assert places_visited(V3, 1) == 0
    assert places_visited(V3, 2) == pytest.approx(2 * (1 - 0.5**8) / 2)
    assert places_visited(V3, 8) == pytest.approx(4 * (1 - 0.75**8) * 7 / 8)
    free = V3.with_changes(n_group=1, topk_group=1)
    assert places_visited(free, 8) == pytest.approx(8 * (1 - (7 / 8) ** 8) * 7 / 8)
    assert places_visited(V3, 10**6) == pytest.approx(8, rel=1e-4)


def test_the_exchange_of_the_paper_on_hardware() -> None:
    """arXiv 2505.09343 §2.3.2: 3 bytes x 32 tokens x 9 experts x 7,000 / 50 GB/s = 120.96 us a
    layer. Ours has 8 routed experts, V3's 7,168, and devices so many that each expert is elsewhere.
    """
    num = 10**6
    wide = replace(HARDWARE["H800"], num_devices=num, node_devices=1, link_rate=1e15)
    found = sent(V3, wide, 32 * num)
    assert found is not None
    assert found.seconds == pytest.approx(120.96e-6 * 8 / 9 * 7168 / 7000, rel=1e-4)


def test_one_machine_needs_no_network() -> None:
    """Eight L40S send over PCIe alone; sixteen would need a network, of which none is known."""
    found = sent(V3, HARDWARE["L40S"].times(8), 1000)
    assert found is not None
    each = 3 * 7168 * 1000 / 8 * 4 * (1 - 0.75**8) * 7 / 8
    assert (found.to_devices, found.to_machines) == (pytest.approx(each), 0)
    assert found.seconds == pytest.approx(each / 32e9)
    assert sent(V3, HARDWARE["L40S"].times(16), 1000) is None
    assert sent(V3, replace(HARDWARE["L40S"].times(8), link_rate=None), 1000) is None


def test_transfers_limit_what_they_do() -> None:
    """40 machines of 8 H800, 64 tokens a device, 4 sparse layers: to another machine a token goes
    once, and 20 of 40 are open to it.
    """
    wish, device = Wish(SHORT, "fp8", "bf16", 4096, 320 * 64), HARDWARE["H800"].times(320)
    found = speed_of(wish, device)
    machines = 20 * (1 - 0.95**8) * 39 / 40
    seconds = 64 * 4 * 3 * 7168 * machines / 50e9
    assert found.decode_bound == "transfers"
    assert found.decode_tokens_per_second_per_stream == pytest.approx(1 / seconds)
    drafted = speed_of(replace(wish, num_drafts=1), device)
    layers = (2 * 4 + 1) / 4
    assert drafted.decode_tokens_per_second_per_stream == pytest.approx(1.85 / seconds / layers)
    for near in (HARDWARE["H800"], HARDWARE["H800"].times(8)):
        assert speed_of(replace(wish, batch=1), near).decode_bound == "bandwidth"
    assert speed_of(wish, HARDWARE["910B"].times(64)).sent_bytes_per_step is None
    assert "not counted" in WORD


def changed(wish: Wish, suggestion: str) -> tuple[Wish, str | None]:
    """The wish as a suggestion has it, and the hardware that it names."""
    words = suggestion.partition("(")[0].split()
    flags = dict(zip(words[::2], words[1::2], strict=True))
    on = flags.pop("--on", None)
    values: dict[str, str | int] = {
        name.strip("-"): int(value) if value.isdigit() else value for name, value in flags.items()
    }
    return replace(wish, **values), on  # type: ignore[arg-type]


def check_rules(planned: InferencePlan) -> int:
    wish, hardware = planned.wish, planned.hardware
    needed = memory_of(wish, hardware).total
    assert planned.is_fitting == (needed <= USABLE_SHARE * hardware.total_memory_bytes)
    assert planned.is_fitting == (planned.speed is not None)
    assert not (planned.speed and planned.offloaded)
    assert planned.is_fitting == (planned.max_context >= wish.context)
    assert planned.is_fitting <= (not planned.suggestions)
    for speed in (planned.speed, planned.offloaded):
        assert speed is None or 0 < speed.decode_tokens_per_second < 1e12
    # Of an embedding that alone has no room a step reads some rows: 0 here.
    assert planned.speed is None or planned.speed.disk_bytes_per_step == 0
    for suggestion in planned.suggestions:
        other, on = changed(wish, suggestion)
        machine = find_hardware(on) if on else hardware
        assert fits(other, machine), suggestion
        assert on is None or why_no_machine(wish.config, machine) is None, suggestion
    return len(planned.suggestions)


FEW_LAYERS = 7  # of the larger ones where all are counted too slowly
CASES = [(name, None) for name in ("tiny", "16b")]
CASES += [(name, FEW_LAYERS) for name in ("236b", "671b")]
SLOW = [pytest.param(name, None, marks=pytest.mark.slow) for name in ("236b", "671b")]


@pytest.mark.parametrize(("name", "num_layers"), [*CASES, *SLOW])
def test_every_machine_and_form(name: str, num_layers: int | None) -> None:
    """What fits has a speed, and nothing else; each suggestion fits by its own rule."""
    config, num = preset(name), 0
    if num_layers:
        config = config.with_changes(num_hidden_layers=num_layers)
    for weights in WEIGHT_FORMATS:
        for device in HARDWARE.values():
            for num_devices in {1, 2, device.node_devices}:
                hardware = device.times(num_devices)
                num += check_rules(plan_inference(config, hardware, weights=weights, batch=4))
            if device.is_cpu:
                for dtype in ("float32", "bfloat16", "stored", "native", "int8"):
                    num += check_rules(
                        plan_inference(
                            config, device, weights=weights, engine="rorqual", dtype=dtype
                        )
                    )
    assert (num > 20) == (name != "tiny"), num
