"""Between the QKV product and attention: QK norm, rotary embedding, and K and V into the paged cache, in one pass.

Apart, these are five kernels that each read and write the heads again. A program takes one token and some of its query
heads, which it rotates where they lie, or some of its KV heads, whose rotated K and whose V it moves to their slot.
Rotary embedding: Su et al., "RoFormer", 2021, with dimension i paired with i + head_dim / 2. QK norm: Henry et al.,
"Query-Key Normalization for Transformers", 2020, as RMSNorm.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from preble.kernels.fp8 import encoded, to_e4m3
from preble.kernels.launch import launch
from preble.kernels.tiles import power_of_two

_WARPS = 2
_ELEMENTS = _WARPS * 32 * 8
"""Of either half of the heads in a program: 8 each thread, which in 16 bits are its widest load."""


@triton.jit
def _turned(heads, inside, dims, cos, sin, weight, eps, HEAD_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both halves of heads, normed where there is a weight, then rotated; fp32.

    `heads` points to the first halves, whose dimensions are `dims`; both are tiles, which `inside` masks.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    first = tl.load(heads, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(heads + HALF, mask=inside, other=0.0).to(tl.float32)
    if weight is not None:
        first_weight = tl.load(weight + dims, mask=inside, other=0.0).to(tl.float32)
        second_weight = tl.load(weight + HALF + dims, mask=inside, other=0.0).to(tl.float32)
        mean_square = tl.sum(first * first + second * second, axis=1) / HEAD_DIM
        factor = tl.rsqrt(mean_square + eps)[:, None]
        first *= factor * first_weight
        second *= factor * second_weight
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _store(cache, first, second, scales, heads, inside, KV_HEADS: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both fp32 halves of `heads` to pointers into the cache; as e4m3 where there are scales."""
    if scales is not None:
        scale = tl.load(scales + heads, mask=heads < KV_HEADS, other=1.0)[:, None]
        scale = tl.broadcast_to(scale, first.shape)
        tl.store(cache, to_e4m3(tl.div_rn(first, scale)), mask=inside)
        tl.store(cache + HALF, to_e4m3(tl.div_rn(second, scale)), mask=inside)
    else:
        tl.store(cache, first.to(cache.dtype.element_ty), mask=inside)
        tl.store(cache + HALF, second.to(cache.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_and_store_kernel(  # type: ignore[no-untyped-def]
    qkv,
    keys,
    values,
    cos,
    sin,
    slots,
    q_norm,
    k_norm,
    key_scales,
    value_scales,
    eps,
    qkv_stride: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF_TILE: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    QUERY_BLOCKS: tl.constexpr = (QUERY_HEADS + HEADS - 1) // HEADS
    token = tl.program_id(0)
    block = tl.program_id(1)
    # Every head loads the cosines anew, from the L1 cache: wide loads, and no exchange through shared memory.
    dims = tl.broadcast_to(tl.arange(0, HALF_TILE)[None, :], (HEADS, HALF_TILE))
    turn = token.to(tl.int64) * HALF + dims
    cosine = tl.load(cos + turn, mask=dims < HALF, other=0.0)
    sine = tl.load(sin + turn, mask=dims < HALF, other=0.0)
    row = qkv + token.to(tl.int64) * qkv_stride

    if block < QUERY_BLOCKS:
        heads = block * HEADS + tl.arange(0, HEADS)
        inside = (heads < QUERY_HEADS)[:, None] & (dims < HALF)
        q = row + heads[:, None] * HEAD_DIM + dims
        first, second = _turned(q, inside, dims, cosine, sine, q_norm, eps, HEAD_DIM)
        tl.store(q, first.to(q.dtype.element_ty), mask=inside)
        tl.store(q + HALF, second.to(q.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        heads = (block - QUERY_BLOCKS) * HEADS + tl.arange(0, HEADS)
        inside = (heads < KV_HEADS)[:, None] & (dims < HALF)
        stored = inside & (slot >= 0)  # loads do not wait for it
        inner = heads[:, None] * HEAD_DIM + dims
        k = row + QUERY_HEADS * HEAD_DIM + inner
        v = k + KV_HEADS * HEAD_DIM
        place = slot * (KV_HEADS * HEAD_DIM) + inner
        first_v = tl.load(v, mask=inside, other=0.0).to(tl.float32)
        second_v = tl.load(v + HALF, mask=inside, other=0.0).to(tl.float32)
        first_k, second_k = _turned(k, inside, dims, cosine, sine, k_norm, eps, HEAD_DIM)
        _store(keys + place, first_k, second_k, key_scales, heads, stored, KV_HEADS, HALF)
        _store(values + place, first_v, second_v, value_scales, heads, stored, KV_HEADS, HALF)


def rotate_and_store(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """Norm and rotate Q in place, and write normed and rotated K, and V, to the cache. Computed in fp32.

    qkv: [N, (query_heads + 2 * kv_heads) * head_dim], last dimension contiguous: the heads of Q, of K, of V. Of it
        only Q changes.
    keys, values: [slots, kv_heads, head_dim] contiguous; floating point, or uint8 for e4m3, which then takes
        `key_scales` and `value_scales`, fp32 [kv_heads]: value / scale is stored, at most ±448.
    cos, sin: fp32 [N, head_dim / 2] contiguous.
    slots: int32 [N]: where K and V of each token go; -1 stores nothing.
    q_norm, k_norm: the weights [head_dim] of an RMSNorm with `eps` over every head of Q and of K; None for no norm.
    """
    half_tile = power_of_two(head_dim // 2)
    heads = _ELEMENTS // half_tile
    launch(
        _rotate_and_store_kernel,
        (len(qkv), triton.cdiv(query_heads, heads) + triton.cdiv(kv_heads, heads)),
        warps=_WARPS,
        stages=1,
        qkv=qkv,
        keys=keys,
        values=values,
        cos=cos,
        sin=sin,
        slots=slots,
        q_norm=q_norm,
        k_norm=k_norm,
        key_scales=key_scales,
        value_scales=value_scales,
        eps=eps,
        qkv_stride=qkv.stride(0),
        QUERY_HEADS=query_heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        HEADS=heads,
        HALF_TILE=half_tile,
    )


def rotate_and_store_reference(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """`rotate_and_store` in PyTorch; fp64 tensors are computed in fp64."""
    precise = torch.promote_types(qkv.dtype, torch.float32)
    heads = qkv.view(len(qkv), query_heads + 2 * kv_heads, head_dim)
    q, k, v = heads.to(precise).split_with_sizes([query_heads, kv_heads, kv_heads], 1)

    def turned(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        if weight is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(precise)
        first, second = x.chunk(2, -1)
        cosine, sine = cos.to(precise)[:, None], sin.to(precise)[:, None]
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)

    def store(cache: torch.Tensor, x: torch.Tensor, scales: torch.Tensor | None) -> None:
        stored = slots >= 0
        written = x[stored] if scales is None else encoded(x[stored] / scales[:, None])
        cache[slots[stored].long()] = written.to(cache.dtype)

    heads[:, :query_heads] = turned(q, q_norm).to(qkv.dtype)
    store(keys, turned(k, k_norm), key_scales)
    store(values, v, value_scales)
