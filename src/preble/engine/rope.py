"""Rotary position embeddings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch

from preble.engine.config import ModelConfig
from preble.errors import CheckpointError


class Rotation(NamedTuple):
    """The rotation of N tokens, made once per forward pass for all layers."""

    cos: torch.Tensor
    """[N, 1, head_dim]."""
    signed_sin: torch.Tensor
    """[N, 1, head_dim]; the first half negated."""

    def apply(self, heads: torch.Tensor) -> torch.Tensor:
        """Rotate heads [N, heads, head_dim], Q and K alike; dimension i is paired with i + head_dim / 2."""
        swapped = heads.roll(heads.shape[-1] // 2, -1)
        return (heads * self.cos).addcmul_(swapped, self.signed_sin)


class RotaryEmbedding:
    """The frequencies of a model. Cosines are computed for the positions of each step, so there is no table to grow."""

    def __init__(self, config: ModelConfig, *, device: torch.device) -> None:
        frequencies, self._scaling = _frequencies(config)
        self._frequencies = frequencies.to(device)
        # cos(-x) = cos(x) and sin(-x) = -sin(x): negative frequencies give the signs of `Rotation`.
        self._signed_frequencies = torch.cat((-frequencies, frequencies)).to(device)

    def rotation(self, positions: torch.Tensor, dtype: torch.dtype) -> Rotation:
        """positions: int64 [N]; the angles are computed in fp32 and the result rounded to `dtype`."""
        angles = positions[:, None, None] * self._signed_frequencies
        cos, sin = angles.cos(), angles.sin()
        if self._scaling != 1:
            cos, sin = cos.mul_(self._scaling), sin.mul_(self._scaling)
        return Rotation(cos.to(dtype), sin.to(dtype))

    def half_angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines fp32 [N, head_dim / 2] for positions [N] of any integer type."""
        angles = positions[:, None] * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        if self._scaling != 1:
            cos, sin = cos.mul_(self._scaling), sin.mul_(self._scaling)
        return cos, sin


def _frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """fp32 [head_dim / 2] in radians per position, and the factor on cosine and sine."""
    rope = config.rope
    if rope.rope_type == "default":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
        return 1.0 / (rope.theta**exponents), 1.0
    # The scaled types are transformers' own functions, which define what the published checkpoints mean.
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = SimpleNamespace(
        hidden_size=config.hidden_size,
        num_attention_heads=config.query_heads,
        head_dim=config.head_dim,
        max_position_embeddings=rope.max_positions,
        rope_parameters=dict(rope.parameters),
        standardize_rope_params=lambda: None,
    )
    try:
        frequencies, scaling = ROPE_INIT_FUNCTIONS[rope.rope_type](parameters, torch.device("cpu"))
    except (ArithmeticError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the rope parameters {dict(rope.parameters)} make no sense: {error}") from error
    return frequencies.float(), float(scaling)
