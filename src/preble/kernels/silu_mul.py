"""The activation of a gated MLP, SiLU(gate) * up, over the product of the merged gate and up matrices.

Shazeer, "GLU Variants Improve Transformer", 2020.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from preble.kernels.launch import launch

_WARPS = 4
_TILE = _WARPS * 32 * 8
"""Columns of a program: 8 each thread, which in 16 bits are its widest load."""
_LOG2_E = math.log2(math.e)


@triton.jit
def _silu_mul_kernel(  # type: ignore[no-untyped-def]
    gate_up,
    out,
    gate_up_stride: tl.constexpr,
    out_stride: tl.constexpr,
    INNER: tl.constexpr,
    TILE: tl.constexpr,
    LOG2_E: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = columns < INNER
    there = gate_up + row * gate_up_stride + columns
    gate = tl.load(there, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(there + INNER, mask=inside, other=0.0).to(tl.float32)
    product = gate / (1.0 + tl.exp2(gate * -LOG2_E)) * up
    tl.store(out + row * out_stride + columns, product.to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """`out = gate / (1 + exp(-gate)) * up`. Computed in fp32.

    gate_up: [N, 2 * inner]: the gate, then what it multiplies.
    out: [N, inner]. The last dimension of both is contiguous.
    """
    rows, inner = out.shape
    launch(
        _silu_mul_kernel,
        (rows, triton.cdiv(inner, _TILE)),
        warps=_WARPS,
        stages=1,
        gate_up=gate_up,
        out=out,
        gate_up_stride=gate_up.stride(0),
        out_stride=out.stride(0),
        INNER=inner,
        TILE=_TILE,
        LOG2_E=_LOG2_E,
    )


def silu_mul_reference(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """`silu_mul` in PyTorch; fp64 tensors are computed in fp64."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, -1)
    out.copy_(torch.nn.functional.silu(gate) * up)
