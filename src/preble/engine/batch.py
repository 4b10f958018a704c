"""What one forward pass works on: the tokens of all requests in a step, flattened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from preble.engine.config import ModelConfig
    from preble.engine.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """The part of one request that a step computes."""

    query_start: int
    """Row of its first new token in the batch."""
    query_length: int
    """New tokens; 1 for a decode."""
    context_length: int
    """Tokens attended to by the last new token, itself included."""
    runs: tuple[tuple[int, int], ...]
    """(first slot, length) of contiguous KV slots that hold tokens 0 to `context_length`, in order."""


@dataclass(slots=True)
class ForwardBatch:
    """Input of a forward pass over N new tokens of `len(sequences)` requests, R of whose rows give logits."""

    token_ids: torch.Tensor
    """int64 [N]."""
    positions: torch.Tensor
    """int64 [N]: position of each token in its request."""
    slots: torch.Tensor
    """int64 [N]: `page * page_size + offset` where the token's K and V are written."""
    sequences: list[SequenceSlice]
    logit_rows: torch.Tensor
    """int64 [R]: rows whose next-token logits are wanted."""


class Model(Protocol):
    """A causal language model over a paged KV cache. Read-only while serving: replicas of a device share one."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    """Of the KV cache and the activations."""
    attention: str
    """Name of the attention backend, for `stats`."""

    def forward(self, batch: ForwardBatch, kv: KVCache) -> torch.Tensor:
        """Write K and V of the new tokens to their slots and return fp32 logits [R, vocabulary]."""
        ...
