"""The fused decoder: Llama, Mistral, Qwen2 and Qwen3 as a loop of few, large operations."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn.functional import embedding, silu

from preble.engine.batch import ForwardBatch
from preble.engine.config import ModelConfig
from preble.engine.decoder_weights import DecoderWeights, load_weights
from preble.engine.kv_cache import KVCache
from preble.engine.rope import RotaryEmbedding
from preble.kernels.paged_attention import PagedAttention


class Decoder:
    """A `Model` of the Llama family.

    A forward pass changes nothing but the KV cache it is given, so several threads may run one decoder at once.
    """

    attention = "torch"

    def __init__(
        self, config: ModelConfig, weights: DecoderWeights, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config = config
        self.device = device
        self.dtype = dtype
        self._weights = weights
        self._rope = RotaryEmbedding(config, device=device)
        self._scale = config.head_dim**-0.5

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv: KVCache) -> torch.Tensor:
        """Write K and V of the N new tokens to their slots and return fp32 logits [R, vocabulary]."""
        config, weights = self.config, self._weights
        query_heads, kv_heads = config.query_heads, config.kv_heads
        head_split = (query_heads + kv_heads, kv_heads)
        plans = {
            window: PagedAttention.plan(batch.sequences, group=query_heads // kv_heads, window=window)
            for window in set(config.layer_windows)
        }
        rotation = self._rope.rotation(batch.positions, self.dtype)
        last_layer = config.layers - 1
        hidden = embedding(batch.token_ids, weights.embedding).to(self.dtype)
        caches = zip(kv.keys.unbind(), kv.values.unbind(), strict=True)
        for index, (layer, (keys, values)) in enumerate(zip(weights.layers, caches, strict=True)):
            heads = layer.qkv(layer.attention_norm(hidden)).view(len(hidden), -1, config.head_dim)
            qk, v = heads.split_with_sizes(head_split, 1)
            if layer.qk_norm is not None:
                qk = layer.qk_norm(qk)
            q, k = rotation.apply(qk).split_with_sizes((query_heads, kv_heads), 1)
            keys.index_copy_(0, batch.slots, k)
            values.index_copy_(0, batch.slots, v)
            if index == last_layer and not len(batch.logit_rows):
                break  # nobody reads further than the cache
            attended = plans[config.layer_windows[index]](q, keys, values, self._scale).flatten(1)
            if index == last_layer:
                # What follows works on each row alone, and only these are read.
                attended, hidden = attended[batch.logit_rows], hidden[batch.logit_rows]
            hidden = layer.output(attended, hidden)
            gate, up = layer.gate_up(layer.mlp_norm(hidden)).chunk(2, -1)
            hidden = layer.down(silu(gate).mul_(up), hidden)
        if not len(batch.logit_rows):
            return torch.empty(0, config.vocabulary_size, device=self.device)
        return weights.head(weights.norm(hidden)).float()


def load_decoder(folder: Path, config: ModelConfig, *, device: torch.device, dtype: str) -> Decoder:
    """Load a checkpoint folder for whose `config` `fused` is true; `dtype` as for `resolve_dtype`.

    Raises `CheckpointError` when tensors are missing, superfluous, of the wrong shape or unreadable, and `DeviceError`
    when the device lacks the memory.
    """
    weights, resolved = load_weights(folder, config, device=device, dtype=dtype)
    return Decoder(config, weights, device=device, dtype=resolved)
