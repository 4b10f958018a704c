"""What workers decode with, against the tokenizer that it was taken from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import made_tokenizers
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preble.engine import tokenizer as tokenizer_module
from preble.engine.detokenizer import Detokenizer
from preble.engine.messages import Launch
from preble.engine.options import EngineOptions
from preble.engine.token_text import RestoredTokenText, TokenText
from preble.engine.tokenizer import Tokenizer
from preble.engine.wire import decode_launch, encode_launch

KINDS = ("byte_level", "byte_fallback", "unigram", "word_piece", "word_ends")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, RestoredTokenText]]:
    """By kind, a tokenizer and what is left of it at the other end of a socket."""
    found = {}
    for kind in KINDS:
        folder = made_tokenizers.save(getattr(made_tokenizers, kind)(), tmp_path_factory.mktemp(kind))
        whole = Tokenizer(folder)
        launch = Launch(str(folder), 0, "cpu", 1, 1, EngineOptions(), text=whole.text_state())
        state = decode_launch(encode_launch(launch)).text
        assert state is not None
        found[kind] = whole, RestoredTokenText(state)
    return found


def streamed(text: TokenText, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(text)
    return [*(detokenizer.append([token]) for token in ids), detokenizer.flush()]


@pytest.mark.parametrize("kind", KINDS)
def test_it_knows_the_same_tokens(pairs: dict[str, tuple[Tokenizer, RestoredTokenText]], kind: str) -> None:
    whole, restored = pairs[kind]
    assert whole.special_token_ids
    assert restored.special_token_ids == whole.special_token_ids
    assert restored.eos_token_ids == whole.eos_token_ids
    assert (restored.pieces is None) == (whole.pieces is None)


@given(kind=st.sampled_from(KINDS), data=st.data())
def test_it_decodes_the_same(
    pairs: dict[str, tuple[Tokenizer, RestoredTokenText]], kind: str, data: st.DataObject
) -> None:
    whole, restored = pairs[kind]
    size = whole._backend.get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size + 3), max_size=30))
    assert restored.decode(ids) == whole.decode(ids)
    assert streamed(restored, ids) == streamed(whole, ids)


def test_what_is_too_large_to_send_is_loaded_there(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "_LONGEST_STATE", 100)
    assert Tokenizer(llama).text_state() is None


def test_an_engine_with_it_loads_no_transformers(llama: Path) -> None:
    state = msgspec.json.encode(Tokenizer(llama).text_state())
    code = """
import sys, msgspec
from preble.engine.options import EngineOptions
from preble.engine.source import EngineSource
from preble.engine.token_text import TokenTextState
import preble.engine.worker
state = msgspec.json.decode(sys.stdin.buffer.read(), type=TokenTextState)
EngineSource(sys.argv[1], EngineOptions(dtype="float32", kv_memory="1MiB"), state).engine(0, "cpu", sharing=1)
print("transformers" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code, str(llama)], input=state, capture_output=True, check=True)
    assert result.stdout.split() == [b"False"]
