"""The weights of a Llama-family checkpoint, merged the way the fused decoder multiplies them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from preble.engine.checkpoint import Checkpoint
from preble.engine.config import ModelConfig
from preble.engine.dtypes import resolve_dtype
from preble.engine.linear import Linear
from preble.engine.norm import RMSNorm
from preble.errors import DeviceError

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer."""

    attention_norm: RMSNorm
    qkv: Linear
    """To the heads of Q, then of K, then of V."""
    qk_norm: RMSNorm | None
    """[query_heads + kv_heads, head_dim]."""
    output: Linear
    mlp_norm: RMSNorm
    gate_up: Linear
    """To the gate, then to what it multiplies."""
    down: Linear


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights of a model."""

    embedding: torch.Tensor
    """[vocabulary, hidden], perhaps in the dtype of the checkpoint rather than of the model."""
    layers: tuple[LayerWeights, ...]
    norm: RMSNorm
    head: Linear

    @classmethod
    def load(
        cls, config: ModelConfig, checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype
    ) -> DecoderWeights:
        """Read and merge the tensors layer by layer, so that beside the result one matrix is in memory at a time.

        Raises `CheckpointError` before anything is read unless the tensors are those that `config` asks for.
        """
        checkpoint.check(
            dict(_expected(config)),
            # Frequencies that old versions of transformers saved, and a copy of the embedding table.
            ignored=lambda name: name.endswith("rotary_emb.inv_freq") or (name == _HEAD and config.tied_embeddings),
        )
        read = _Reader(config, checkpoint, device, dtype)
        if not config.tied_embeddings:
            head = Linear(read.tensor(_HEAD))
            embedding = checkpoint.tensor(_EMBEDDING, device).to(dtype, copy=device.type == "cpu")
        else:
            shared = read.tensor(_EMBEDDING)
            head = Linear(shared)
            # Rows cannot be looked up in a packed matrix. The table mapped from its file takes memory only for the
            # tokens in use, and the system may take that back.
            embedding = checkpoint.tensor(_EMBEDDING) if head.packed else shared
        layers = tuple(read.layer(f"model.layers.{index}.") for index in range(config.layers))
        return cls(embedding, layers, read.norm("model.norm"), head)


def load_weights(
    folder: Path, config: ModelConfig, *, device: torch.device, dtype: str
) -> tuple[DecoderWeights, torch.dtype]:
    """The weights in a checkpoint folder on a device, and the dtype they are in; `dtype` as for `resolve_dtype`.

    Raises `CheckpointError` when tensors are missing, superfluous, of the wrong shape or unreadable, and `DeviceError`
    when the device lacks the memory.
    """
    checkpoint = Checkpoint(folder)
    resolved = resolve_dtype(dtype, stored=config.dtype or checkpoint.main_dtype, device=device)
    try:
        return DecoderWeights.load(config, checkpoint, device=device, dtype=resolved), resolved
    except torch.OutOfMemoryError as error:
        raise DeviceError(f"{device} lacks the memory for the weights in {folder}: {error}") from error


class _Reader:
    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._device = device
        self._dtype = dtype

    def tensor(self, name: str) -> torch.Tensor:
        return self._checkpoint.tensor(name, self._device).to(self._dtype)

    def _merged(self, *names: str) -> torch.Tensor:
        return self.tensor(names[0]) if len(names) == 1 else torch.cat([self.tensor(name) for name in names])

    def linear(self, *names: str, bias: bool) -> Linear:
        weight = self._merged(*(f"{name}.weight" for name in names))
        return Linear(weight, self._merged(*(f"{name}.bias" for name in names)).clone() if bias else None)

    def norm(self, name: str) -> RMSNorm:
        # Copied, so that a few numbers do not keep their file mapped.
        return RMSNorm(self.tensor(f"{name}.weight").clone(), self._config.rms_norm_eps)

    def _qk_norm(self, attention: str) -> RMSNorm:
        heads = ((f"{attention}q_norm", self._config.query_heads), (f"{attention}k_norm", self._config.kv_heads))
        weights = [self.tensor(f"{name}.weight").expand(count, -1) for name, count in heads]
        return RMSNorm(torch.cat(weights), self._config.rms_norm_eps)

    def layer(self, prefix: str) -> LayerWeights:
        config = self._config
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        return LayerWeights(
            attention_norm=self.norm(f"{prefix}input_layernorm"),
            qkv=self.linear(f"{attention}q_proj", f"{attention}k_proj", f"{attention}v_proj", bias=config.qkv_bias),
            qk_norm=self._qk_norm(attention) if config.qk_norm else None,
            output=self.linear(f"{attention}o_proj", bias=config.output_bias),
            mlp_norm=self.norm(f"{prefix}post_attention_layernorm"),
            gate_up=self.linear(f"{mlp}gate_proj", f"{mlp}up_proj", bias=config.mlp_bias),
            down=self.linear(f"{mlp}down_proj", bias=config.mlp_bias),
        )


def _expected(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.query_heads * config.head_dim, config.kv_heads * config.head_dim
    projections = {
        "self_attn.q_proj": (queries, hidden, config.qkv_bias),
        "self_attn.k_proj": (keys, hidden, config.qkv_bias),
        "self_attn.v_proj": (keys, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, queries, config.output_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config.qk_norm:
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    yield _EMBEDDING, (config.vocabulary_size, hidden)
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}."
        for name, (rows, columns, bias) in projections.items():
            yield f"{prefix}{name}.weight", (rows, columns)
            if bias:
                yield f"{prefix}{name}.bias", (rows,)
        for name, width in norms.items():
            yield f"{prefix}{name}.weight", (width,)
    yield "model.norm.weight", (hidden,)
    if not config.tied_embeddings:
        yield _HEAD, (config.vocabulary_size, hidden)
