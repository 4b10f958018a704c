"""What a checkpoint's config.json says about the model."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preble.engine.json_fields import JsonFields
from preble.engine.rope_config import RopeConfig
from preble.errors import CheckpointError, UnsupportedModel, shown

_DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"max_position_embeddings": 2048},
    "MistralForCausalLM": {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    "Qwen2ForCausalLM": {"max_position_embeddings": 32_768, "num_key_value_heads": 32},
    "Qwen3ForCausalLM": {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "head_dim": 128},
}
"""The architectures of the fused decoder, and what transformers takes for the fields their config.json leaves out."""
_QWEN_DEFAULTS = {"sliding_window": 4096, "max_window_layers": 28}
_COMMON_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6}
_SHAPE_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"),
)
_MAX_LAYERS = 10_000
"""More would be a mistake; it also bounds the work that a senseless config.json can cause."""
_MAX_PARTS = 100_000
"""Layers times experts that transformers is asked to set up; the largest published models have a fourth of that."""
_COUNTED = re.compile(r"(?P<layers>layers?|blocks)$|(?P<experts>experts?)$|labels?$")
"""The names of fields that say of how many parts transformers makes a model, before it looks at a tensor."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape and the numerical details of a causal language model."""

    architecture: str
    """As in config.json: `LlamaForCausalLM`, …"""
    vocabulary_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    """Tokens of prompt and output together. See `RopeConfig.context_length` for what limits it."""
    layer_windows: tuple[int | None, ...]
    """Per layer, how many tokens a query sees, itself included; `None` for all."""
    eos_token_ids: frozenset[int]
    """Tokens that end a text, from config.json and generation_config.json."""
    dtype: str | None
    """What the weights are stored in, by torch's name (`bfloat16`); `None` when config.json does not say."""
    fused: bool
    """Whether `preble.engine.decoder` covers the model; the fields below describe only such models."""
    rms_norm_eps: float = 1e-6
    qkv_bias: bool = False
    output_bias: bool = False
    """Of the attention's output projection."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """Whether the heads of Q and K pass an RMSNorm before the rotation (Qwen3)."""
    tied_embeddings: bool = False
    """Whether the output projection is the embedding table."""
    rope: RopeConfig = field(default_factory=RopeConfig)

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Read `config.json` and, when present, `generation_config.json`.

        Raises `CheckpointError` for files and fields that are missing or make no sense, `UnsupportedModel` for
        quantized checkpoints and for architectures that neither the fused decoder nor transformers can run.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder")
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} has no config.json, so it is not a checkpoint as published on the hub")
        fields = JsonFields.read(folder / "config.json")
        _refuse_quantized(fields)
        architecture = _architecture(fields)
        eos_token_ids = _eos_token_ids(folder, fields)
        if architecture in _DEFAULTS and (fields.text("hidden_act") or "silu") == "silu":
            return _fused_config(architecture, fields, eos_token_ids)
        return _transformers_config(folder, architecture, fields, eos_token_ids)


def _refuse_quantized(fields: JsonFields) -> None:
    for name in ("quantization_config", "compression_config"):
        quantization = fields.object(name)
        if quantization is not None:
            method = quantization.values.get("quant_method", "unknown")
            raise UnsupportedModel(
                f"{fields.source} has a {name!r} (method {shown(method)}): quantized checkpoints are not supported; "
                "use the original one in bfloat16, float16 or float32"
            )


def _architecture(fields: JsonFields) -> str:
    names = fields.values.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise fields.wrong("architectures", 'a list with one name, such as ["LlamaForCausalLM"]')
    return names[0]


def _eos_token_ids(folder: Path, fields: JsonFields) -> frozenset[int]:
    sources = [fields]
    if (folder / "generation_config.json").is_file():
        sources.append(JsonFields.read(folder / "generation_config.json"))
    return frozenset(token_id for source in sources for token_id in source.token_ids("eos_token_id"))


def _fused_config(architecture: str, fields: JsonFields, eos_token_ids: frozenset[int]) -> ModelConfig:
    qwen = architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM")
    fields = fields.with_defaults(_COMMON_DEFAULTS | _DEFAULTS[architecture] | (_QWEN_DEFAULTS if qwen else {}))
    hidden_size = fields.integer("hidden_size")
    query_heads = fields.integer("num_attention_heads")
    kv_heads = fields.optional_integer("num_key_value_heads") or query_heads
    if query_heads % kv_heads:
        raise fields.wrong("num_key_value_heads", f"a divisor of num_attention_heads ({query_heads})")
    head_dim = fields.optional_integer("head_dim")
    if head_dim is None:
        if hidden_size % query_heads:
            raise fields.wrong("hidden_size", f"a multiple of num_attention_heads ({query_heads})")
        head_dim = hidden_size // query_heads
    if head_dim % 2:
        raise CheckpointError(f"{fields.source}: the head dimension is {head_dim}, but rotary embeddings need it even")
    layers = fields.integer("num_hidden_layers", high=_MAX_LAYERS)
    rope = RopeConfig.from_fields(fields, head_dim=head_dim)
    attention_bias = architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM") and fields.flag("attention_bias")
    windows = _qwen_windows(fields, layers) if qwen else ()
    if architecture == "MistralForCausalLM":
        windows = (fields.optional_integer("sliding_window"),) * layers
    return ModelConfig(
        architecture=architecture,
        vocabulary_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        layers=layers,
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=rope.context_length,
        layer_windows=_useful_windows(windows or (None,) * layers, rope.context_length),
        eos_token_ids=eos_token_ids,
        dtype=_dtype(fields),
        fused=True,
        rms_norm_eps=fields.number("rms_norm_eps"),
        qkv_bias=attention_bias or architecture == "Qwen2ForCausalLM",
        output_bias=attention_bias,
        mlp_bias=architecture == "LlamaForCausalLM" and fields.flag("mlp_bias"),
        qk_norm=architecture == "Qwen3ForCausalLM",
        tied_embeddings=fields.flag("tie_word_embeddings"),
        rope=rope,
    )


def _dtype(fields: JsonFields) -> str | None:
    return fields.text("dtype") or fields.text("torch_dtype")


def _qwen_windows(fields: JsonFields, layers: int) -> tuple[int | None, ...]:
    window = fields.optional_integer("sliding_window") if fields.flag("use_sliding_window") else None
    layer_types = fields.values.get("layer_types")
    if layer_types is None:
        # 0 is a legal value here: every layer has the window.
        first = fields.values["max_window_layers"]
        if type(first) is not int or first < 0:
            raise fields.wrong("max_window_layers", "an integer from 0")
        return tuple(window if layer >= first else None for layer in range(layers))
    return _windows_by_type(fields, layer_types, layers, window)


def _windows_by_type(
    fields: JsonFields, layer_types: object, layers: int, window: int | None
) -> tuple[int | None, ...]:
    if not isinstance(layer_types, list) or len(layer_types) != layers:
        raise fields.wrong("layer_types", f"a list of {layers} names, one per layer")
    by_type = {"full_attention": None, "sliding_attention": window}
    unknown = next((kind for kind in layer_types if not isinstance(kind, str) or kind not in by_type), None)
    if unknown is not None:
        raise UnsupportedModel(f"{fields.source} has layers of the type {shown(unknown)}; supported are {[*by_type]}")
    return tuple(by_type[kind] for kind in layer_types)


def _useful_windows(windows: tuple[int | None, ...], context_length: int) -> tuple[int | None, ...]:
    return tuple(None if window is None or window >= context_length else window for window in windows)


def _refuse_crowds(fields: JsonFields) -> None:
    """Raise `CheckpointError` for numbers of parts that no model has, on which time and memory would be spent."""
    most = {"layers": 1, "experts": 1}
    for name, value in fields.values.items():
        if isinstance(value, dict):
            _refuse_crowds(JsonFields(f"{fields.source}: {shown(name)}", value))
        found = _COUNTED.search(name)
        if found is None or type(value) is not int:
            continue
        if value > _MAX_LAYERS:
            raise fields.wrong(name, f"{_MAX_LAYERS} at most")
        for part in most:
            if found[part]:
                most[part] = max(most[part], value)
    if most["layers"] * most["experts"] > _MAX_PARTS:
        raise CheckpointError(f"{fields.source}: {most['layers']} layers of {most['experts']} experts are too many")


def _transformers_config(
    folder: Path, architecture: str, fields: JsonFields, eos_token_ids: frozenset[int]
) -> ModelConfig:
    """The little the engine needs to know of a model that transformers' own code runs."""
    from transformers import AutoConfig
    from transformers.activations import ACT2FN
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        own_code = " without its own Python code, which Preble never runs" if "auto_map" in fields.values else ""
        raise UnsupportedModel(
            f"{fields.source}: {shown(architecture)} is not a causal language model that the installed transformers "
            f"knows{own_code}"
        )
    _refuse_crowds(fields)
    activation = fields.text("hidden_act")
    if activation is not None and activation not in ACT2FN:
        raise UnsupportedModel(f"{fields.source}: the activation {shown(activation)} is unknown to transformers")
    try:
        known = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_text_config()
    except Exception as error:
        raise CheckpointError(f"{fields.source} is refused by transformers: {error}") from error
    # transformers maps each architecture's own names (n_embd, n_head, …) to these.
    shape = JsonFields(fields.source, {name: getattr(known, name, None) for name in _SHAPE_FIELDS})
    hidden_size, query_heads = shape.integer("hidden_size"), shape.integer("num_attention_heads")
    layers = shape.integer("num_hidden_layers", high=_MAX_LAYERS)
    context_length = shape.integer("max_position_embeddings")
    rope = getattr(known, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # see RopeConfig.context_length
        context_length = min(context_length, rope.get("original_max_position_embeddings", context_length))
    window = shape.optional_integer("sliding_window") if getattr(known, "use_sliding_window", True) else None
    layer_types = getattr(known, "layer_types", None) or ["sliding_attention"] * layers
    return ModelConfig(
        architecture=architecture,
        vocabulary_size=shape.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=shape.optional_integer("intermediate_size") or 4 * hidden_size,
        layers=layers,
        query_heads=query_heads,
        kv_heads=shape.optional_integer("num_key_value_heads") or query_heads,
        head_dim=shape.optional_integer("head_dim") or hidden_size // query_heads,
        context_length=context_length,
        layer_windows=_useful_windows(_windows_by_type(fields, layer_types, layers, window), context_length),
        eos_token_ids=eos_token_ids,
        dtype=_dtype(fields),
        fused=False,
    )
