from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import made_tokenizers
import numpy as np
import pytest
from transformers import AutoTokenizer

from preble.engine.tokenizer import LONG, Tokenizer
from preble.errors import CheckpointError, InvalidRequest, UnknownOption, UnsupportedModel

KINDS = ("byte_level", "byte_fallback", "unigram", "word_piece", "word_ends")
TEXT = "naïve café 😀 日本語 <think> don't  stop\n"


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return made_tokenizers.save(getattr(made_tokenizers, request.param)(), tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    return made_tokenizers.save(made_tokenizers.byte_level(), tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def tokenizer(chat_folder):
    return Tokenizer(chat_folder)


def test_encodes_and_decodes_like_transformers(folder):
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    long = "".join(made_tokenizers.CORPUS) * 4 + "</s>" + TEXT * 3
    assert len(long) > LONG
    for text in (TEXT, "", " ", "</s> written out", long, *made_tokenizers.CORPUS):
        ids = ours.encode(text)
        assert ids.dtype == np.int32
        assert ids.tolist() == theirs.encode(text)
        assert ids[0] == theirs.bos_token_id
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path):
    backend = made_tokenizers.byte_level()
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=64)
    ours = Tokenizer(made_tokenizers.save(backend, tmp_path))
    assert ours.decode(ours.encode(TEXT)) == TEXT
    assert len(ours.encode("a")) == 2


def test_lays_out_a_chat_like_transformers(chat_folder, tokenizer):
    theirs = AutoTokenizer.from_pretrained(chat_folder)
    messages = [{"role": "user", "content": "Hi 😀"}, {"role": "assistant", "content": "Hello"}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.chat(messages).tolist() == expected
    assert expected.count(theirs.bos_token_id) == 1
    assert tokenizer.chat(tuple(messages), add_generation_prompt=False).tolist() == theirs.apply_chat_template(
        messages, return_dict=False
    )
    assert tokenizer.chat(messages, continue_final_message=True).tolist() == theirs.apply_chat_template(
        messages, continue_final_message=True, return_dict=False
    )


def test_variables_and_tools_reach_the_template(tokenizer):
    template = "{{ tone }} {{ tools[0]['name'] }} {{ messages[0]['content'] }}"
    ids = tokenizer.chat(
        [{"role": "user", "content": "x"}], tools=[{"name": "search"}], chat_template=template, tone="dry"
    )
    assert tokenizer.decode(ids) == "dry search x"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "messages must be a sequence of mappings"),
        (7, "messages must be a sequence of mappings"),
        ([], "messages is empty"),
        (["hello"], r"messages\[0\]"),
        ([{"role": "user", "content": "a"}, {"content": "b"}], r"messages\[1\]"),
        ([{"role": 3, "content": "a"}], r"messages\[0\]"),
        ([{"role": "tool", "content": "a"}], "no tools here"),
        ([{"role": "user", "content": "\ud800"}], "half a surrogate pair"),
    ],
)
def test_malformed_messages_are_refused(tokenizer, messages, message):
    with pytest.raises(InvalidRequest, match=message):
        tokenizer.chat(messages)


@pytest.mark.parametrize(
    "template",
    ["{{ messages.pop() }}", "{% for x in y %}", "{{ 1 // 0 }}", "{{ ''.__class__.__mro__ }}", "{{ 1 + 'a' }}"],
)
def test_a_template_that_fails_is_the_requests_failure(tokenizer, template):
    with pytest.raises(InvalidRequest, match=r"the chat template of .* rejects"):
        tokenizer.chat([{"role": "user", "content": "a"}], chat_template=template)


def test_options_that_are_not_for_templates(tokenizer):
    with pytest.raises(UnknownOption, match="return_tensors"):
        tokenizer.chat([{"role": "user", "content": "a"}], return_tensors="pt")


def test_no_chat_template(tmp_path):
    bare = Tokenizer(made_tokenizers.save(made_tokenizers.byte_level(), tmp_path / "bare-model", template=None))
    with pytest.raises(InvalidRequest, match=r"bare-model has no chat template"):
        bare.chat([{"role": "user", "content": "a"}])


@pytest.mark.parametrize("text", [None, 5, b"bytes", ["a"]])
def test_only_strings_are_encoded(tokenizer, text):
    with pytest.raises(InvalidRequest, match="must be a string"):
        tokenizer.encode(text)


def test_half_a_surrogate_pair(tokenizer):
    with pytest.raises(InvalidRequest, match="surrogate pair at character 2"):
        tokenizer.encode("ab\udc00")


def test_many_threads_at_once(tokenizer):
    texts = [f"{TEXT} {number}" * 20 for number in range(200)]
    messages = [[{"role": "user", "content": text}] for text in texts]
    expected = [tokenizer.encode(text).tolist() for text in texts]
    laid_out = [tokenizer.chat(one).tolist() for one in messages]
    with ThreadPoolExecutor(8) as pool:
        encoded = pool.map(lambda text: tokenizer.encode(text).tolist(), texts)
        chats = pool.map(lambda one: tokenizer.chat(one).tolist(), messages)
        decoded = pool.map(tokenizer.decode, expected)
        assert list(encoded) == expected
        assert list(chats) == laid_out
        assert list(decoded) == texts


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, None, set()),
        (None, 7, {7}),
        (None, [7, 8], {7, 8}),
        (9, 7, {9}),
        ([9, 10], None, {9, 10}),
    ],
)
def test_end_of_sequence_tokens(tmp_path, generation, config, expected):
    backend = made_tokenizers.byte_level()
    made_tokenizers.save(backend, tmp_path, config={"model_type": "llama", "eos_token_id": config})
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    ours = Tokenizer(tmp_path)
    assert ours.eos_token_ids == expected | {backend.token_to_id("</s>")}
    assert ours.special_token_ids == {backend.token_to_id(token) for token in made_tokenizers.SPECIAL}


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer"])
def test_a_missing_tokenizer_is_named(tmp_path, name):
    made_tokenizers.save(made_tokenizers.byte_level(), tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_file_is_named(tmp_path, name, content):
    made_tokenizers.save(made_tokenizers.byte_level(), tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        Tokenizer(tmp_path)


def test_a_tokenizer_of_another_format_is_named(tmp_path):
    made_tokenizers.save(made_tokenizers.byte_level(), tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Nonsense"}}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be loaded"):
        Tokenizer(tmp_path)


def test_no_code_of_the_checkpoint_is_run(tmp_path):
    made_tokenizers.save(made_tokenizers.byte_level(), tmp_path, config={"model_type": "its_own"})
    (tmp_path / "code.py").write_text("raise SystemExit('this ran')")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", "code.Own"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UnsupportedModel, match=r"tokenizer_config\.json names a tokenizer in code of its own"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("length", [100, 5000])
def test_a_regular_expression_that_takes_forever_is_given_up(tmp_path, length, capfd):
    """The Rust side panics when its matcher has gone back ten million times."""
    made_tokenizers.save(made_tokenizers.byte_level(), tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False}
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, state["pre_tokenizer"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    ours = Tokenizer(tmp_path)
    assert len(ours.encode("ab")) > 1
    with pytest.raises(InvalidRequest, match="gives up on this text"):
        ours.encode("a" * length)
    assert "panicked" in capfd.readouterr().err
