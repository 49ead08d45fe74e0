"""What a client asked for, checked, in the form that both doors hand to the service."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeGuard

from baton.core.config import GatewayConfig
from baton.core.errors import Code, InvalidRequest, NotFound
from baton.core.policy_config import ServiceConfig
from baton.core.request import SamplingParams
from baton.core.slo import ServiceLevel
from baton.gateway.model_info import ModelInfo
from baton.gateway.openai_types import MAX_STOPS, ChatBody, CompletionBody, Message
from baton.gateway.service_levels import AskedLevel, resolve_level, tenant_of
from baton.gateway.tokenizer import GatewayTokenizer

MAX_TIMEOUT_S = 86_400.0
MAX_SALT = 256
MAX_CHOICES = 256
"""Choices of one request over all its prompts."""
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, with the room that is left for its output."""

    token_ids: tuple[int, ...]
    text: str | None
    """As the client wrote it; ``None`` where it sent token ids."""
    max_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class RequestHead:
    """What a door knows of a request beside its body."""

    request_id: str
    timeout_s: float | None = None
    """``None``: the client named none."""
    asked: AskedLevel = dataclasses.field(default_factory=AskedLevel)


class _Terms(NamedTuple):
    """How a request is served; fields of :class:`GatewayRequest`."""

    request_id: str
    timeout_s: float
    level: ServiceLevel
    cache_salt: str
    tenant: str


@dataclasses.dataclass(frozen=True, slots=True)
class GatewayRequest:
    """A checked request. Choice i belongs to prompt ``i // n``."""

    request_id: str
    endpoint: str
    """completions, chat or grpc."""
    prompts: tuple[Prompt, ...]
    n: int
    sampling: SamplingParams
    """Of every choice; ``seed`` and ``max_tokens`` are set for each choice by the service."""
    seed: int | None
    stops: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    level: ServiceLevel
    cache_salt: str
    """KV is shared only between requests with the same one; empty: with all that have none."""
    tenant: str
    """Who competes with others for the cluster; empty for nobody."""
    timeout_s: float

    @property
    def num_choices(self) -> int:
        """Submissions this request becomes."""
        return len(self.prompts) * self.n


