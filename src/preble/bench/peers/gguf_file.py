"""A Llama checkpoint as the GGUF file that llama.cpp reads: the same bf16 weights, bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(checkpoint: Path, target: Path) -> None:
    """Convert a bf16 Llama checkpoint in safetensors. It gets no vocabulary: prompts are token ids."""
    import gguf  # type: ignore[import-not-found,unused-ignore]  # only where llama.cpp is measured

    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, weight in bf16_tensors(checkpoint):
        new_name = gguf_name(name)
        kind = new_name.split(".")[-2]
        if weight.ndim == 1:
            writer.add_tensor(new_name, (weight.astype(np.uint32) << 16).view(np.float32))
            continue
        if kind in heads:
            weight = interleave_rope(weight, heads[kind])
        raw = np.ascontiguousarray(weight).view(np.uint8)
        writer.add_tensor(new_name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`."""
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[part]}.weight"
    return f"{GGUF_NAMES[stem]}.weight"


def interleave_rope(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """Reorder the rows [heads * head_dim, hidden] of a query or key projection.

    The checkpoint rotates a head's first half against its second; llama.cpp rotates neighbours.
    """
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def bf16_tensors(checkpoint: Path) -> Iterator[tuple[str, NDArray[np.uint16]]]:
    """Name and raw bits of every tensor, mapped from the files: numpy has no bfloat16."""
    for file in sorted(checkpoint.glob("*.safetensors")):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "BF16":
                raise ValueError(f"{file.name}: {name} is {entry['dtype']}; only BF16 checkpoints are converted")
            begin, _ = entry["data_offsets"]
            count = math.prod(entry["shape"])
            flat = np.memmap(file, np.uint16, mode="r", offset=8 + length + begin, shape=(count,))
            yield name, flat.reshape(entry["shape"])
