from __future__ import annotations

import made_tokenizers
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preble.engine.detokenizer import Detokenizer
from preble.engine.tokenizer import Tokenizer

KINDS = ("byte_level", "byte_fallback", "unigram", "word_piece", "word_ends")
TEXTS = [
    *made_tokenizers.CORPUS[:5],
    "",
    " leading and trailing ",
    "   ",
    "😀😃👍🏽",
    "e\u0301\u0301\u0301 flag 🇩🇪 family 👩‍👩‍👧",
    "</s> in words <s> and <think> so",
    "\ufffd is a character too \ufffd",
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {
        kind: Tokenizer(made_tokenizers.save(getattr(made_tokenizers, kind)(), tmp_path_factory.mktemp(kind)))
        for kind in KINDS
    }


def pieces(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.append([token]) for token in ids), detokenizer.flush()]


def bytes_of(tokenizer, ids):
    """The bytes of byte-fallback tokens by definition, one item per token that is shown."""
    names = [tokenizer._backend.id_to_token(token) for token in ids if token not in tokenizer.special_token_ids]
    return [
        bytes([int(name[3:5], 16)]) if name.startswith("<0x") else name.replace("▁", " ").encode()
        for name in names
        if name is not None
    ]


def byte_tokens(tokenizer, kind):
    """Byte -> token."""
    if kind == "byte_fallback":
        return {byte: tokenizer._backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return {byte: tokenizer._backend.token_to_id(character) for byte, character in characters.items()}


def is_utf8(data):
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_a_text_join_to_the_decoded_text(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text).tolist()
    streamed = pieces(tokenizer, ids)
    assert "".join(streamed) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in streamed)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_pieces_of_any_tokens_join_to_the_decoded_text(tokenizers, kind, data):
    tokenizer = tokenizers[kind]
    size = tokenizer._backend.get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size + 3), max_size=40))  # the last ones are in no vocabulary
    streamed = "".join(pieces(tokenizer, ids))
    if kind == "byte_fallback":
        joined = b"".join(bytes_of(tokenizer, ids))
        assert streamed == joined.decode(errors="replace").removeprefix(" ")
    if kind != "byte_fallback" or is_utf8(joined):
        assert streamed == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@given(text=st.text(max_size=20), data=st.data())
def test_bytes_of_any_text(tokenizers, kind, text, data):
    """Characters that no token covers come as single bytes, with special tokens between them now and then."""
    tokenizer = tokenizers[kind]
    of_byte, special = byte_tokens(tokenizer, kind), tokenizer._backend.token_to_id("</s>")
    ids = [of_byte[byte] for byte in text.encode()]
    for place in data.draw(st.lists(st.integers(0, len(ids)), max_size=5)):
        ids.insert(place, special)
    streamed = pieces(tokenizer, ids)
    expected = text.removeprefix(" ") if kind == "byte_fallback" else text
    assert "".join(streamed) == expected == tokenizer.decode(ids)
    assert "".join(streamed).count("\ufffd") == text.count("\ufffd")


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_several_tokens_at_once_add_what_they_add_one_by_one(tokenizers, kind, data):
    tokenizer = tokenizers[kind]
    size = tokenizer._backend.get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size - 1), max_size=30))
    cut = data.draw(st.integers(0, len(ids)))
    detokenizer = Detokenizer(tokenizer)
    one_by_one = pieces(tokenizer, ids)
    assert detokenizer.append(ids[:cut]) == "".join(one_by_one[:cut])
    assert [*(detokenizer.append([token]) for token in ids[cut:]), detokenizer.flush()] == one_by_one[cut:]


@given(data=st.data())
def test_several_tokens_at_once(tokenizers, data):
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer.encode("".join(TEXTS)).tolist()
    cut = data.draw(st.integers(0, len(ids)))
    detokenizer = Detokenizer(tokenizer)
    text = detokenizer.append(ids[:cut]) + detokenizer.append(ids[cut:]) + detokenizer.flush()
    assert text == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_do_not_come_between_words(tokenizers, kind):
    tokenizer = tokenizers[kind]
    special = tokenizer._backend.token_to_id("</s>")
    first, *others = tokenizer.encode("the lazy dog").tolist()[1:]
    ids = [*[special] * 20, first, *[special] * 20, *others]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids) == tokenizer.decode([first, *others])


def test_never_half_a_character(tokenizers):
    tokenizer = tokenizers["byte_fallback"]
    of_byte = byte_tokens(tokenizer, "byte_fallback")
    ids = [of_byte[byte] for byte in "é😀!".encode()]
    assert pieces(tokenizer, ids) == ["", "é", "", "", "", "😀", "!", ""]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_an_unfinished_character_is_shown_by_flush_alone(tokenizers, kind):
    tokenizer = tokenizers[kind]
    of_byte = byte_tokens(tokenizer, kind)
    euro = [of_byte[byte] for byte in "€".encode()]
    assert pieces(tokenizer, euro[:2]) == ["", "", "\ufffd"]
    assert pieces(tokenizer, euro) == ["", "", "€", ""]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_invalid_bytes_are_not_held_back(tokenizers, kind):
    tokenizer = tokenizers[kind]
    invalid = byte_tokens(tokenizer, kind)[0xFF]
    assert pieces(tokenizer, [invalid] * 100) == ["\ufffd"] * 100 + [""]


def test_tokenizers_of_known_kinds_take_the_fast_way(tokenizers):
    assert {kind: tokenizers[kind].pieces is not None for kind in KINDS} == {
        "byte_level": True,
        "byte_fallback": True,
        "unigram": True,
        "word_piece": True,
        "word_ends": False,
    }
