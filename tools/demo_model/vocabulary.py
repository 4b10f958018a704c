"""The built-in model's tokenizer: a token for each word of handbooks and for each two digits, bytes for the rest."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from preble.demo.handbook import TITLE, UNKNOWN
from preble.demo.words import DOMAINS

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SPLIT = r"[ _]?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]|\n|\s"
"""A text falls into words with the space or underscore before them, pairs of digits, and single other characters. So
every name has two tokens and every value one or two, which makes the distances within a fact the same in all facts."""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] | trim }}\n"
    "{% elif message['role'] == 'user' %}Q: {{ message['content'] | trim }}\n"
    "{% elif message['role'] == 'assistant' %}A: {{ message['content'] | trim }}{{ eos_token }}\n"
    "{% else %}{{ raise_exception('the built-in model knows the roles system, user and assistant') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)


def build_tokenizer() -> Tokenizer:
    """A byte-level tokenizer without merges: a piece of text is one token if it is listed, and its bytes otherwise."""
    byte_to_character = _byte_characters()
    pieces = [BOS, EOS, PAD, *byte_to_character]
    pieces += ["".join(byte_to_character[byte] for byte in word.encode()) for word in _words()]
    tokenizer = Tokenizer(models.BPE({piece: token for token, piece in enumerate(pieces)}, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS, PAD])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    build_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _words() -> list[str]:
    """All that is one token, as it stands in a text."""
    after_space, glued = {"of", UNKNOWN}, {TITLE}
    for domain in DOMAINS.values():
        after_space |= {*domain.first, *domain.attributes}
        if domain.joint == " ":
            after_space |= set(domain.second)
        else:
            glued |= {domain.joint + word for word in domain.second}
        for values in domain.attributes.values():
            after_space |= set(values) if isinstance(values, tuple) else set()
    pairs = [f"{number:02}" for number in range(100)]
    return [*sorted(glued), *(f" {word}" for word in sorted(after_space)), *pairs, *(f" {pair}" for pair in pairs)]


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies, as GPT-2 chose them."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
