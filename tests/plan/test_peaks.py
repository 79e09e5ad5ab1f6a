"""What training calls the peak. Oracles: the names that drivers give, the table of devices."""

from __future__ import annotations

import pytest
import torch

from rorqual.ops.ceilings import Peak
from rorqual.plan import peaks
from rorqual.plan.devices import HARDWARE

NAMES = {
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA A100-SXM4-40GB": "A100-40",
    "NVIDIA A100-SXM4-80GB": "A100-80",
    "NVIDIA GeForce RTX 4090": "RTX4090",
    "NVIDIA H200": "H200",
    "AMD Instinct MI300X OAM": "MI300X",
}
OTHERS = ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA GeForce RTX 4090 D", "Tesla T4", "")


def test_boards_are_told_by_their_whole_name() -> None:
    for name, known in NAMES.items():
        assert peaks.hardware_of_gpu(name) == HARDWARE[known]
    assert [peaks.hardware_of_gpu(name) for name in OTHERS] == [None] * len(OTHERS)


def test_a_gpus_peak_is_its_data_sheets(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    peak = peaks.peak_of(gpu, "bfloat16")
    assert peak is not None
    assert peak.flops == HARDWARE["H100"].flops["bf16"]
    assert "H100 Tensor Core GPU data sheet" in peak.source
    assert peaks.peak_of(gpu, "float32") is None, "no sheet of the table has it"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert peaks.peak_of(gpu, "bfloat16") is None
    assert peaks.peak_of(torch.device("meta"), "bfloat16") is None


def test_a_cpus_peak_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "product_peak", lambda operands: Peak(1e11, operands))
    sources = [peaks.peak_of(torch.device("cpu"), name) for name in ("float32", "bfloat16")]
    assert [peak and peak.source for peak in sources] == ["float32", "bf16"]
