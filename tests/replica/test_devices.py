"""Which device a replica gets, and what a user is told who asks for one that cannot be had."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from preble.errors import DeviceError
from preble.kernels import architecture
from preble.kernels.architecture import SM_80, SM_90, architecture_of
from preble.replica.devices import place_replicas

CPU = torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, as far as PyTorch's answers go."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def cuda(index: int) -> torch.device:
    return torch.device("cuda", index)


@pytest.mark.usefixtures("gpus")
def test_every_gpu_is_used_by_default() -> None:
    assert place_replicas(None, None) == [cuda(0), cuda(1)]
    assert place_replicas(3, None) == [cuda(0), cuda(1), cuda(0)]
    assert place_replicas(4, ["cuda:1"]) == [cuda(1)] * 4
    assert place_replicas(None, ["cuda", "cpu"]) == [cuda(0), CPU]


@pytest.mark.usefixtures("no_gpus")
def test_the_cpu_is_used_where_there_is_no_gpu() -> None:
    assert place_replicas(None, None) == [CPU]
    assert place_replicas(2, None) == [CPU, CPU]


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda:2", "'cuda:2' does not exist: 2 CUDA devices are visible"),
        ("gpu", "'gpu' is not a device name; use 'cpu' or 'cuda:0'"),
        ("meta", "run on 'cpu' and on CUDA devices"),
    ],
)
def test_devices_that_are_not_there_are_refused(name: str, message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        place_replicas(1, [name])


@pytest.mark.usefixtures("no_gpus")
def test_a_torch_that_cannot_use_the_gpu_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(DeviceError, match="built without CUDA; install a CUDA build"):
        place_replicas(1, ["cuda:0"])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(DeviceError, match=r"for CUDA 13\.0 finds no usable GPU.*nvidia-smi.*driver new enough"):
        place_replicas(1, ["cuda:0"])


@pytest.mark.parametrize(
    ("capability", "family", "converts"),
    [
        ((8, 0), SM_80, False),
        ((8, 9), SM_80, True),
        ((9, 0), SM_90, True),
        ((10, 0), SM_90, True),
        ((12, 0), SM_80, True),
    ],
)
def test_chips_get_the_tiles_that_fit_them(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], family: architecture.Architecture, converts: bool
) -> None:
    found = SimpleNamespace(major=capability[0], minor=capability[1], name="a GPU", multi_processor_count=77)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    architecture._architecture_of.cache_clear()
    mine = architecture_of(cuda(0))
    architecture._architecture_of.cache_clear()
    assert (mine.name, mine.processors, mine.converts_fp8) == (family.name, 77, converts)
    assert mine.shared_memory == family.shared_memory


def test_a_chip_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(major=7, minor=5, name="Tesla T4", multi_processor_count=40)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: old)
    architecture._architecture_of.cache_clear()
    with pytest.raises(DeviceError, match=r"Tesla T4, has compute capability 7\.5.*need 8\.0.*devices=\['cpu'\]"):
        architecture_of(cuda(0))
    architecture._architecture_of.cache_clear()