@dataclasses.dataclass(frozen=True, slots=True)
class RequestChecker:
    """Everything that requests are checked against."""

    served_name: str
    model: ModelInfo
    tokenizer: GatewayTokenizer | None
    limits: GatewayConfig
    max_model_len: int
    service: ServiceConfig = dataclasses.field(default_factory=ServiceConfig)

    def check_model(self, name: str) -> None:
        """Raises NotFound for any name but the served one."""
        if name != self.served_name:
            raise NotFound(
                f"model {name!r} does not exist; this gateway serves {self.served_name!r}",
                param="model",
            )

    async def completion(self, body: CompletionBody, head: RequestHead) -> GatewayRequest:
        """Raises BatonError for what cannot be served."""
        self.check_model(body.model)
        # Cheap checks before any text is tokenized.
        terms = self._terms(head, body.cache_salt or "")
        self._check_count(body.n or 1, param="n")
        prompts = [
            await self._prompt(prompt, max_tokens=body.max_tokens, param="prompt")
            for prompt in _split_prompts(body.prompt)
        ]
        top = body.logprobs
        return self._request(
            body,
            prompts,
            terms,
            endpoint="completions",
            logprobs=top,
            prompt_logprobs=top if body.echo else None,
        )

    async def chat(self, body: ChatBody, head: RequestHead) -> GatewayRequest:
        """Raises BatonError for what cannot be served."""
        self.check_model(body.model)
        terms = self._terms(head, body.cache_salt or "")
        self._check_count(body.n or 1, param="n")
        if body.top_logprobs is not None and not body.logprobs:
            raise InvalidRequest("needs logprobs: true", param="top_logprobs")
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise InvalidRequest(
                "max_tokens and max_completion_tokens are the same; send one of them",
                param="max_tokens",
            )
        tokenizer = self._need_tokenizer("messages")
        for message in body.messages:
            check_utf8(message.text, param="messages")
        ids = await tokenizer.encode_chat([_template_message(m) for m in body.messages])
        asked = body.max_completion_tokens or body.max_tokens
        param = "max_tokens" if body.max_tokens else "max_completion_tokens"
        prompt = self._checked(ids, None, max_tokens=asked, param="messages", max_param=param)
        return self._request(
            body,
            [prompt],
            terms,
            endpoint="chat",
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=None,
        )

    async def single(
        self,
        prompt: str | list[int],
        sampling: Mapping[str, object],
        head: RequestHead,
        *,
        max_tokens: int | None,
        n: int,
        seed: int | None,
        stops: Sequence[str],
        include_stop: bool,
        skip_special_tokens: bool,
        cache_salt: str = "",
    ) -> GatewayRequest:
        """The gRPC door: one prompt; ``sampling`` holds fields of SamplingParams."""
        terms = self._terms(head, cache_salt)
        self._check_count(n, param="n")
        if len(stops) > MAX_STOPS:
            raise InvalidRequest(f"at most {MAX_STOPS} stop strings", param="stop")
        checked = await self._prompt(prompt, max_tokens=max_tokens, param="prompt")
        return GatewayRequest(
            **terms._asdict(),
            endpoint="grpc",
            prompts=(checked,),
            n=n,
            sampling=self._sampling(sampling),
            seed=seed,
            stops=self._stops(stops),
            include_stop=include_stop,
            skip_special_tokens=skip_special_tokens,
        )

    def _terms(self, head: RequestHead, cache_salt: str) -> _Terms:
        salt = _check_salt(cache_salt)
        level = resolve_level(self.service, head.asked)
        timeout_s = head.timeout_s
        if timeout_s is None:
            # Work that may take until its deadline is not ended before it.
            timeout_s = self.limits.default_timeout_s + (level.deadline_s or 0.0)
        return _Terms(
            head.request_id,
            min(timeout_s, MAX_TIMEOUT_S),
            level,
            salt,
            tenant_of(head.asked.api_key, salt),
        )

    def _request(
        self,
        body: CompletionBody | ChatBody,
        prompts: Sequence[Prompt],
        terms: _Terms,
        *,
        endpoint: str,
        logprobs: int | None,
        prompt_logprobs: int | None,
    ) -> GatewayRequest:
        if body.stream_options is not None and not body.stream:
            raise InvalidRequest("only for stream: true", param="stream_options")
        n = body.n or 1
        if len(prompts) * n > MAX_CHOICES:
            raise InvalidRequest(
                f"{len(prompts)} prompts with n={n}: at most {MAX_CHOICES} choices in one request",
                param="prompt",
            )
        stops = [body.stop] if isinstance(body.stop, str) else list(body.stop or ())
        sampling = {
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k if (body.top_k or 0) > 0 else None,
            "min_p": body.min_p,
            "repetition_penalty": body.repetition_penalty,
            "presence_penalty": body.presence_penalty,
            "frequency_penalty": body.frequency_penalty,
            "stop_token_ids": tuple(body.stop_token_ids or ()),
            "ignore_eos": body.ignore_eos,
            "logprobs": logprobs,
            "prompt_logprobs": prompt_logprobs,
        }
        return GatewayRequest(
            **terms._asdict(),
            endpoint=endpoint,
            prompts=tuple(prompts),
            n=n,
            sampling=self._sampling({k: v for k, v in sampling.items() if v is not None}),
            seed=None if body.seed is None else body.seed % 2**64,
            stops=self._stops(stops),
            include_stop=body.include_stop_str_in_output,
            skip_special_tokens=body.skip_special_tokens,
        )

    def _sampling(self, values: Mapping[str, object]) -> SamplingParams:
        try:
            params = SamplingParams(**values)  # type: ignore[arg-type]
        except ValueError as error:
            # The vocabulary's own check begins its message with the field's name.
            raise InvalidRequest(str(error), param=str(error).split(" ", 1)[0]) from error
        self._check_vocabulary(params.stop_token_ids, param="stop_token_ids")
        if params.ignore_eos:
            return params
        ends = dict.fromkeys((*params.stop_token_ids, *self.model.eos_token_ids))
        return dataclasses.replace(params, stop_token_ids=tuple(ends))

    def _stops(self, stops: Sequence[str]) -> tuple[str, ...]:
        if stops:
            self._need_tokenizer("stop")
        for stop in stops:
            if not stop:
                raise InvalidRequest("a stop string must not be empty", param="stop")
            check_utf8(stop, param="stop")
        return tuple(dict.fromkeys(stops))

    async def _prompt(
        self, prompt: str | list[int], *, max_tokens: int | None, param: str
    ) -> Prompt:
        if not isinstance(prompt, str):
            self._check_vocabulary(prompt, param=param)
            return self._checked(prompt, None, max_tokens=max_tokens, param=param)
        check_utf8(prompt, param=param)
        ids = await self._need_tokenizer(param).encode_async(prompt) if prompt else []
        return self._checked(ids, prompt, max_tokens=max_tokens, param=param)

    def _checked(
        self,
        token_ids: Sequence[int],
        text: str | None,
        *,
        max_tokens: int | None,
        param: str,
        max_param: str = "max_tokens",
    ) -> Prompt:
        num = len(token_ids)
        room = self.max_model_len - num
        if num == 0:
            raise InvalidRequest("the prompt must not be empty", param=param)
        if room < 1:
            raise InvalidRequest(
                f"the prompt has {num} tokens and the model's context holds {self.max_model_len}, "
                "output included: shorten it",
                param=param,
                code=Code.CONTEXT_LENGTH_EXCEEDED,
            )
        if max_tokens is not None and max_tokens > room:
            raise InvalidRequest(
                f"{max_param} is {max_tokens}, but the prompt's {num} tokens leave room for "
                f"{room} in a context of {self.max_model_len}",
                param=max_param,
                code=Code.CONTEXT_LENGTH_EXCEEDED,
            )
        default = min(self.limits.default_max_tokens, room)
        return Prompt(tuple(token_ids), text, default if max_tokens is None else max_tokens)

    def _check_count(self, n: int, *, param: str) -> None:
        if not 1 <= n <= self.limits.max_n:
            raise InvalidRequest(
                f"n must be between 1 and {self.limits.max_n}, got {n}", param=param
            )

    def _check_vocabulary(self, token_ids: Sequence[int], *, param: str) -> None:
        vocab_size = self.model.vocab_size
        bad = next((token for token in token_ids if not 0 <= token < vocab_size), None)
        if bad is not None:
            raise InvalidRequest(
                f"token id {bad} is outside the vocabulary of {vocab_size}", param=param
            )

    def _need_tokenizer(self, param: str) -> GatewayTokenizer:
        if self.tokenizer is None:
            raise InvalidRequest(
                "this model has no tokenizer: send token ids, and no text", param=param
            )
        return self.tokenizer


