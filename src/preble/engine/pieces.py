"""What each token adds to a text, as bytes."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_LOCAL_DECODERS = {"ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TokenPieces(dict[int, bytes]):
    """Token id -> the bytes it adds to a text that has begun. Filled as tokens are met; shared by all requests.

    A piece is learned from the tokenizer's own decoder, as the difference that the token makes behind an ordinary one.
    Only where that shows a replacement character does the token hold a part of a character; its bytes are then read
    from its name.
    """

    def __init__(self, backend: Backend, anchor: int, decoders: set[str]) -> None:
        super().__init__()
        self._backend = backend
        self._anchor = anchor
        self._anchor_length = len(backend.decode([anchor]))
        self._byte_level = "ByteLevel" in decoders
        self._byte_fallback = "ByteFallback" in decoders
        self._hidden = {token for token, added in backend.get_added_tokens_decoder().items() if added.special}

    @classmethod
    def of(cls, backend: Backend) -> TokenPieces | None:
        """The pieces of a tokenizer, or `None` if its decoder is not known to treat every token by itself."""
        decoders = _decoders(backend)
        anchor = _anchor(backend)
        return None if decoders is None or anchor is None else cls(backend, anchor, decoders)

    def __missing__(self, token: int) -> bytes:
        text = self._backend.decode([self._anchor, token], skip_special_tokens=True)[self._anchor_length :]
        piece = self[token] = self._bytes(token, text)
        return piece

    def opening(self, token: int) -> bytes | None:
        """The bytes of a token that begins a text: decoders may drop its leading space. `None` if it is not shown."""
        if token in self._hidden or self._backend.id_to_token(token) is None:
            return None
        return self._bytes(token, self._backend.decode([token]))

    def _bytes(self, token: int, text: str) -> bytes:
        if "\ufffd" not in text:
            return text.encode()
        name = self._backend.id_to_token(token) or ""
        if self._byte_level:
            return bytes(map(_BYTE_OF.__getitem__, name)) if _BYTE_OF.keys() >= set(name) else name.encode()
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(name)):
            return bytes([int(match[1], 16)])
        return text.encode()


def _byte_characters() -> dict[str, int]:
    """Character -> byte of byte-level BPE, as GPT-2 defined it: printable bytes stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_characters()


def _decoders(backend: Backend) -> set[str] | None:
    """The kinds of decoder in use, or `None` if one of them may look across tokens."""
    if backend.decoder is None:
        return set()
    state: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    kinds: set[str] = set()
    joined = False
    for decoder in state["decoders"] if state["type"] == "Sequence" else [state]:
        kind = decoder["type"]
        if kind not in _LOCAL_DECODERS or (joined and kind != "Strip"):
            return None
        if kind == "Strip" and (decoder["start"] > 1 or decoder["stop"]):
            return None
        joined = joined or kind in ("ByteLevel", "Fuse")
        kinds.add(kind)
    return kinds


def _anchor(backend: Backend) -> int | None:
    """A token that decodes to ordinary letters, so that nothing is stripped behind it."""
    for token in range(backend.get_vocab_size()):
        text = backend.decode([token], skip_special_tokens=True)
        if text.isascii() and text.isalpha():
            return token
    return None
