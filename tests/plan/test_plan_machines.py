"""The machines of the plan. Oracles: the vendors' sheets product by product, channels and cores
multiplied here, and for our own files what they say.
"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from rorqual.errors import ConfigError, RorqualError, UsageError
from rorqual.model import preset
from rorqual.plan import HARDWARE, find_hardware, plan_inference
from rorqual.plan.hardware import Hardware
from rorqual.plan.inference import why_no_machine
from rorqual.plan.machine_file import MachineFile

V3 = preset("671b")
PAGE = (Path(__file__).parents[2] / "docs/plan.md").read_text()
# GB, TB/s, dense TFLOP/s of BF16 and FP8, GB/s to others of the machine and to other machines.
SHEETS = {
    "A100-40": (40, 1.555, 624 / 2, None, 600 / 2, 200 / 8),
    "A100-80": (80, 2.039, 624 / 2, None, 600 / 2, 200 / 8),
    "H100": (80, 3.35, 1979 / 2, 3958 / 2, 900 / 2, 400 / 8),
    "H800": (80, 3.35, 1979 / 2, 3958 / 2, 160, 50),
    "H20": (96, 4.0, 148, 296, 900 / 2, 400 / 8),
    "H200": (141, 4.8, 1979 / 2, 3958 / 2, 900 / 2, 400 / 8),
    "B200": (1440 / 8, 64 / 8, 36_000 / 8 / 2, 72_000 / 8 / 2, 1800 / 2, 400 / 8),
    "MI300X": (192, 5.3, 1307.4, 2614.9, 896 / 2, 400 / 8),
    "MI325X": (256, 6.0, 1307.4, 2614.9, 896 / 2, 400 / 8),
    "910B": (128 / 2, 3.2 / 2, 752 / 2, None, None, None),
    "L40S": (48, 0.864, 362.05, 733, 64 / 2, None),
    "RTX3090": (24, 0.936, 71, None, 64 / 2, None),
    "RTX4090": (24, 1.008, 165.2, 330.3, 64 / 2, None),
    "RTX5090": (32, 1.792, 209.5, 419, 128 / 2, None),
    "M1Ultra": (128, 0.8, 21, None, None, None),
    "M2Ultra": (192, 0.8, 27.2, None, None, None),
    "M3Ultra": (512, 0.819, 28.2, None, None, None),
    "EPYC9654": (768, 0.4608, 96 * 2.4 * 64 / 1e3, None, None, None),
    "EPYC9755": (768, 0.576, 128 * 2.7 * 128 / 1e3, None, None, None),
    "XEON8480+": (512, 0.3072, 56 * 2.0 * 1024 / 1e3, None, None, None),
    "XEON6980P": (768, 0.6144, 128 * 2.0 * 1024 / 1e3, None, None, None),
}
NO_SHEET = ("H800", "H20", "910B", "M1Ultra", "M2Ultra", "M3Ultra")
ROUNDED = 0.02  # of the Macs' products: clocks that nobody states exactly


@pytest.mark.parametrize("name", HARDWARE)
def test_the_table_is_the_vendors(name: str) -> None:
    device, sheet = HARDWARE[name], SHEETS[name]
    flops = [device.flops["bf16"], device.flops.get("fp8")]
    links = [device.link_rate, device.network_rate]
    for found, said, unit, rel in (
        (device.memory_bytes, sheet[0], 1e9, 1e-9),
        (device.bandwidth, sheet[1], 1e12, 1e-9),
        (flops[0], sheet[2], 1e12, ROUNDED if name.endswith("Ultra") else 1e-9),
        (flops[1], sheet[3], 1e12, 1e-9),
        (links[0], sheet[4], 1e9, 1e-9),
        (links[1], sheet[5], 1e9, 1e-9),
    ):
        assert found == (None if said is None else pytest.approx(said * unit, rel=rel))
    assert device.source.is_data_sheet == (name not in NO_SHEET)
    assert device.source.year is not None
    assert 2020 <= device.source.year <= 2025
    assert ("no data sheet" in str(device.source)) != device.source.is_data_sheet
    assert find_hardware(f"2x{name.lower()}").label == f"2x{name}"


def row(device: Hardware) -> str:
    """The line of docs/plan.md."""

    def said(value: float | None, unit: float) -> str:
        if value is None:
            return "none"
        number = value / unit
        return f"{number:,.4g}" if number < 1000 else f"{number:,.1f}".removesuffix(".0")

    memory, rate = said(device.memory_bytes, 1e9), said(device.bandwidth, 1e9)
    flops = ", ".join(said(device.flops.get(dtype), 1e12) for dtype in ("bf16", "fp8"))
    links = ", ".join(
        said(link, 1e9) if link else "none known"
        for link in (device.link_rate, device.network_rate)
    )
    cells = [device.name, f"{memory} GB", f"{rate} GB/s", flops, links, str(device.source)]
    return f"| {' | '.join(cells)} |"


def test_the_page_has_the_table() -> None:
    table = PAGE[PAGE.index("| device | memory |") :].split("\n\n")[0]
    found = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert found == [row(device) for device in HARDWARE.values()]


def test_a_part_of_a_name_is_answered_with_a_whole_one() -> None:
    for text, meant in (("A100", "A100-40"), ("8xB20", "B200"), ("M3", "M3Ultra")):
        with pytest.raises(UsageError, match="unknown hardware") as caught:
            find_hardware(text)
        assert meant in str(caught.value.fix), text
    with pytest.raises(UsageError) as caught:
        find_hardware("abacus")
    assert caught.value.fix is None
    assert all(name in str(caught.value.expected) for name in HARDWARE)


def test_which_machines_exist_for_v3() -> None:
    """256 experts and 128 heads; machines of 8; no network between gaming cards."""
    h100 = HARDWARE["H100"]
    for num in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        assert why_no_machine(V3, h100.times(num)) is None
    for num, reason in (
        (3, "machines have 1, 2, 4, 8 of these devices, not 3"),
        (10, "no whole number of machines of 8"),
        (24, "do not divide 256 experts"),
        (320, "do not divide 256 experts, unless some are held twice"),  # §3.4.2: as they are
        (512, "do not divide 256 experts"),
    ):
        assert reason in str(why_no_machine(V3, h100.times(num)))
    assert why_no_machine(V3, HARDWARE["RTX4090"].times(8)) is None
    assert "no network is known" in str(why_no_machine(V3, HARDWARE["RTX4090"].times(16)))
    assert why_no_machine(V3, HARDWARE["EPYC9654"].times(2)) is None
    assert "a machine has 2 of these devices" in str(
        why_no_machine(V3, HARDWARE["EPYC9654"].times(4))
    )
    twelve = V3.with_changes(num_attention_heads=12)
    assert "do not divide 12 heads" in str(why_no_machine(twelve, h100.times(8)))
    assert why_no_machine(twelve, h100.times(4)) is None
    planned = plan_inference(V3, h100.times(10))
    assert planned.remark == "10xH100 are no whole number of machines of 8"


def test_the_reports_clusters() -> None:
    """2,048 H800 (§3.1) are 256 machines; prefill on 32, decode on 320 (§3.4); by hand."""
    cluster = find_hardware("2048xH800")
    assert (cluster.num_nodes, cluster.total_memory_bytes) == (256, 2048 * 80e9)
    assert cluster.total_flops("fp8") == pytest.approx(2048 * 1979e12)
    for num, machines in ((32, 4), (320, 40)):
        planned = plan_inference(V3, HARDWARE["H800"].times(num), weights="fp8")
        assert (planned.is_fitting, planned.hardware.num_nodes) == (True, machines)
        assert (planned.remark is None) == (num == 32)


def test_the_pages_own_machine(tmp_path: Path) -> None:
    """And what it says of unsloth's 40 GB."""
    (text,) = re.findall(r"```toml.*?\n(.*?)```", PAGE, re.DOTALL)
    box = find_hardware(str(written(tmp_path, text)))
    assert box.bandwidth == 2 * 5600e6 * 8
    planned = plan_inference(V3, box, weights="Q2_K_XS", kv="q8_0")
    assert planned.offloaded is not None
    said = f"reads {planned.offloaded.disk_bytes_per_step / 1e9:.1f} GB a token from the disk"
    assert said in PAGE
    rate = planned.offloaded.decode_tokens_per_second
    assert f"that is {rate:.1f} tokens a second at most" in PAGE
    assert f"once a step, {planned.offloaded.prefill_tokens_per_second:.0f} tokens a" in PAGE


