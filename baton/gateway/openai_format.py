"""OpenAI-shaped answers out of deltas: chunks of a stream, or one body at the end."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from baton.core.request import FinishReason, TokenLogprobs
from baton.gateway.requests import GatewayRequest, Prompt
from baton.gateway.service import ChoiceDelta, Usage
from baton.gateway.tokenizer import GatewayTokenizer

_MIN_LOGPROB = -9999.0
"""JSON has no infinity."""


@dataclasses.dataclass(frozen=True, slots=True)
class Presentation:
    """How the client wants to see it."""

    model: str
    echo: bool = False
    logprobs: bool = False
    return_token_ids: bool = False
    include_usage: bool = False


class AnswerFormat:
    """What both endpoints share. One per request; remembers where each choice stands."""

    object_name = ""
    chunk_object_name = ""
    id_prefix = ""

    def __init__(
        self, request: GatewayRequest, shown: Presentation, tokenizer: GatewayTokenizer | None
    ) -> None:
        self.request = request
        self.shown = shown
        self._tokenizer = tokenizer
        self._created = int(time.time())
        self._started: set[int] = set()
        self._usages: dict[int, Usage] = {}

    def chunk(self, delta: ChoiceDelta) -> dict[str, Any]:
        """One event of the stream."""
        first = delta.choice not in self._started
        self._started.add(delta.choice)
        if delta.usage is not None:
            self._usages[delta.choice] = delta.usage
        choice = {"index": delta.choice, **self._chunk_choice(delta, first=first)}
        choice["finish_reason"] = delta.finish_reason
        choice["stop_reason"] = delta.stop_reason
        if self.shown.return_token_ids:
            prompt_ids = list(self._prompt(delta.choice).token_ids)
            choice["prompt_token_ids"] = prompt_ids if first else None
            choice["token_ids"] = list(delta.token_ids)
        body = self._head(self.chunk_object_name, [choice])
        if self.shown.include_usage:
            body["usage"] = None
        return body

    def usage_chunk(self) -> dict[str, Any]:
        """The last event of a stream with usage."""
        return {**self._head(self.chunk_object_name, []), "usage": self._usage()}

    def body(self, deltas: Sequence[ChoiceDelta]) -> dict[str, Any]:
        """The whole answer, from all deltas of all choices."""
        choices = []
        for number in range(self.request.num_choices):
            merged = merge([delta for delta in deltas if delta.choice == number])
            if merged.usage is not None:
                self._usages[number] = merged.usage
            choice = {"index": number, **self._whole_choice(merged)}
            choice["finish_reason"] = merged.finish_reason
            choice["stop_reason"] = merged.stop_reason
            if self.shown.return_token_ids:
                choice["prompt_token_ids"] = list(self._prompt(number).token_ids)
                choice["token_ids"] = list(merged.token_ids)
            choices.append(choice)
        return {**self._head(self.object_name, choices), "usage": self._usage()}

    def _chunk_choice(self, delta: ChoiceDelta, *, first: bool) -> dict[str, Any]:
        raise NotImplementedError

    def _whole_choice(self, merged: ChoiceDelta) -> dict[str, Any]:
        raise NotImplementedError

    def _head(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{self.id_prefix}{self.request.request_id}",
            "object": name,
            "created": self._created,
            "model": self.shown.model,
            "choices": choices,
        }

    def _usage(self) -> dict[str, Any]:
        prompt = sum(len(item.token_ids) for item in self.request.prompts)
        completion = sum(usage.completion_tokens for usage in self._usages.values())
        cached = max((usage.cached_tokens for usage in self._usages.values()), default=0)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _prompt(self, choice: int) -> Prompt:
        return self.request.prompts[choice // self.request.n]

    def _token_text(self, token_id: int) -> str:
        if self._tokenizer is None:
            return f"token_id:{token_id}"
        return self._tokenizer.token_text(token_id)


class CompletionFormat(AnswerFormat):
    """``/v1/completions``."""

    object_name = "text_completion"
    chunk_object_name = "text_completion"
    id_prefix = "cmpl-"

    def __init__(
        self, request: GatewayRequest, shown: Presentation, tokenizer: GatewayTokenizer | None
    ) -> None:
        super().__init__(request, shown, tokenizer)
        self._offsets: dict[int, int] = {}

    def _chunk_choice(self, delta: ChoiceDelta, *, first: bool) -> dict[str, Any]:
        echo = self.shown.echo and first
        text = self._prompt_text(delta.choice) + delta.text if echo else delta.text
        return {"text": text, "logprobs": self._logprobs(delta, echo=echo)}

    def _whole_choice(self, merged: ChoiceDelta) -> dict[str, Any]:
        return self._chunk_choice(merged, first=True)

    def _prompt_text(self, choice: int) -> str:
        prompt = self._prompt(choice)
        if prompt.text is not None:
            return prompt.text
        return "" if self._tokenizer is None else self._tokenizer.decode(prompt.token_ids)

    def _logprobs(self, delta: ChoiceDelta, *, echo: bool) -> dict[str, Any] | None:
        if not self.shown.logprobs:
            return None
        rows: list[tuple[int, TokenLogprobs | None]] = []
        if echo:
            ids = self._prompt(delta.choice).token_ids
            known: list[TokenLogprobs | None] = [None, *delta.prompt_logprobs]
            known += [None] * (len(ids) - len(known))
            rows += zip(ids, known, strict=False)
        rows += [(item.token_id, item) for item in delta.logprobs]
        offset = self._offsets.get(delta.choice, 0)
        texts, offsets = [], []
        for token_id, _ in rows:
            texts.append(self._token_text(token_id))
            offsets.append(offset)
            offset += len(texts[-1])
        self._offsets[delta.choice] = offset
        return {
            "tokens": texts,
            "token_logprobs": [None if item is None else _finite(item.logprob) for _, item in rows],
            "top_logprobs": [None if item is None else self._top(item) for _, item in rows],
            "text_offset": offsets,
        }

    def _top(self, item: TokenLogprobs) -> dict[str, float]:
        top = {self._token_text(item.token_id): _finite(item.logprob)}
        for token_id, logprob in item.top:
            # Different tokens may look alike (parts of characters): the likeliest one is shown.
            top.setdefault(self._token_text(token_id), _finite(logprob))
        return top


class ChatFormat(AnswerFormat):
    """``/v1/chat/completions``."""

    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def _chunk_choice(self, delta: ChoiceDelta, *, first: bool) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant"} if first else {}
        if delta.text or first:
            message["content"] = delta.text
        return {"delta": message, "logprobs": self._logprobs(delta)}

    def _whole_choice(self, merged: ChoiceDelta) -> dict[str, Any]:
        message = {"role": "assistant", "content": merged.text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(merged)}

    def _logprobs(self, delta: ChoiceDelta) -> dict[str, Any] | None:
        if not self.shown.logprobs:
            return None
        content = [
            {
                **self._shown(item.token_id, item.logprob),
                "top_logprobs": [self._shown(*entry) for entry in item.top],
            }
            for item in delta.logprobs
        ]
        return {"content": content, "refusal": None}

    def _shown(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(token_id)
        # Part of a character: its bytes cannot be told from the replacement text.
        known = None if "�" in text else list(text.encode())
        return {"token": text, "logprob": _finite(logprob), "bytes": known}


def merge(deltas: Sequence[ChoiceDelta]) -> ChoiceDelta:
    """All deltas of one choice as one. ``deltas`` must not be empty."""
    last = deltas[-1]
    return ChoiceDelta(
        choice=last.choice,
        index=deltas[0].index,
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        text="".join(delta.text for delta in deltas),
        logprobs=tuple(item for delta in deltas for item in delta.logprobs),
        prompt_logprobs=next((d.prompt_logprobs for d in deltas if d.prompt_logprobs), ()),
        finish_reason=FinishReason(last.finish_reason) if last.finish_reason else None,
        stop_reason=last.stop_reason,
        usage=last.usage,
    )


def _finite(logprob: float) -> float:
    return max(logprob, _MIN_LOGPROB)
