"""From token ids to text, as they come."""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from preble.engine.pieces import TokenPieces
    from preble.engine.token_text import TokenText

_CONTEXT = 8
"""Tokens decoded before the new ones where a token's text depends on its neighbours."""

_LONGEST_CHARACTER = 8
"""Tokens after which text that ends in replacement characters will not become a character any more."""


class Detokenizer:
    """The text of one request: `append` its tokens, and get the text they add, never half a character.

    The pieces, with what `flush` gives, join to `tokenizer.decode` of all tokens. A character whose last bytes never
    came ends the text as U+FFFD, and only `flush` shows it. There is one exception: tokenizers with a byte fallback
    (Llama 2) decode a run of byte tokens to nothing but U+FFFD when any part of it is not UTF-8. Characters that were
    complete before that part have been delivered by then, and stay.

    Args:
        tokenizer: of the checkpoint.
    """

    __slots__ = ("_text",)

    def __init__(self, tokenizer: TokenText) -> None:
        self._text = _Neighbours(tokenizer) if tokenizer.pieces is None else _Bytes(tokenizer.pieces)

    def append(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens add; special tokens add none."""
        return self._text.append(token_ids)

    def flush(self) -> str:
        """The rest, when no more tokens come: U+FFFD for an incomplete character, else nothing."""
        return self._text.flush()


class _Bytes:
    """Joins the tokens' bytes and decodes those that make whole characters."""

    __slots__ = ("_begun", "_pieces", "_rest")

    def __init__(self, pieces: TokenPieces) -> None:
        self._pieces = pieces
        self._begun = False
        self._rest = b""

    def append(self, token_ids: Iterable[int]) -> str:
        tokens = iter(token_ids)
        while not self._begun and (token := next(tokens, None)) is not None:
            opening = self._pieces.opening(token)
            if opening is not None:
                self._rest, self._begun = opening, True
        data = b"".join([self._rest, *map(self._pieces.__getitem__, tokens)])
        text, used = utf_8_decode(data, "replace", False)
        self._rest = data[used:]
        return text

    def flush(self) -> str:
        text, self._rest = self._rest.decode(errors="replace"), b""
        return text


class _Neighbours:
    """Decodes a window of tokens again, for tokenizers that put tokens together in ways of their own."""

    __slots__ = ("_context", "_pending", "_tokenizer")

    def __init__(self, tokenizer: TokenText) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []

    def append(self, token_ids: Iterable[int]) -> str:
        return "".join(self._next(token) for token in token_ids if token not in self._tokenizer.special_token_ids)

    def flush(self) -> str:
        decode = self._tokenizer.decode
        text = decode(self._context + self._pending)[len(decode(self._context)) :]
        self._context, self._pending = (self._context + self._pending)[-_CONTEXT:], []
        return text

    def _next(self, token: int) -> str:
        self._pending.append(token)
        complete = not self._tokenizer.decode(self._context + self._pending).endswith("\ufffd")
        return self.flush() if complete or len(self._pending) == _LONGEST_CHARACTER else ""
