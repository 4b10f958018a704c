"""What kernels need to know of a chip before they are launched on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch

from preble.errors import DeviceError

KIB = 1024


@dataclass(frozen=True, slots=True)
class Architecture:
    """A family of GPUs that share tile sizes."""

    name: str
    """The target of the compiler: `sm_80` or `sm_90`."""
    processors: int
    """Streaming multiprocessors."""
    shared_memory: int
    """Bytes that one program may use."""
    converts_fp8: bool
    """Whether e4m3 is converted by an instruction rather than by shifting bits."""


SM_80 = Architecture("sm_80", processors=108, shared_memory=99 * KIB, converts_fp8=False)
"""Ampere, Ada and consumer Blackwell. An A100 has 163 KiB of shared memory, smaller ones 99: the tiles fit all."""
SM_90 = Architecture("sm_90", processors=132, shared_memory=227 * KIB, converts_fp8=True)
"""Hopper and data-centre Blackwell."""
OLDEST = (8, 0)
"""The lowest compute capability: bf16 and asynchronous copies."""

_assumed: ContextVar[Architecture] = ContextVar("assumed_architecture", default=SM_90)


@contextmanager
def assume(architecture: Architecture) -> Iterator[None]:
    """Within it, tensors that lie on no GPU count as lying on this one: to compile ahead, and to interpret."""
    token = _assumed.set(architecture)
    try:
        yield
    finally:
        _assumed.reset(token)


def architecture_of(device: torch.device) -> Architecture:
    """The architecture of a CUDA device, or the assumed one.

    Raises `DeviceError` for a GPU that is too old.
    """
    return _architecture_of(device.index or 0) if device.type == "cuda" else _assumed.get()


@cache
def _architecture_of(index: int) -> Architecture:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    if capability < OLDEST:
        raise DeviceError(
            f"cuda:{index}, {properties.name}, has compute capability {capability[0]}.{capability[1]}; the kernels "
            f"need {OLDEST[0]}.{OLDEST[1]} (Ampere) or newer. Use another GPU, or devices=['cpu']"
        )
    family = SM_90 if capability[0] in (9, 10) else SM_80
    return Architecture(
        family.name, properties.multi_processor_count, family.shared_memory, converts_fp8=capability >= (8, 9)
    )
