"""Which dtype a model runs in."""

from __future__ import annotations

import difflib

import torch

from preble.errors import InvalidRequest

_SUPPORTED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(dtype: str, *, stored: str, device: torch.device) -> torch.dtype:
    """The dtype of weights, activations and KV; `stored` is that of the checkpoint, by torch's name.

    "auto" keeps a half precision where the device computes in it (bf16 on CPUs with AVX512-BF16 or AMX, both on
    CUDA) and is fp32 otherwise. Raises `InvalidRequest` for anything but auto, float32, bfloat16 and float16.
    """
    if dtype == "auto":
        native = device.type == "cuda" or (stored == "bfloat16" and _cpu_computes_in_bf16())
        return _SUPPORTED.get(stored, torch.float32) if native else torch.float32
    if dtype not in _SUPPORTED:
        close = difflib.get_close_matches(str(dtype), _SUPPORTED, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InvalidRequest(f"dtype must be 'auto' or one of {', '.join(map(repr, _SUPPORTED))}, not {dtype!r}{hint}")
    return _SUPPORTED[dtype]


def _cpu_computes_in_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
