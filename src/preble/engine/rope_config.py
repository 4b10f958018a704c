"""How a checkpoint encodes positions: rotary embeddings and their published ways of scaling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from preble.engine.json_fields import JsonFields
from preble.errors import UnsupportedModel, shown

_DEFAULT_THETA = 10_000.0
_MAX_POSITIONS = 2**31 - 1
"""Positions are 32-bit integers."""
_REQUIRED_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_OPTIONAL_NUMBERS = ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding, in the terms of transformers' `rope_parameters`."""

    rope_type: str = "default"
    """default, linear, dynamic, yarn, longrope or llama3."""
    theta: float = _DEFAULT_THETA
    max_positions: int = 2048
    """The checkpoint's `max_position_embeddings`."""
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Everything the type needs, `rope_type` and `rope_theta` included, as transformers' functions expect it."""

    @classmethod
    def from_fields(cls, config: JsonFields, *, head_dim: int) -> RopeConfig:
        """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before) of a config.json.

        Raises `UnsupportedModel` for an unknown type and `CheckpointError` for missing or senseless parameters.
        """
        max_positions = config.integer("max_position_embeddings")
        given = config.object("rope_scaling") or config.object("rope_parameters") or JsonFields(config.source, {})
        if any(isinstance(value, dict) for value in given.values.values()):
            raise UnsupportedModel(f"{given.source} differs between layers; this architecture has one for all")
        rope_type = given.text("rope_type") or given.text("type") or "default"
        if rope_type not in _REQUIRED_NUMBERS:
            known = ", ".join(_REQUIRED_NUMBERS)
            raise UnsupportedModel(f"{given.source} has the type {shown(rope_type)}; supported are {known}")
        if any(fields.values.get("partial_rotary_factor") not in (None, 1, 1.0) for fields in (config, given)):
            raise UnsupportedModel(f"{config.source}: a 'partial_rotary_factor' other than 1 is not supported")

        theta_fields = next((f for f in (given, config) if f.values.get("rope_theta") is not None), None)
        theta = theta_fields.number("rope_theta") if theta_fields else _DEFAULT_THETA
        parameters: dict[str, Any] = {"rope_type": rope_type, "rope_theta": theta}
        for name in _REQUIRED_NUMBERS[rope_type]:
            parameters[name] = given.number(name)
        for name in _OPTIONAL_NUMBERS:
            if given.values.get(name) is not None:
                parameters[name] = given.number(name)
        if rope_type in ("yarn", "longrope", "llama3"):
            # A value beside the rope parameters wins over one among them: transformers' rule.
            places = [f for f in (config, given) if f.values.get("original_max_position_embeddings") is not None]
            original = places[0].integer("original_max_position_embeddings") if places else max_positions
            parameters["original_max_position_embeddings"] = original
        if rope_type == "yarn" and given.values.get("truncate") is not None:
            parameters["truncate"] = given.flag("truncate")
        if rope_type == "longrope":
            for name in ("short_factor", "long_factor"):
                parameters[name] = given.numbers(name, head_dim // 2)
        if rope_type == "llama3" and parameters["low_freq_factor"] == parameters["high_freq_factor"]:
            raise given.wrong("low_freq_factor", "different from 'high_freq_factor'")
        return cls(rope_type, theta, max_positions, parameters)

    @property
    def context_length(self) -> int:
        """The longest sequence, in tokens, over which the frequencies are those the model was trained with.

        `dynamic` and `longrope` change all frequencies once a sequence grows past a length. K that is already in the
        cache, perhaps shared with shorter sequences, would have to be rotated anew, so these end at that length.
        """
        if self.rope_type == "longrope":
            original: int = self.parameters["original_max_position_embeddings"]
            return min(self.max_positions, original)
        if self.rope_type == "yarn":
            # Published configs name the length before scaling here and leave max_position_embeddings at it.
            extended = int(self.parameters["original_max_position_embeddings"] * self.parameters["factor"])
            return min(max(self.max_positions, extended), _MAX_POSITIONS)
        return self.max_positions
