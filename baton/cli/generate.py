"""``baton generate``: one engine without a cluster, for benchmarks and bug reports.

What a request may ask for, and how its text is made, is the gateway's code, so that the same
parameters give the same tokens and text here and there.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from baton.cli.settings import parse_settings
from baton.core.config import EngineConfig, GatewayConfig, ServeConfig
from baton.core.errors import ConfigError, InvalidRequest
from baton.core.request import TokenLogprobs
from baton.engine.checkpoint import open_checkpoint
from baton.engine.events import TokensReady
from baton.engine.offline import OfflineEngine, OfflineRequest, OfflineResult, fit_to_batch
from baton.engine.runners import Progress as LoadProgress
from baton.gateway.journal import Delta
from baton.gateway.model_info import load_model_info
from baton.gateway.requests import GatewayRequest, RequestChecker, RequestHead, check_utf8
from baton.gateway.service import ChoiceText
from baton.gateway.tokenizer import GatewayTokenizer

_MIN_LOGPROB = -9999.0
"""JSON has no infinity; the gateway writes the same."""


@dataclasses.dataclass(frozen=True, slots=True)
class GenerateFlags:
    """The flags as they were typed; ``None`` where one was not given."""

    model: str | None
    prompts: Sequence[str]
    prompt_token_ids: str | None
    """A file name, or ``-`` for standard input."""
    max_tokens: int | None
    chat: bool
    sampling: dict[str, Any]
    """Fields of SamplingParams but ``max_tokens`` and ``seed``."""
    seed: int | None
    engine: dict[str, Any]
    """Settings of ``EngineConfig``."""
    as_json: bool


def generate(flags: GenerateFlags) -> None:
    """Run the prompts and print what became of them.

    Raises ConfigError for anything that the user must change, before the model is loaded where
    that is possible. A SystemExit on the way (``main`` makes one of a signal) ends the ranks.
    """
    with _answers_only() as out:
        config = _settings(flags)
        checkpoint = open_checkpoint(config.model)
        checker = _checker(flags, config)
        try:
            asked = asyncio.run(_check(flags, checker))
        except InvalidRequest as error:
            raise ConfigError(error.message, param=error.param) from error
        seed = secrets.randbits(64) if flags.seed is None else flags.seed % 2**64
        batch = [_offline(request, seed) for request in asked]
        engine_config = fit_to_batch(
            config.engine, batch, max_num_blocks=flags.engine.get("num_blocks")
        )
        printer = _Printer(asked, checker.tokenizer, out, streams=not flags.as_json)
        with _loading(checkpoint.path.resolve().name) as progress:
            engine = OfflineEngine(checkpoint, engine_config, progress=progress)
        with _closing(engine):
            result = engine.generate(batch, on_tokens=printer.on_tokens)
        if flags.as_json:
            answer = _as_json(config, batch, result, printer.texts, engine.load_s)
            print(json.dumps(answer, allow_nan=False), file=out)
        else:
            printer.finish(result)
            print(_timing_line(batch, result, engine.load_s), file=sys.stderr)


@contextlib.contextmanager
def _closing(engine: OfflineEngine) -> Iterator[None]:
    """Closes the engine; should a step go on after a signal, ends the process without it."""
    try:
        with engine:
            yield
    except SystemExit as stop:
        if engine.is_stuck:
            os._exit(stop.code if isinstance(stop.code, int) else 1)
        raise


# What is asked for.


def _settings(flags: GenerateFlags) -> ServeConfig:
    if not flags.model:
        raise ConfigError("model is missing: give --model DIR", param="model")
    if bool(flags.prompts) == (flags.prompt_token_ids is not None):
        both = "not both" if flags.prompts else "one of them"
        raise ConfigError(f"give --prompt TEXT or --prompt-token-ids FILE, {both}", param="prompt")
    if flags.chat and not flags.prompts:
        raise ConfigError("--chat needs --prompt: token ids are taken as they are", param="chat")
    if flags.seed is not None and not -(2**63) <= flags.seed < 2**64:
        raise ConfigError(f"seed must have at most 64 bits, got {flags.seed}", param="seed")
    given = {name: value for name, value in flags.engine.items() if value is not None}
    # The batch says later how many sequences run at once.
    engine = {"max_num_seqs": 1, **given}
    return parse_settings({"model": flags.model, "engine": engine}, source="flags")


def _checker(flags: GenerateFlags, config: ServeConfig) -> RequestChecker:
    engine = config.engine
    room = None if flags.engine.get("num_blocks") is None else engine.kv_blocks * engine.block_size
    info = load_model_info(config.model, max_model_len=room)
    tokenizer = GatewayTokenizer.load(info.path)
    if tokenizer is None and flags.prompts:
        raise ConfigError(
            f"{info.path} has no tokenizer.json: give --prompt-token-ids instead of --prompt",
            param="prompt",
        )
    return RequestChecker(
        served_name=info.path.name,
        model=info,
        tokenizer=tokenizer,
        limits=GatewayConfig(),
        max_model_len=info.max_model_len,
    )


async def _check(flags: GenerateFlags, checker: RequestChecker) -> list[GatewayRequest]:
    """Every prompt as the gateway would take it. Raises InvalidRequest, ConfigError."""
    prompts: Sequence[str | list[int]]
    if flags.prompt_token_ids is not None:
        prompts = _read_prompts(flags.prompt_token_ids)
    elif flags.chat:
        prompts = [await _chat(checker, text) for text in flags.prompts]
    else:
        prompts = flags.prompts
    sampling = {name: value for name, value in flags.sampling.items() if value is not None}
    if sampling.get("top_k") in (0, -1):
        del sampling["top_k"]  # all tokens, as in the API
    if flags.max_tokens is not None:
        sampling["max_tokens"] = flags.max_tokens
    asked: list[GatewayRequest] = []
    for place, prompt in enumerate(prompts):
        try:
            asked.append(await _single(checker, prompt, sampling, flags.max_tokens, place))
        except InvalidRequest as error:
            if error.param != "prompt" or len(prompts) == 1:
                raise
            raise ConfigError(f"prompt {place}: {error.message}", param="prompt") from error
    return asked


async def _chat(checker: RequestChecker, text: str) -> list[int]:
    check_utf8(text, param="prompt")
    assert checker.tokenizer is not None, "checked with the flags"
    return await checker.tokenizer.encode_chat([{"role": "user", "content": text}])


async def _single(
    checker: RequestChecker,
    prompt: str | list[int],
    sampling: dict[str, Any],
    max_tokens: int | None,
    place: int,
) -> GatewayRequest:
    return await checker.single(
        prompt,
        sampling,
        RequestHead(f"prompt-{place}"),
        max_tokens=max_tokens,
        n=1,
        seed=None,
        stops=(),
        include_stop=False,
        skip_special_tokens=True,
    )


def _read_prompts(name: str) -> list[list[int]]:
    """The prompts of a JSON file: a list of token ids, or a list of such lists."""
    shown = "standard input" if name == "-" else name
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
        value = json.loads(text)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise _bad_file(shown, f"cannot be read: {reason}") from error
    except (ValueError, RecursionError) as error:
        raise _bad_file(shown, f"is not valid JSON: {error}") from error
    if value == [] or (isinstance(value, list) and [] in value):
        raise _bad_file(shown, "holds an empty list: a prompt needs at least one token")
    prompts = value if isinstance(value, list) and isinstance(value[0], list) else [value]
    for prompt in prompts:
        if not isinstance(prompt, list) or any(type(token) is not int for token in prompt):
            raise _bad_file(
                shown, "must hold a JSON list of token ids, or a list of such lists for a batch"
            )
    return prompts


def _bad_file(shown: str, problem: str) -> ConfigError:
    return ConfigError(f"--prompt-token-ids {shown} {problem}", param="prompt_token_ids")


def _offline(request: GatewayRequest, seed: int) -> OfflineRequest:
    (prompt,) = request.prompts
    sampling = dataclasses.replace(request.sampling, seed=seed, max_tokens=prompt.max_tokens)
    return OfflineRequest(prompt.token_ids, sampling)


# What is shown.


@contextlib.contextmanager
def _answers_only() -> Iterator[TextIO]:
    """Standard output as a file of our own.

    Until the end, what anybody else writes there, in this process or in a rank's, goes to standard
    error: libraries print at will, and a program reads our output.
    """
    sys.stdout.flush()
    with open(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        try:
            yield out
        finally:
            sys.stdout.flush()
            os.dup2(out.fileno(), 1)


@contextlib.contextmanager
def _loading(name: str) -> Iterator[LoadProgress]:
    """Shows on standard error how far loading is: a bar on a terminal, one line elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        print(f"baton: loading {name}", file=sys.stderr, flush=True)
        yield lambda done, total: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"loading {name}", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Printer:
    """Makes text of tokens as they come, and streams it where that is wanted."""

    def __init__(
        self,
        asked: Sequence[GatewayRequest],
        tokenizer: GatewayTokenizer | None,
        out: TextIO,
        *,
        streams: bool,
    ) -> None:
        self._choices = [ChoiceText(request, tokenizer) for request in asked]
        self._pieces: list[list[str]] = [[] for _ in asked]
        self._has_text = tokenizer is not None
        self._out = out
        self._streams = streams and len(asked) == 1 and self._has_text

    @property
    def texts(self) -> list[str] | None:
        """So far; ``None`` without a tokenizer."""
        return ["".join(pieces) for pieces in self._pieces] if self._has_text else None

    def on_tokens(self, place: int, event: TokensReady) -> None:
        delta = Delta(
            event.index,
            event.token_ids,
            finish_reason=event.finish_reason,
            stop_token_id=event.stop_token_id,
        )
        piece = self._choices[place].push(delta)
        self._pieces[place].append(piece)
        if self._streams:
            self._out.write(piece)
            self._out.flush()

    def finish(self, result: OfflineResult) -> None:
        """Whatever was not streamed: each answer under its number, or token ids as JSON."""
        texts = self.texts
        if self._streams:
            print(file=self._out)
        elif texts is None:
            for output in result.outputs:
                print(json.dumps(output.token_ids), file=self._out)
        else:
            for place, text in enumerate(texts):
                print(f"--- prompt {place}\n{text}", file=self._out)


