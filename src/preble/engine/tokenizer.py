"""Text to token ids and back, as the checkpoint's publisher defined them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from preble.engine.json_fields import JsonFields, read_json
from preble.engine.pieces import TokenPieces
from preble.engine.rust_panics import panics_as
from preble.engine.token_text import TokenTextState
from preble.errors import CheckpointError, InvalidRequest, PrebleError, UnknownOption, UnsupportedModel, shown

_NOT_FOR_TEMPLATES = frozenset(
    {
        "conversation",
        "max_length",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    }
)
"""What `apply_chat_template` takes for itself, and `chat` decides."""
_MESSAGE = "{'role': 'user', 'content': 'Hello'}"
_LONGEST_FILES = {".json": 128 << 20, ".model": 64 << 20, ".txt": 64 << 20, ".jinja": 1 << 20}
"""Bytes of a file of that kind. The largest published vocabularies take 34 MB."""
_LONGEST_REASON = 500
"""Characters of the words of others in an error."""
LONG = 2_000
"""Characters, or tokens, from which tokenizing lets other threads run meanwhile. It takes about a millisecond then."""

_LONGEST_STATE = 1 << 24
"""Characters of a tokenizer that is sent to workers; in UTF-8 they fit a frame."""


class Tokenizer:
    """A checkpoint's tokenizer and chat template. May be used from several threads at once.

    Args:
        folder: a checkpoint folder.

    Raises:
        CheckpointError: a tokenizer file is missing or broken; the message names the file.
        UnsupportedModel: the tokenizer is code that came with the checkpoint.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._hf = _load(self.folder)
        self._lock = threading.Lock()
        self._rendering = threading.Lock()
        """Templates run in Python, one at a time: several would hardly let an event loop have the interpreter."""
        self._backend = getattr(self._hf, "backend_tokenizer", None)
        if self._backend is not None:
            # Set once and never again: a Rust tokenizer serves many threads as long as nobody changes it.
            self._backend.no_truncation()
            self._backend.no_padding()
        self.special_token_ids: frozenset[int] = frozenset(self._hf.all_special_ids) | {
            token for token, added in self._hf.added_tokens_decoder.items() if added.special
        }
        """Tokens that `decode` leaves out."""
        self.eos_token_ids: frozenset[int] = self._eos_token_ids()
        """Tokens that end a text: those of generation_config.json (of config.json where it names none), and the
        tokenizer's own."""

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Token ids, int32 [N], with the special tokens that the tokenizer puts around a text (BOS, say).

        Raises:
            InvalidRequest: not a string, or one with half a surrogate pair.
        """
        if not isinstance(text, str):
            raise InvalidRequest(f"a text to tokenize must be a string, not {type(text).__name__}")
        return self._encode(text, special_tokens=True)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        *,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> npt.NDArray[np.int32]:
        """Token ids, int32 [N], of a conversation laid out by the checkpoint's chat template, up to the reply.

        Args:
            messages: each with a "role", and a "content" in most templates.
            tools: JSON schemas or documented functions that the model may call.
            continue_final_message: leave the last message open, for the model to go on with it.
            variables: whatever else the template knows (`enable_thinking`, say); `chat_template` to use another one.

        Raises:
            InvalidRequest: no template, messages that are none, or the template refused them (with its own words).
        """
        for name in variables:
            if name in _NOT_FOR_TEMPLATES:
                raise UnknownOption(f"{name!r} is not a variable of chat templates")
        if self._hf.chat_template is None and "chat_template" not in variables:
            raise InvalidRequest(
                f"{self.folder} has no chat template, as checkpoints that were not trained to chat: add its "
                "chat_template.jinja, or lay the prompt out as text and use generate"
            )
        if tools is not None and (not isinstance(tools, Sequence) or isinstance(tools, str | bytes)):
            raise InvalidRequest(f"tools must be a sequence of descriptions, not {type(tools).__name__}")
        try:
            conversation = _conversation(messages)
        except PrebleError:
            raise
        except Exception as error:  # whatever a mapping of somebody's own raises
            raise InvalidRequest(f"messages cannot be read: {shown(error)}") from error
        variables.setdefault("add_generation_prompt", not continue_final_message)
        # Not at the top: what it needs of transformers takes longer to import than most of Preble.
        from preble.engine.chat_template import render_chat

        try:
            with self._rendering:
                text = render_chat(
                    self._hf,
                    conversation,
                    tools=None if tools is None else list(tools),
                    continue_final_message=continue_final_message,
                    **variables,
                )
        except RecursionError as error:
            raise self._rejects("it nests, or calls itself, too deeply") from error
        except Exception as error:  # a template is a program over the caller's data: it can fail in any way
            raise self._rejects(str(error)) from error
        return self._encode(text, special_tokens=False)

    def _rejects(self, why: str) -> InvalidRequest:
        return InvalidRequest(f"the chat template of {self.folder} rejects the messages: {why:.{_LONGEST_REASON}}")

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of these tokens, without special tokens, otherwise as it was."""
        ids = [int(token) for token in token_ids]
        if self._backend is not None:
            if len(ids) < LONG:
                return str(self._backend.decode(ids, skip_special_tokens=True))
            return str(self._backend.decode_batch([ids], skip_special_tokens=True)[0])
        with self._lock:
            return str(self._hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def text_state(self) -> TokenTextState | None:
        """What a worker process decodes with; `None` where it has to load the tokenizer itself."""
        if self._backend is None:
            return None
        try:
            state = str(self._backend.to_str())
        except Exception:  # parts written in Python cannot be told
            return None
        if len(state) > _LONGEST_STATE:
            return None
        return TokenTextState(state, tuple(sorted(self.eos_token_ids)), tuple(sorted(self.special_token_ids)))

    def is_quick(self, text: str) -> bool:
        """Whether `encode` takes a millisecond or so for this text, and waits for no other thread's."""
        return self._backend is not None and len(text) < LONG

    @cached_property
    def pieces(self) -> TokenPieces | None:
        """What each token adds to a text; `None` where that depends on its neighbours."""
        return None if self._backend is None else TokenPieces.of(self._backend)

    def _encode(self, text: str, special_tokens: bool) -> npt.NDArray[np.int32]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"text holds half a surrogate pair at character {error.start}") from None
        with panics_as(lambda why: InvalidRequest(f"the tokenizer of {self.folder} gives up on this text: {why}")):
            if self._backend is not None:
                if len(text) < LONG:
                    ids = self._backend.encode(text, add_special_tokens=special_tokens).ids
                else:
                    # Of the Rust functions only those for batches let go of the interpreter's lock. The fast one leaves
                    # out offsets and token texts, which take another half as long, and whose end holds the lock again.
                    ids = self._backend.encode_batch_fast([text], add_special_tokens=special_tokens)[0].ids
            else:
                with self._lock:
                    ids = self._hf.encode(text, add_special_tokens=special_tokens)
        return np.array(ids, dtype=np.int32)

    def _eos_token_ids(self) -> frozenset[int]:
        tokens = set() if self._hf.eos_token_id is None else {int(self._hf.eos_token_id)}
        for name in ("generation_config.json", "config.json"):
            path = self.folder / name
            fields = JsonFields.read(path) if path.exists() else None
            if fields is not None and fields.values.get("eos_token_id") is not None:
                return frozenset(tokens | {*fields.token_ids("eos_token_id")})
        return frozenset(tokens)


