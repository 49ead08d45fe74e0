"""What the clients send and give back, as typed values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from baton.core.request import TokenLogprobs
from protos.baton.v1 import inference_pb2


@dataclasses.dataclass(frozen=True, slots=True)
class GenerateChunk:
    """What is new for one choice."""

    request_id: str
    choice: int
    index: int
    """Of ``token_ids[0]`` among the choice's output tokens."""
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    """``stop`` or ``length``, with the choice's last chunk."""
    stop_reason: str | None = None
    prompt_tokens: int | None = None
    """Token counts come with the choice's last chunk."""
    completion_tokens: int | None = None
    cached_tokens: int | None = None


def call_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """What a call carries beside its message: the key chooses a service class."""
    return () if api_key is None else (("authorization", f"Bearer {api_key}"),)


def generate_request(
    prompt: str | Sequence[int],
    *,
    request_id: str = "",
    model: str = "",
    priority: int | None = None,
    cache_salt: str = "",
    service_class: str = "",
    ttft_s: float | None = None,
    tpot_s: float | None = None,
    deadline_s: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    seed: int | None = None,
    max_tokens: int | None = None,
    stop: Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    n: int | None = None,
    include_stop_str_in_output: bool = False,
    skip_special_tokens: bool | None = None,
) -> inference_pb2.GenerateRequest:
    """The message for ``Generate``; what is None is left to the gateway's defaults."""
    message = inference_pb2.GenerateRequest(
        request_id=request_id,
        model=model,
        priority=priority,
        cache_salt=cache_salt,
        service_class=service_class,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        deadline_s=deadline_s,
        sampling=inference_pb2.SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            seed=seed,
            max_tokens=max_tokens,
            stop=stop,
            stop_token_ids=stop_token_ids,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            n=n,
            include_stop_str_in_output=include_stop_str_in_output,
            skip_special_tokens=skip_special_tokens,
        ),
    )
    if isinstance(prompt, str):
        message.text = prompt
    else:
        message.token_ids.ids.extend(prompt)
        message.token_ids.SetInParent()
    return message


def chunk_from_response(response: inference_pb2.GenerateResponse) -> GenerateChunk:
    """From the wire."""
    usage = response.usage if response.HasField("usage") else None
    return GenerateChunk(
        request_id=response.request_id,
        choice=response.choice,
        index=response.index,
        token_ids=tuple(response.token_ids),
        text=response.text,
        logprobs=tuple(_logprobs(item) for item in response.logprobs),
        prompt_logprobs=tuple(_logprobs(item) for item in response.prompt_logprobs),
        finish_reason=response.finish_reason or None,
        stop_reason=response.stop_reason or None,
        prompt_tokens=None if usage is None else usage.prompt_tokens,
        completion_tokens=None if usage is None else usage.completion_tokens,
        cached_tokens=None if usage is None else usage.cached_tokens,
    )


def _logprobs(item: inference_pb2.TokenLogprob) -> TokenLogprobs:
    return TokenLogprobs(
        token_id=item.token_id,
        logprob=item.logprob,
        rank=item.rank,
        top=tuple((top.token_id, top.logprob) for top in item.top),
    )
