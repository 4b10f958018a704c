"""The fused decoder on a device: few launches per layer, none of which waits for the host."""

from __future__ import annotations

import torch
from torch.nn.functional import embedding

from preble.engine.config import ModelConfig
from preble.engine.decoder_weights import DecoderWeights
from preble.engine.device.attention import Attention
from preble.engine.device.batch import DeviceBatch
from preble.engine.kv_cache import KVCache
from preble.engine.rope import RotaryEmbedding
from preble.kernels.operations import Operations


class DeviceDecoder:
    """A `DeviceModel` of the Llama family; the weights are those of the CPU's `Decoder`."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        operations: Operations,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config = config
        self.device = device
        self.dtype = dtype
        self.capturable = operations.capturable
        self._weights = weights
        self._operations = operations
        self._rope = RotaryEmbedding(config, device=device)
        self._scale = config.head_dim**-0.5

    @torch.inference_mode()
    def forward(self, batch: DeviceBatch, kv: KVCache, attention: Attention) -> torch.Tensor:
        """Write K and V of the N new tokens to their slots and return logits [R, vocabulary] of the model's dtype."""
        config, weights, operations = self.config, self._weights, self._operations
        attention.begin(batch)
        cos, sin = self._rope.half_angles(batch.positions)
        residual = embedding(batch.token_ids, weights.embedding).to(self.dtype)
        hidden = torch.empty_like(residual)
        following = [layer.attention_norm for layer in weights.layers[1:]] + [weights.norm]
        first = weights.layers[0].attention_norm
        operations.add_norm(None, residual, first.weight, first.eps, hidden)
        for index, (layer, next_norm) in enumerate(zip(weights.layers, following, strict=True)):
            qkv = layer.qkv(hidden)
            norms = layer.qk_norm
            operations.rotate_and_store(
                qkv,
                kv.keys[index],
                kv.values[index],
                cos=cos,
                sin=sin,
                slots=batch.slots,
                query_heads=config.query_heads,
                kv_heads=config.kv_heads,
                head_dim=config.head_dim,
                q_norm=None if norms is None else norms.weight[0],
                k_norm=None if norms is None else norms.weight[-1],
                eps=config.rms_norm_eps,
                **kv.scales(index),
            )
            q = qkv.view(len(qkv), -1, config.head_dim)[:, : config.query_heads]
            hidden = layer.output(attention.attend(index, q, kv, self._scale).flatten(1))
            operations.add_norm(hidden, residual, layer.mlp_norm.weight, layer.mlp_norm.eps, hidden)
            gate_up = layer.gate_up(hidden)
            active = torch.empty(len(gate_up), config.intermediate_size, dtype=self.dtype, device=self.device)
            operations.silu_mul(gate_up, active)
            hidden = layer.down(active)
            operations.add_norm(hidden, residual, next_norm.weight, next_norm.eps, hidden)
        if batch.logit_rows is not None:
            hidden = hidden[batch.logit_rows]
        return weights.head(hidden)
