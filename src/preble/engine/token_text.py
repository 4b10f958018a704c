"""What an engine needs of a tokenizer: from tokens to text. Small enough to be sent to a worker process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from preble.engine.pieces import TokenPieces

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


class TokenText(Protocol):
    """A checkpoint's tokens as text."""

    eos_token_ids: frozenset[int]
    """Tokens that end a text."""
    special_token_ids: frozenset[int]
    """Tokens that `decode` leaves out."""

    @property
    def pieces(self) -> TokenPieces | None:
        """What each token adds to a text; `None` where that depends on its neighbours."""
        ...

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of these tokens, without special tokens, otherwise as it was."""
        ...


@dataclass(frozen=True, slots=True)
class TokenTextState:
    """From which `RestoredTokenText` is made."""

    backend: str
    """The Rust tokenizer as JSON."""
    eos_token_ids: tuple[int, ...]
    special_token_ids: tuple[int, ...]


class RestoredTokenText:
    """As the tokenizer it was taken from decodes. Needs no transformers, whose import takes seconds and 400 MB.

    Args:
        state: what `Tokenizer.text_state` gave.
    """

    def __init__(self, state: TokenTextState) -> None:
        from tokenizers import Tokenizer

        self._backend: Backend = Tokenizer.from_str(state.backend)
        self.eos_token_ids = frozenset(state.eos_token_ids)
        self.special_token_ids = frozenset(state.special_token_ids)
        self.pieces = TokenPieces.of(self._backend)

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of these tokens, without special tokens, otherwise as it was."""
        return str(self._backend.decode([int(token) for token in token_ids], skip_special_tokens=True))
