"""The bodies of ``/v1/completions`` and ``/v1/chat/completions``, strictly.

Unknown fields are refused by name instead of ignored. Fields that OpenAI's clients know and Baton
does not offer pass only with a value that asks for nothing; ``check_fields`` drops them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from baton.core.errors import Code, InvalidRequest
from baton.core.request import MAX_LOGPROBS

MAX_STOPS = 4

_NOTHING: dict[str, tuple[object, ...]] = {
    "best_of": (None,),
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "parallel_tool_calls": (None, True, False),
    "functions": (None, []),
    "function_call": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "web_search_options": (None,),
    "verbosity": (None,),
    "add_generation_prompt": (None, True),
    "add_special_tokens": (None,),
}
"""Values that ask for nothing, per field that exists elsewhere."""

_METADATA = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Accepted and unused: they only describe the caller."""

StopString = Annotated[str, StringConstraints(min_length=1)]
TokenId = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """What a stream carries besides tokens."""

    include_usage: bool = False


class _Common(_Strict):
    model: str
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    # Beyond OpenAI, as vLLM names them.
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    return_token_ids: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    request_id: str | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None
    # Baton's own.
    service_class: Annotated[str, Field(min_length=1)] | None = None
    ttft_s: Annotated[float, Field(gt=0)] | None = None
    tpot_s: Annotated[float, Field(gt=0)] | None = None
    deadline_s: Annotated[float, Field(gt=0)] | None = None


class CompletionBody(_Common):
    """``POST /v1/completions``. ``prompt`` is checked by ``requests.completion_request``."""

    prompt: Any
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


class TextPart(_Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """The content, joined."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatBody(_Common):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


Body = TypeVar("Body", CompletionBody, ChatBody)


def parse_body(model: type[Body], raw: object) -> Body:
    """Validate a decoded JSON body. Raises InvalidRequest that names the first wrong field."""
    if not isinstance(raw, dict):
        raise InvalidRequest("the body must be a JSON object")
    try:
        return model.model_validate(_check_fields(raw, known=set(model.model_fields)))
    except ValidationError as error:
        raise _first_error(error) from None


def _check_fields(raw: dict[str, object], *, known: set[str]) -> dict[str, object]:
    kept: dict[str, object] = {}
    for name, value in raw.items():
        if name in known:
            kept[name] = value
        elif name in _METADATA or (name == "best_of" and value == (raw.get("n") or 1)):
            continue
        elif not any(_same(value, nothing) for nothing in _NOTHING.get(name, ())):
            shown = "" if name in _NOTHING else " (there is no such parameter)"
            raise InvalidRequest(
                f"{name} is not supported{shown}", param=name, code=Code.UNSUPPORTED_PARAMETER
            )
    return kept


def _same(value: object, nothing: object) -> bool:
    return type(value) is type(nothing) and value == nothing


def _first_error(error: ValidationError) -> InvalidRequest:
    # A union reports one error per branch; the deepest says most about what was meant.
    first_field = error.errors()[0]["loc"][:1]
    details = [item for item in error.errors() if item["loc"][:1] == first_field]
    detail = max(details, key=lambda item: len(item["loc"]))
    parts = [str(part) for part in detail["loc"] if not _is_branch(part)]
    param = ".".join(parts)
    if detail["type"] == "extra_forbidden":
        return InvalidRequest(
            f"{param} is not supported (there is no such parameter)",
            param=param,
            code=Code.UNSUPPORTED_PARAMETER,
        )
    text = detail["msg"][:1].lower() + detail["msg"][1:]
    return InvalidRequest(f"{param}: {text}", param=param or None)


def _is_branch(part: int | str) -> bool:
    """Whether a step of a location names a branch of a union and not a field."""
    return (isinstance(part, str) and not part.isidentifier()) or part in ("str", "constrained-str")
