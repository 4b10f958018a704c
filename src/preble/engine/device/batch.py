"""What one forward pass works on, as it lies on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from preble.engine.config import ModelConfig
    from preble.engine.device.attention import Attention
    from preble.engine.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class SharedPrefixInputs:
    """Which decodes begin with the same pages. All tensors are int32."""

    members: torch.Tensor
    """[T, R]: per tile, the decodes that share a prefix, by their place in the batch; -1 for none."""
    prefix_lengths: torch.Tensor
    """[T]: tokens of it; 0 for a tile without work."""
    starts: torch.Tensor
    """[D]: tokens of each decode that a tile answers."""


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """The D requests of a step that compute one token each: the first rows of the batch. All tensors are int32."""

    rows: torch.Tensor
    """[D]: the row of each in the page tables."""
    context_lengths: torch.Tensor
    """[D]: tokens attended to, the new one included; 0 for padding."""
    shared: SharedPrefixInputs | None = None


@dataclass(frozen=True, slots=True)
class ExtendInputs:
    """The E requests of a step that compute several tokens each, behind the decodes. All tensors are int32."""

    rows: torch.Tensor
    """[E]: the row of each in the page tables."""
    context_lengths: torch.Tensor
    """[E]: tokens attended to by its last new token, itself included."""
    query_starts: torch.Tensor
    """[E + 1]: where the new tokens of each begin, counted from the first of all."""
    tiles: torch.Tensor
    """[T, 2]: what `extend_tiles` makes of the lengths."""
    longest: int
    """New tokens of the one that has most."""
    longest_context: int
    """The largest of `context_lengths`."""


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """Input of a forward pass over N new tokens. Index tensors are int32."""

    token_ids: torch.Tensor
    """[N]."""
    positions: torch.Tensor
    """[N]: position of each token in its request."""
    slots: torch.Tensor
    """[N]: where its K and V are written; -1 for padding."""
    tables: torch.Tensor
    """[rows, pages per row]: the pages of every request on the device."""
    decodes: DecodeInputs | None
    extends: ExtendInputs | None
    logit_rows: torch.Tensor | None
    """[R]: rows whose next-token logits are wanted; None for all."""


class DeviceModel(Protocol):
    """A causal language model that runs on a device's own queue. Read-only while serving: replicas may share one."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    """Of the activations."""
    capturable: bool
    """Whether CUDA graphs may hold its forward pass."""

    def forward(self, batch: DeviceBatch, kv: KVCache, attention: Attention) -> torch.Tensor:
        """Write K and V of the new tokens to their slots and return logits [R, vocabulary]. Never waits for the
        device, so that it can be captured in a CUDA graph."""
        ...
