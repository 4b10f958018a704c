"""e4m3 by its bits, against PyTorch's own type."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from device import DEVICE

from preble.kernels.architecture import architecture_of
from preble.kernels.fp8 import decoded, encoded, from_e4m3, to_e4m3
from preble.kernels.launch import launch


@triton.jit
def decode_kernel(codes, values, CONVERTS_FP8: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.arange(0, 256)
    tl.store(values + places, from_e4m3(tl.load(codes + places), values.dtype.element_ty, CONVERTS_FP8))


@triton.jit
def encode_kernel(values, codes):  # type: ignore[no-untyped-def]
    places = tl.arange(0, 2048)
    tl.store(codes + places, to_e4m3(tl.load(values + places)))


def test_fp8_codes_are_those_of_torch() -> None:
    codes = torch.arange(256, dtype=torch.int32, device=DEVICE).to(torch.uint8)
    wanted = decoded(codes)
    for dtype in (torch.float16, torch.float32):
        for converts in {False, architecture_of(DEVICE).converts_fp8}:
            values = torch.empty(256, dtype=dtype, device=DEVICE)
            launch(decode_kernel, (1,), warps=1, stages=1, codes=codes, values=values, CONVERTS_FP8=converts)
            number = ~wanted.isnan()
            assert torch.equal(values[number].float(), wanted[number])

    between = (wanted[:126] + wanted[1:127]) / 2  # ties
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(1000, generator=generator) * torch.logspace(-4, 4, 1000)
    special = torch.tensor([0.0, -0.0, 448.0, 464.0, 1e9, -1e9, float("inf"), float("-inf"), float("nan")])
    numbers = torch.cat([wanted, between, -between, spread.to(DEVICE), special.to(DEVICE)])
    numbers = torch.nn.functional.pad(numbers, (0, 2048 - len(numbers)))
    written = torch.empty(2048, dtype=torch.uint8, device=DEVICE)
    launch(encode_kernel, (1,), warps=1, stages=1, values=numbers, codes=written)
    assert torch.equal(written & 0x7F, encoded(numbers) & 0x7F)
    signed = ~numbers.isnan()
    assert torch.equal(written[signed], encoded(numbers)[signed])
