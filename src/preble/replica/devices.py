"""Which device each replica runs on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from preble.errors import DeviceError


def place_replicas(replicas: int | None, devices: Sequence[str] | None) -> list[torch.device]:
    """The device of each replica: `devices` in turn; by default every GPU, or the CPU where there is none.

    Raises `DeviceError` for a device that is not there.
    """
    if devices is None:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        devices = [f"cuda:{index}" for index in range(count)] or ["cpu"]
    parsed = [_device(name) for name in devices]
    return [parsed[number % len(parsed)] for number in range(replicas or len(parsed))]


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise DeviceError(f"{name!r} is not a device name; use 'cpu' or 'cuda:0'") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise DeviceError(f"device {name!r}: replicas run on 'cpu' and on CUDA devices such as 'cuda:0'")
    if torch.version.cuda is None:
        raise DeviceError(
            f"device {name!r}: this PyTorch ({torch.__version__}) is built without CUDA; install a CUDA build of it "
            "(https://pytorch.org/get-started), or use devices=['cpu']"
        )
    if not torch.cuda.is_available():
        raise DeviceError(
            f"device {name!r}: PyTorch {torch.__version__} for CUDA {torch.version.cuda} finds no usable GPU. Does "
            "`nvidia-smi` work, is its driver new enough for that CUDA version, and is CUDA_VISIBLE_DEVICES right?"
        )
    if (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"device {name!r} does not exist: {torch.cuda.device_count()} CUDA devices are visible here. Leave devices "
            "out to use all of them, or set CUDA_VISIBLE_DEVICES"
        )
    return torch.device("cuda", device.index or 0)