def _load(folder: Path) -> Any:
    """transformers' tokenizer; importing it takes half a second beyond torch's own import."""
    from transformers import AutoTokenizer

    _check_sizes(folder)

    def unloadable(why: object) -> CheckpointError:
        for name in ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "config.json"):
            if (folder / name).exists() and "AutoTokenizer" in (read_json(folder / name).get("auto_map") or ()):
                return UnsupportedModel(f"{folder / name} names a tokenizer in code of its own, which is not run")
        present = [name for name in ("tokenizer.json", "tokenizer.model", "vocab.json") if (folder / name).exists()]
        return CheckpointError(
            f"{folder / (present or ['tokenizer.json'])[0]} cannot be loaded: {why!s:.{_LONGEST_REASON}}"
        )

    try:
        with panics_as(unloadable):
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # the Rust side raises bare Exceptions for files that it cannot read
        raise unloadable(error) from error
    files = set(tokenizer.vocab_files_names.values())
    if files and not any((folder / file).exists() for file in files):
        # transformers would go on with an empty vocabulary.
        raise CheckpointError(f"{folder} has no tokenizer.json; copy the checkpoint's tokenizer files into it")
    return tokenizer


def _check_sizes(folder: Path) -> None:
    """Raise `CheckpointError` for files that no tokenizer needs to be as long as they are."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    for path in (*folder.iterdir(), *(folder / "chat_templates").glob("*.jinja")):
        most = _LONGEST_FILES.get(path.suffix)
        if most is not None and path.is_file() and path.stat().st_size > most:
            raise CheckpointError(f"{path} is longer than {most >> 10} KiB, which is more than such files have")


def _conversation(messages: object) -> list[dict[str, Any]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise InvalidRequest(f"messages must be a sequence of mappings, such as [{_MESSAGE}], not {shown(messages)}")
    if not messages:
        raise InvalidRequest("messages is empty: a conversation needs one message at least")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequest(
                f"messages[{number}] must be a mapping with a role, such as {_MESSAGE}, not {shown(message)}"
            )
    return [dict(message) for message in messages]
