"""The checkpoint's own tokenizer and chat template; text out of token ids, piece by piece.

``PreTrainedTokenizerFast`` reads ``tokenizer.json`` and the template without importing torch;
``AutoTokenizer`` would import it, which costs the gateway seconds and hundreds of megabytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from baton.core.errors import ConfigError, InvalidRequest

_INLINE_CHARS = 4096
"""Text up to this length is tokenized on the event loop (well under a millisecond)."""
_REPLACEMENT = "�"


class GatewayTokenizer:
    """Encode and decode. Thread-safe: only reads."""

    def __init__(self, fast: Any) -> None:
        """``fast`` is a ``PreTrainedTokenizerFast``."""
        self._fast = fast
        self._backend = fast.backend_tokenizer

    @classmethod
    def load(cls, folder: Path) -> GatewayTokenizer | None:
        """The tokenizer of a model folder; ``None`` where it has no tokenizer.json.

        Raises ConfigError for a tokenizer that cannot be read.
        """
        path = folder / "tokenizer.json"
        if not path.exists():
            return None
        from transformers import PreTrainedTokenizerFast

        try:
            return cls(PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True))
        except Exception as error:  # the library raises many kinds, down to bare Exception
            raise ConfigError(f"{path} cannot be loaded: {error}", param="model") from error

    @property
    def has_chat_template(self) -> bool:
        """Whether :meth:`render_chat` works."""
        return bool(self._fast.chat_template)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    async def encode_async(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Like :meth:`encode`; long text is tokenized beside the event loop."""
        if len(text) <= _INLINE_CHARS:
            return self.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.encode, text, add_special_tokens=add_special_tokens)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt text of a conversation, ready for the assistant's turn.

        Raises InvalidRequest where there is no template or it refuses the messages.
        """
        if not self.has_chat_template:
            raise InvalidRequest("this model has no chat template", param="messages")
        try:
            text = self._fast.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise InvalidRequest(
                f"the chat template refuses these messages: {error}", param="messages"
            ) from error
        return str(text)

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a rendered conversation; the template writes its own special tokens."""
        return await self.encode_async(self.render_chat(messages), add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ``token_ids``; incomplete characters become U+FFFD."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """How one token is shown beside its logprob; special tokens are visible."""
        return self.decode((token_id,), skip_special_tokens=False)


class Detokenizer:
    """Turns one sequence's tokens into text as they arrive.

    The pieces, joined, are the decoded text of all tokens. Text that ends in replacement characters
    may be the start of a character whose bytes are still to come, so it waits for the next
    token or for :meth:`flush`. Only a short window of tokens is decoded again each time.
    """

    _MAX_HELD = 4  # an incomplete character has at most three bytes
    _MAX_WINDOW = 32
    _KEPT_WINDOW = 8

    def __init__(self, tokenizer: GatewayTokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []
        self._num_read = 0  # tokens at the window's start that only give context
        self._num_emitted = 0  # characters of the window's text that went out

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that became certain with these tokens; may be empty."""
        # One by one, so that the pieces do not depend on how tokens were grouped on the way.
        return "".join(self._push_one(token_id) for token_id in token_ids)

    def flush(self) -> str:
        """What was held back, at the end; an incomplete character comes out as U+FFFD."""
        text = self._text(self._window)
        rest = text[self._num_emitted :]
        self._num_emitted = len(text)
        return rest

    def _push_one(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._text(self._window)
        num_open = len(text) - len(text.rstrip(_REPLACEMENT))
        certain = len(text) - min(num_open, self._MAX_HELD)
        piece = text[self._num_emitted : certain]
        self._num_emitted = max(self._num_emitted, certain)
        if num_open == 0:
            self._trim(self._num_read, held=0)
        elif len(self._window) > self._MAX_WINDOW:
            self._trim(len(self._window) - self._KEPT_WINDOW, held=len(text) - self._num_emitted)
        return piece

    def _trim(self, start: int, *, held: int) -> None:
        self._window = self._window[start:]
        self._num_read = len(self._window)
        self._num_emitted = max(0, len(self._text(self._window)) - held)

    def _text(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)