def is_request_id(value: str) -> bool:
    """Whether a client may call its request so."""
    return _REQUEST_ID.fullmatch(value) is not None


def check_request_id(value: str, *, param: str) -> str:
    """A client's own id. Raises InvalidRequest unless it is short, visible ASCII."""
    if not is_request_id(value):
        raise InvalidRequest(
            "must be 1 to 128 visible ASCII characters without spaces", param=param
        )
    return value


def _check_salt(salt: str) -> str:
    check_utf8(salt, param="cache_salt")
    if len(salt) > MAX_SALT:
        raise InvalidRequest(f"at most {MAX_SALT} characters", param="cache_salt")
    return salt


def check_utf8(text: str, *, param: str) -> None:
    """Raises InvalidRequest for lone surrogates, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("not valid Unicode text (lone surrogate)", param=param) from None


def _split_prompts(prompt: object) -> list[str | list[int]]:
    """The four forms of ``prompt``: text, texts, token ids, lists of token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise InvalidRequest(
            "must be a string, a list of strings, or token ids (one list or several)",
            param="prompt",
        )
    if not prompt:
        raise InvalidRequest("the prompt must not be empty", param="prompt")
    if len(prompt) > MAX_CHOICES and not isinstance(prompt[0], int):
        raise InvalidRequest(f"at most {MAX_CHOICES} prompts in one request", param="prompt")
    if _is_token_ids(prompt):
        return [prompt]
    texts = [item for item in prompt if isinstance(item, str)]
    if len(texts) == len(prompt):
        return list(texts)
    lists = [item for item in prompt if _is_token_ids(item)]
    if len(lists) == len(prompt):
        return list(lists)
    raise InvalidRequest(
        "a list must hold only strings, only integers, or only lists of integers", param="prompt"
    )


def _is_token_ids(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _template_message(message: Message) -> dict[str, str]:
    role = "system" if message.role == "developer" else message.role
    content = {"role": role, "content": message.text}
    return content if message.name is None else {**content, "name": message.name}
