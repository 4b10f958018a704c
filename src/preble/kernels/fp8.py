"""K and V in 8 bits: e4m3 (sign, 4 bits of exponent with bias 7, 3 of mantissa), held as `torch.uint8`.

A KV head has one scale for its K and one for its V: the real value is e4m3 value x scale. Torch's own fp8 type is used
by the reference only: Triton has none on GPUs older than Ada, and the bits are the same everywhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LARGEST = 448.0
"""The largest finite value."""


@triton.jit
def from_e4m3(bits, dtype: tl.constexpr, CONVERTS_FP8: tl.constexpr):  # type: ignore[no-untyped-def]
    """The values of uint8 `bits`, exactly, as fp16, bf16 or fp32, which all hold every e4m3 value.

    `CONVERTS_FP8` is `Architecture.converts_fp8`. Where it is false the code of NaN reads as 480.
    """
    if CONVERTS_FP8:
        values = bits.to(tl.float8e4nv, bitcast=True)
    else:
        # In the place of fp16's exponent, whose bias is 15: too small by 2 ** 8, subnormal numbers included.
        wide = bits.to(tl.uint16)
        values = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
    return values.to(dtype)


@triton.jit
def to_e4m3(values):  # type: ignore[no-untyped-def]
    """The uint8 bits of the e4m3 values nearest to `values` (ties to even), at most ±448; NaN stays NaN.

    Integer arithmetic, the same on every GPU: what is written is little, and not worth a second way.
    """
    bits = values.to(tl.float32).to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    clamped = tl.where(magnitude < 0x43E00000, magnitude, 0x43E00000).to(tl.uint32)  # the bits of 448.0
    # fp32's bias is 127: 120 more than that of e4m3. The 20 lower bits of the mantissa are rounded away.
    normal = ((clamped + 0x7FFFF + ((clamped >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2 ** -6 values are multiples of 2 ** -9, which is the last bit of 2 ** 14 in fp32: the addition rounds.
    shifted = clamped.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.uint32, bitcast=True) - 0x46800000  # the bits of 16384.0
    code = tl.where(clamped < 0x3C800000, subnormal, normal)  # the bits of 2 ** -6
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (sign | code).to(tl.uint8)


def decoded(codes: torch.Tensor) -> torch.Tensor:
    """The fp32 values of e4m3 codes (uint8, any shape)."""
    return codes.view(torch.float8_e4m3fn).float()


def encoded(values: torch.Tensor) -> torch.Tensor:
    """The e4m3 codes (uint8) nearest to `values`, any shape, at most ±448."""
    return values.float().clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
