"""Devices by name: the rule in words, on a machine whose GPUs are pretended."""

from __future__ import annotations

import os

import pytest
import torch

from rorqual.errors import UsageError
from rorqual.ops.device import num_processors, resolve_device, tensor_on


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("auto", "cuda:1"), ("cpu", "cpu"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0")],
)
@pytest.mark.usefixtures("two_gpus")
def test_names_with_gpus(name: str, expected: str) -> None:
    assert resolve_device(name) == torch.device(expected)
    assert resolve_device(torch.device(expected)) == torch.device(expected)


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_does_not_exist() -> None:
    with pytest.raises(
        UsageError, match=r"'cuda:2'\n  found:    2 GPUs\n  expected: cuda:0 to cuda:1"
    ):
        resolve_device("cuda:2")


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu() -> None:
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0"):
        with pytest.raises(UsageError, match=f"device '{name}' cannot be used"):
            resolve_device(name)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:", "cuda:-1", "cuda:x", "CPU", "cpu:0", "meta"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(UsageError, match=r"unknown device.*\n.*auto, cpu, cuda or cuda:N"):
        resolve_device(name)


def test_values_arrive() -> None:
    assert tensor_on(torch.device("cpu"), [[1, 2]], torch.int64).tolist() == [[1, 2]]


def test_processors_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert num_processors() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert num_processors() == 64
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert num_processors() == 1
