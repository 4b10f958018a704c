"""The FlashAttention packages behind one call: each release line has functions, names and limits of its own.

Dao, "FlashAttention-2", 2023, is the package flash-attn; Shah et al., "FlashAttention-3", 2024, is built from the
folder hopper of the same repository and imported as `flash_attn_interface`. Both read our cache where it is, as pages.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch

_UNUSABLE = (ImportError, AttributeError, OSError)
"""What importing a package raises that is not there, is built for another PyTorch, or lacks the functions."""


@dataclass(frozen=True, slots=True)
class FlashOptions:
    """What a layer asks for besides tensors."""

    scale: float
    """Of the scores."""
    window: int | None
    """A token sees itself and the `window - 1` tokens before it, or all of them."""

    @property
    def named(self) -> dict[str, Any]:
        """As all functions take them. They count the tokens on either side of a token, -1 being all."""
        left_right = (-1, -1) if self.window is None else (self.window - 1, 0)
        return {"softmax_scale": self.scale, "causal": True, "window_size": left_right}


@dataclass(frozen=True, slots=True)
class FlashChunks:
    """The E prefill chunks of a batch. Tensors are int32."""

    tables: torch.Tensor
    """[E, pages]: the pages of each."""
    context_lengths: torch.Tensor
    """[E]: tokens attended to by its last new token, itself included."""
    context_starts: torch.Tensor
    """[E + 1]: the sums of those before."""
    query_starts: torch.Tensor
    """[E + 1]: where the new tokens of each begin."""
    longest: int
    """New tokens of the one that has most."""
    longest_context: int
    """The largest of `context_lengths`."""


class FlashLibrary(Protocol):
    """An installed package. Keys and values are [pages, page_size, kv_heads, head_dim], q is [N, heads, head_dim]."""

    page_multiple: int
    """The page size must be a multiple of it."""
    capturable: bool
    """Whether CUDA graphs may hold its decodes."""

    def decode(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tables: torch.Tensor,
        context_lengths: torch.Tensor,
        options: FlashOptions,
    ) -> torch.Tensor:
        """Attention like q of a token each of N requests: `tables` int32 [N, pages], `context_lengths` int32 [N]."""
        ...

    def extend(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, chunks: FlashChunks, options: FlashOptions
    ) -> torch.Tensor:
        """Attention like q of all new tokens of `chunks`."""
        ...


class FlashAttention2:
    """The package flash-attn, from 2.7, on Ampere and newer."""

    page_multiple = 256

    def __init__(self) -> None:
        module = import_module("flash_attn")
        version = _numbers(module.__version__)
        if version < (2, 7):
            raise ImportError(f"flash-attn {module.__version__} is too old: 2.7 or newer is needed")
        self.capturable = version < (2, 8, 4)
        """From 2.8.4 on, it asks the device for the longest context before it decodes from pages."""
        self._decode = module.flash_attn_with_kvcache
        self._extend = module.flash_attn_varlen_func

    def decode(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tables: torch.Tensor,
        context_lengths: torch.Tensor,
        options: FlashOptions,
    ) -> torch.Tensor:
        out: torch.Tensor = self._decode(
            q[:, None], keys, values, cache_seqlens=context_lengths, block_table=tables, **options.named
        )
        return out[:, 0]

    def extend(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, chunks: FlashChunks, options: FlashOptions
    ) -> torch.Tensor:
        out: torch.Tensor = self._extend(
            q,
            keys,
            values,
            cu_seqlens_q=chunks.query_starts,
            cu_seqlens_k=chunks.context_starts,
            max_seqlen_q=chunks.longest,
            max_seqlen_k=chunks.longest_context,
            block_table=chunks.tables,
            **options.named,
        )
        return out


class FlashAttention3:
    """FlashAttention 3, on Hopper."""

    page_multiple = 1
    capturable = True

    def __init__(self) -> None:
        self._attend = import_module("flash_attn_interface").flash_attn_with_kvcache
        if not {"page_table", "cu_seqlens_q"} <= inspect.signature(self._attend).parameters.keys():
            raise ImportError("this flash_attn_interface is a first version without page tables; build a newer one")

    def decode(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tables: torch.Tensor,
        context_lengths: torch.Tensor,
        options: FlashOptions,
    ) -> torch.Tensor:
        out: torch.Tensor = self._attend(
            q[:, None], keys, values, cache_seqlens=context_lengths, page_table=tables, **options.named
        )
        return out[:, 0]

    def extend(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, chunks: FlashChunks, options: FlashOptions
    ) -> torch.Tensor:
        out: torch.Tensor = self._attend(
            q,
            keys,
            values,
            cache_seqlens=chunks.context_lengths,
            page_table=chunks.tables,
            cu_seqlens_q=chunks.query_starts,
            max_seqlen_q=chunks.longest,
            **options.named,
        )
        return out


def find_library(capability: tuple[int, int], page_size: int) -> tuple[FlashLibrary | None, str]:
    """The best package for a GPU of a compute capability, or None; and why none will do."""
    problems = []
    if capability[0] == 9:
        try:
            return FlashAttention3(), ""
        except _UNUSABLE as error:
            problems.append(f"FlashAttention 3 cannot be imported ({error})")
    try:
        library = FlashAttention2()
    except _UNUSABLE as error:
        return None, "; ".join([*problems, f"the package flash-attn cannot be imported ({error})"])
    if page_size % library.page_multiple:
        problems.append(
            f"flash-attn 2 reads pages of a multiple of {library.page_multiple} tokens, and page_size is {page_size} "
            f"(use page_size={library.page_multiple})"
        )
        return None, "; ".join(problems)
    return library, ""


def _numbers(version: str) -> tuple[int, ...]:
    """Of "2.8.3.post1" (2, 8, 3)."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
