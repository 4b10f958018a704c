"""The network before training: a small Llama whose heads start close to what looking up needs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from tools.demo_model.rows import LONGEST_ROW
from tools.demo_model.vocabulary import BOS, EOS, PAD, build_tokenizer

LAYERS, HIDDEN, HEADS, HEAD_SIZE, INTERMEDIATE = 3, 128, 4, 32, 256
ROPE_THETA = 100_000.0
LOOKING_BACK: Mapping[tuple[int, int], int] = {(0, 0): 1, (0, 1): 2, (0, 2): 3, (0, 3): 4, (1, 0): 1, (1, 1): 3}
"""(layer, head) -> how many tokens back it looks at first. Attribute and name stand 2 to 6 tokens before a token of a
value in the handbook, and 4 to 8 before what predicts it in an answer: one head, or one in each of two layers."""
SMALL = 0.05
"""Standard deviation of an embedding's entries, and the weight of what a head adds to the residual stream at first."""
COMMON = 0.15
"""The first entry of every embedding: a direction that all tokens share, for heads that look at no content."""
SHARPNESS = 28.0
"""How much a head's score at its distance exceeds the others', at first: before the softmax, per rotated pair of
dimensions, times the square root of the head's size."""
ROTATED = 4
"""Pairs of dimensions by whose rotation such a head measures the distance: those that rotate fastest."""


def new_network() -> LlamaForCausalLM:
    """Initialised from torch's global random numbers."""
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_SIZE,
        intermediate_size=INTERMEDIATE,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        max_position_embeddings=LONGEST_ROW,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    network = LlamaForCausalLM(config)
    network.generation_config = GenerationConfig.from_dict(
        {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    )
    _initialise(network)
    return network


@torch.no_grad()
def _initialise(network: LlamaForCausalLM) -> None:
    """Start every head as one of two kinds, from which training goes on freely.

    With the usual initialisation it takes ten times as many tokens until lookups begin to be learned, or they never do:
    two layers of heads have to become useful at once, since either is useless without the other. So some heads start as
    ones that look a fixed number of tokens back, by the rotation of position embeddings alone, and all others as ones
    that match what is equal (W_Q = W_K) and copy what they find (W_O = W_V^T).
    """
    embeddings = network.model.embed_tokens.weight
    torch.nn.init.normal_(embeddings, std=SMALL)
    embeddings[:, 0] = COMMON
    # What the common entry is after the normalisation to a root mean square of 1.
    common = COMMON / math.sqrt((COMMON**2 + (HIDDEN - 1) * SMALL**2) / HIDDEN)
    strength = math.sqrt(SHARPNESS) / common
    for layer, block in enumerate(network.model.layers):
        attention = block.self_attn
        query, key = attention.q_proj.weight, attention.k_proj.weight
        value, output = attention.v_proj.weight, attention.o_proj.weight
        for head in range(HEADS):
            rows = slice(head * HEAD_SIZE, (head + 1) * HEAD_SIZE)
            value[rows] = _orthonormal(HIDDEN, HEAD_SIZE).T
            distance = LOOKING_BACK.get((layer, head))
            if distance is None:
                output[:, rows] = SMALL * value[rows].T
                key[rows] = query[rows] = _orthonormal(HIDDEN, HEAD_SIZE).T
                continue
            # What is looked back at is not to be taken for what stands here: it is put in other directions.
            output[:, rows] = SMALL * _orthonormal(HIDDEN, HEAD_SIZE)
            query[rows] = 0.1 * _orthonormal(HIDDEN, HEAD_SIZE).T
            key[rows] = 0.1 * _orthonormal(HIDDEN, HEAD_SIZE).T
            for pair in range(ROTATED):
                angle = distance * ROPE_THETA ** (-2 * pair / HEAD_SIZE)
                first, second = head * HEAD_SIZE + pair, head * HEAD_SIZE + pair + HEAD_SIZE // 2
                key[first, 0] = strength
                query[first, 0] = strength * math.cos(angle)
                query[second, 0] = -strength * math.sin(angle)
        for projection in (block.mlp.gate_proj, block.mlp.up_proj):
            torch.nn.init.normal_(projection.weight, std=HIDDEN**-0.5)
        torch.nn.init.normal_(block.mlp.down_proj.weight, std=0.2 * SMALL * INTERMEDIATE**-0.5)


def _orthonormal(rows: int, columns: int) -> torch.Tensor:
    """A random matrix [rows, columns] whose columns are orthonormal."""
    basis: torch.Tensor = torch.linalg.qr(torch.randn(rows, columns))[0]
    return basis