def test_the_page_has_every_key() -> None:
    keys = [field.name for field in fields(MachineFile)]  # type: ignore[arg-type]
    assert [key for key in keys if f"{key} =" not in PAGE and f"`{key}`" not in PAGE] == []


WHOLE = """
name = "box"
memory_gb = 768
is_cpu = true
memory_channels = 12
channel_mt_s = 4800
cores = 96
clock_ghz = 2.5
bf16_flop_per_cycle = 64
disk_gb_s = 12.5
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "box.toml"
    path.write_text(text)
    return path


def test_a_machine_of_ones_own(tmp_path: Path) -> None:
    """Bandwidth and products by hand: 12 x 4.8e9 x 8, and 96 x 2.5e9 x 64."""
    path = written(tmp_path, WHOLE)
    found = find_hardware(str(path))
    assert (found.label, found.memory_bytes) == ("box", 768e9)
    assert found.bandwidth == pytest.approx(460.8e9)
    assert found.flops["bf16"] == pytest.approx(15.36e12)
    assert found.flops["float32"] == pytest.approx(7.68e12)
    assert (found.disk_rate, found.is_cpu, found.step_tokens) == (12.5e9, True, 512)
    assert str(path) in str(found.source)
    assert "no data sheet" in str(found.source)
    two = find_hardware(f"2 x {path}")
    assert (two.num_devices, two.label, two.flag) == (2, "2xbox", f"2x{path}")
    more = (
        'name = "b"\nmemory_gb = 24\nbandwidth_gb_s = 1e3\nbf16_tflops = 100\nfp8_tflops = 200\n'
        "float32_tflops = 50\nnum_devices = 4\nlink_gb_s = 32\nnetwork_gb_s = 3\n"
    )
    found = find_hardware(str(written(tmp_path, more)))
    assert (found.num_devices, found.node_devices, found.is_cpu) == (4, 4, False)
    assert found.flops == {"bf16": 100e12, "fp8": 200e12, "float32": 50e12}
    assert (found.bandwidth, found.link_rate, found.network_rate) == (1e12, 32e9, 3e9)
    found = find_hardware(str(written(tmp_path, more + "devices_per_machine = 2\n")))
    assert (found.num_devices, found.node_devices, found.num_nodes) == (4, 2, 2)


def test_a_file_whose_name_begins_with_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two readings the file that is there."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path, WHOLE)
    assert find_hardware("2xbox.toml").num_devices == 2
    (tmp_path / "2xbox.toml").write_text(WHOLE.replace("box", "pair"))
    assert find_hardware("2xbox.toml").label == "pair"
    assert find_hardware("3x2xbox.toml").label == "3xpair"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("memory_gb = 768", "memory_gb = -1"), ["memory_gb", "greater than 0", "found -1"]),
        (("cores = 96", 'cores = "96"'), ["cores", "valid integer", "found '96'"]),
        (("cores = 96", "cores = 1" + "0" * 400), ["cores", "less than or equal to"]),
        (("cores = 96", "core = 96"), ["unknown key 'core'", "did you mean 'cores'"]),
        (("cores = 96", "cores = 96\nbf16_tflops = 3"), ["bf16_tflops", "cores", "expected"]),
        (("cores = 96", ""), ["clock_ghz, bf16_flop_per_cycle", "bf16_tflops or cores with"]),
        (("channel_mt_s = 4800", ""), ["bandwidth_gb_s", "memory_channels with channel_mt_s"]),
        (("memory_channels = 12\nchannel_mt_s = 4800", ""), ["bandwidth_gb_s", "neither"]),
        (('name = "box"', 'name = "[red]"'), ["name", "pattern", "[red]"]),
        (('name = "box"', ""), ["missing key 'name'"]),
        (("disk_gb_s = 12.5", "disk_gb_s = inf"), ["disk_gb_s", "finite"]),
        (("is_cpu = true", "is_cpu = 1"), ["is_cpu", "boolean", "found 1"]),
        (("[", "["), []),
    ],
)
def test_faults_of_such_a_file(tmp_path: Path, change: tuple[str, str], said: list[str]) -> None:
    if not said:
        text, said = "[[", ["not valid TOML"]
    else:
        assert change[0] in WHOLE
        text = WHOLE.replace(*change)
    with pytest.raises(ConfigError) as caught:
        find_hardware(str(written(tmp_path, text)))
    for part in [*said, "box.toml"]:
        assert part in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for text in (f"{tmp_path}/none.toml", f"2x{tmp_path}/none.toml", f"0x{tmp_path}/none.toml"):
        with pytest.raises(RorqualError, match="no such file"):
            find_hardware(text)