def _as_json(
    config: ServeConfig,
    batch: Sequence[OfflineRequest],
    result: OfflineResult,
    texts: list[str] | None,
    load_s: float,
) -> dict[str, Any]:
    """One object; its values are plain for one prompt and lists, in order, for several."""

    def shaped(values: list[Any]) -> Any:
        return values[0] if len(values) == 1 else values

    engine: EngineConfig = config.engine
    answer = {
        "model": config.model,
        "dtype": engine.dtype,
        "seed": batch[0].sampling.seed,
        "token_ids": shaped([output.token_ids for output in result.outputs]),
        "text": None if texts is None else shaped(texts),
        "finish_reason": shaped([output.finish_reason for output in result.outputs]),
        "num_prompt_tokens": shaped([len(request.prompt_ids) for request in batch]),
    }
    if batch[0].sampling.logprobs is not None:
        answer["logprobs"] = shaped(
            [[_logprobs(item) for item in output.logprobs] for output in result.outputs]
        )
    answer["timings"] = {"load_s": load_s, **dataclasses.asdict(result.timings)}
    return answer


def _logprobs(item: TokenLogprobs) -> dict[str, Any]:
    return {
        "token_id": item.token_id,
        "logprob": max(item.logprob, _MIN_LOGPROB),
        "rank": item.rank,
        "top": [[token_id, max(logprob, _MIN_LOGPROB)] for token_id, logprob in item.top],
    }


def _timing_line(batch: Sequence[OfflineRequest], result: OfflineResult, load_s: float) -> str:
    timings = result.timings
    num_prompt = sum(len(request.prompt_ids) for request in batch)
    num_output = sum(len(output.token_ids) for output in result.outputs)
    speed = timings.decode_tokens_per_s
    decode = "none" if speed is None else f"{speed:.1f} tokens/s"
    return (
        f"baton: load {load_s:.2f} s; prefill {timings.prefill_s:.3f} s ({num_prompt} tokens); "
        f"decode {decode}; {num_output} tokens in {timings.total_s:.3f} s, "
        f"{timings.num_steps} steps, host {timings.host_s_per_step * 1e6:.0f} us per step"
    )
