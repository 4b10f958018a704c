"""K and V of new tokens to their slots in the paged cache, for models whose own code has computed them.

The fused decoder does this within `rotate_and_store`. A program copies a piece of one token's K and of its V.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from preble.kernels.fp8 import encoded, to_e4m3
from preble.kernels.launch import launch
from preble.kernels.tiles import power_of_two

_WARPS = 2
_LARGEST_PIECE = _WARPS * 32 * 8
"""Numbers of K, and of V, in a program: 8 each thread, which in 16 bits are its widest load."""


@triton.jit
def _moved(heads, cache, scales, places, inside, stored, HEAD_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """A piece of a token's heads to the cache; as e4m3 where there are scales."""
    numbers = tl.load(heads + places, mask=inside, other=0.0)
    if scales is not None:
        scale = tl.load(scales + places // HEAD_DIM, mask=inside, other=1.0)
        tl.store(cache + places, to_e4m3(tl.div_rn(numbers.to(tl.float32), scale)), mask=stored)
    else:
        tl.store(cache + places, numbers.to(cache.dtype.element_ty), mask=stored)


@triton.jit
def _store_kv_kernel(  # type: ignore[no-untyped-def]
    k,
    v,
    keys,
    values,
    slots,
    key_scales,
    value_scales,
    k_stride,
    v_stride,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PIECE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    places = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    inside = places < WIDTH
    stored = inside & (slot >= 0)  # loads do not wait for it
    _moved(k + token * k_stride, keys + slot * WIDTH, key_scales, places, inside, stored, HEAD_DIM)
    _moved(v + token * v_stride, values + slot * WIDTH, value_scales, places, inside, stored, HEAD_DIM)


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    slots: torch.Tensor,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """Write `k` and `v` of N tokens to the cache.

    k, v: [N, kv_heads, head_dim], fp32, fp16 or bf16: contiguous but for the stride of their rows.
    keys, values: [slots, kv_heads, head_dim] contiguous; floating point, or uint8 for e4m3, which then takes
        `key_scales` and `value_scales`, fp32 [kv_heads]: value / scale is stored, at most ±448.
    slots: int32 [N]: where K and V of each token go; -1 stores nothing.
    """
    tokens, kv_heads, head_dim = k.shape
    width = kv_heads * head_dim
    piece = min(power_of_two(width), _LARGEST_PIECE)
    launch(
        _store_kv_kernel,
        (tokens, triton.cdiv(width, piece)),
        warps=_WARPS,
        stages=1,
        k=k,
        v=v,
        keys=keys,
        values=values,
        slots=slots,
        key_scales=key_scales,
        value_scales=value_scales,
        k_stride=k.stride(0),
        v_stride=v.stride(0),
        WIDTH=width,
        HEAD_DIM=head_dim,
        PIECE=piece,
    )


def store_kv_reference(
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    slots: torch.Tensor,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """`store_kv` in PyTorch."""
    stored = slots >= 0
    places = slots[stored].long()
    for new, cache, scales in ((k, keys, key_scales), (v, values, value_scales)):
        numbers = new[stored]
        written = numbers if scales is None else encoded(numbers.float() / scales[:, None])
        cache[places] = written.to(cache.dtype)
