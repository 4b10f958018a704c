"""Model shapes to measure, and checkpoints of them with random weights: speed does not depend on what a model says."""

from __future__ import annotations

import json
import math
import string
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path

CONTEXT = 4096
"""`max_position_embeddings` of every checkpoint written here."""
SHARD_BYTES = 256 << 20
"""A shard is closed before it grows past this; memory while writing stays below it, but for one larger tensor."""
BYTES_PER_WEIGHT = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama by its dimensions; `head_dim` times `heads` is `hidden`."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool
    """Whether the output projection is the embedding."""
    dtype: str = "bfloat16"
    """Of the weights: a key of `BYTES_PER_WEIGHT`."""

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return self.parameters * BYTES_PER_WEIGHT[self.dtype]

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def parameters(self) -> int:
        """Weights in the checkpoint."""
        return sum(math.prod(shape) for shape in self.tensors().values())

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint by its published name, with its shape, in the order of a forward pass."""
        kv_width = self.kv_heads * self.head_dim
        tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            tensors |= {
                f"{prefix}.input_layernorm.weight": (self.hidden,),
                f"{prefix}.self_attn.q_proj.weight": (self.hidden, self.hidden),
                f"{prefix}.self_attn.k_proj.weight": (kv_width, self.hidden),
                f"{prefix}.self_attn.v_proj.weight": (kv_width, self.hidden),
                f"{prefix}.self_attn.o_proj.weight": (self.hidden, self.hidden),
                f"{prefix}.post_attention_layernorm.weight": (self.hidden,),
                f"{prefix}.mlp.gate_proj.weight": (self.intermediate, self.hidden),
                f"{prefix}.mlp.up_proj.weight": (self.intermediate, self.hidden),
                f"{prefix}.mlp.down_proj.weight": (self.hidden, self.intermediate),
            }
        tensors["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            tensors["lm_head.weight"] = (self.vocabulary, self.hidden)
        return tensors

    def config(self) -> dict[str, object]:
        """The checkpoint's `config.json`."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0,
            "max_position_embeddings": CONTEXT,
            "tie_word_embeddings": self.tied,
            "torch_dtype": self.dtype,
            "bos_token_id": None,
            "eos_token_id": None,
        }


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("2048x6", 2048, 6, heads=32, kv_heads=8, intermediate=5632, vocabulary=32_000, tied=False),
        Shape("100m", 768, 12, heads=12, kv_heads=4, intermediate=2048, vocabulary=32_000, tied=True),
        # The dimensions of the published Qwen2.5-0.5B.
        Shape("0.5b", 896, 24, heads=14, kv_heads=2, intermediate=4864, vocabulary=151_936, tied=True),
    )
}
"""What the engine is compared with others on."""
SMALL = Shape("2m", 192, 4, heads=6, kv_heads=2, intermediate=512, vocabulary=1024, tied=False, dtype="float32")
"""For what is measured around the engine: its own work is next to nothing, and a CPU answers many requests a second."""


def write_checkpoint(shape: Shape, folder: Path, seed: int = 0) -> None:
    """Write config, tokenizer and weights into an existing folder: the same bytes for the same seed.

    Matrices are normal with the deviation that keeps activations of order one, norms are one.
    """
    import torch
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2))
    _write_tokenizer(shape.vocabulary, folder)
    generator = torch.Generator().manual_seed(seed)
    shards = _shards(shape)
    dtype: torch.dtype = getattr(torch, shape.dtype)
    home: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weights: dict[str, torch.Tensor] = {}
        for name, size in shard.items():
            weight = torch.empty(size, dtype=dtype)
            weights[name] = (
                weight.fill_(1) if len(size) == 1 else weight.normal_(0, size[1] ** -0.5, generator=generator)
            )
            home[name] = file
        save_file(weights, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": shape.nbytes}, "weight_map": home}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shards(shape: Shape) -> list[dict[str, tuple[int, ...]]]:
    """Its tensors in order, cut into files."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, size in shape.tensors().items():
        nbytes = math.prod(size) * BYTES_PER_WEIGHT[shape.dtype]
        if shards[-1] and filled + nbytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = size
        filled += nbytes
    return shards


def _write_tokenizer(vocabulary: int, folder: Path) -> None:
    """A byte-level BPE in which every id has a text: bytes first, then merged pairs and triples of letters and digits.

    Engines that turn tokens into text thus do the work that a real vocabulary would ask of them.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = string.ascii_letters + string.digits
    pairs = list(product(letters, letters))
    longer = (("".join(pair), letter) for pair, letter in product(pairs, letters))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = (pairs + list(islice(longer, vocabulary)))[: vocabulary - len(alphabet)]
    tokens = {token: number for number, token in enumerate([*alphabet, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
