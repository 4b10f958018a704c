"""The model behind `Cluster("demo")`: a small Llama with random weights, written on the spot.

It needs no download and no GPU, and it exercises everything a real checkpoint does; what it says is word salad.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY = 1024
WORDS = """
a about above after again all also always an and answer any are as ask at away back be because been before began
best better between big book both bring build but by call came can carry change city clear close cold come could
cut day did different do does door down draw each early earth easy eat end enough even ever every example eye
face fall family far fast father feel few field find fire first fish five follow food for form found four free
from full game garden gave get girl give go good great green ground group grow had half hand hard has have he
head hear heavy help her here high him his hold home horse hot hour house how hundred idea if in into is island
it just keep kind king knew know land language large last late laugh law lay lead learn leave left let letter
life light like line list little live long look lot love low made make man many map mark may me mean men might
mile mind minute money moon more morning most mother mountain move much music must my name near need never new
next night no north not note nothing now number of off often old on once one only open or order other our out
over own page paper part pass past people picture place plan plant play point power press question quick rain
ran reach read ready real red remember rest right river road rock room round rule run said same saw say school
sea second see seem sentence set seven she ship short should show side simple since sing sit six sleep slow
small snow so some song soon sound south stand star start state stay step still stone stop story street strong
study such sun sure table take talk teach tell ten than that the their them then there these they thing think
this those though thought three through time to together told too took top toward town travel tree true try turn
two under until up us use very voice wait walk want war warm was watch water way we week well went were west
what wheel when where which while white who whole why will wind with wood word work world would write year yet
you young your
""".split()
SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_demo_model(folder: Path) -> None:
    """Write config, weights, tokenizer and chat template into an existing folder. The same bytes every time."""
    import torch
    from safetensors.torch import save_file

    tokenizer, word_ids = _tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    hidden, layers, heads, kv_heads, head_dim, intermediate = 192, 4, 6, 2, 32, 512
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0,
        "max_position_embeddings": 16_384,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": SPECIAL_TOKENS[0],
                "eos_token": SPECIAL_TOKENS[1],
                "chat_template": CHAT_TEMPLATE,
            },
            indent=2,
        )
    )
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    # Every row of the output projection but those of whole words is zero. Some word is always far above zero: nothing
    # else is ever chosen greedily, and next to nothing at the temperatures people use.
    head = torch.zeros(VOCABULARY, hidden)
    head[word_ids] = normal(len(word_ids), hidden, scale=0.5)
    weights = {
        "model.embed_tokens.weight": normal(VOCABULARY, hidden, scale=1.0),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": head,
    }
    shapes = {
        "self_attn.q_proj": (heads * head_dim, hidden),
        "self_attn.k_proj": (kv_heads * head_dim, hidden),
        "self_attn.v_proj": (kv_heads * head_dim, hidden),
        "self_attn.o_proj": (hidden, heads * head_dim),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    for layer in range(layers):
        for name, shape in shapes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = normal(*shape, scale=shape[1] ** -0.5)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = torch.ones(hidden)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _tokenizer() -> tuple[Tokenizer, list[int]]:
    """A byte-level BPE that knows the words above, and the ids of those words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" " + " ".join(WORDS)] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL_TOKENS[0]} $A", special_tokens=[(SPECIAL_TOKENS[0], 0)]
    )
    ids = [tokenizer.token_to_id("Ġ" + word) for word in WORDS]
    return tokenizer, [token for token in ids if token is not None]
