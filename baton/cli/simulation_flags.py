"""Flags of ``baton simulate``: read, checked, and made into what is to be run."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any, cast, get_args

from baton.core.cost_model import Profile
from baton.core.errors import ConfigError
from baton.core.slo import Slo
from baton.engine.profile_file import load_profile
from baton.simulator.pool import PoolSettings
from baton.simulator.runs import STATIC_BEST, Scenario
from baton.simulator.workload import (
    Arrivals,
    Trace,
    TraceFormat,
    follow,
    mean_rate,
    read_trace,
)
from controller.policies import POLICIES, make_policy

PLOT_FORMATS = (".png", ".svg")


@dataclasses.dataclass(frozen=True, slots=True)
class SimulateFlags:
    """As they were written."""

    traces: str
    format: str | None
    profile: Path
    instances: int | None
    prefill: int | None
    decode: int | None
    policies: str
    slo: str
    arrivals: str
    rate_scale: str | None
    find_goodput: float | None
    host_tokens: int | None
    freeze_roles: bool
    seed: int
    jobs: int | None
    as_json: bool
    plot: Path | None


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What is to be run; the same for all policies."""

    trace: Trace
    trace_names: tuple[str, ...]
    format: TraceFormat | None
    profile: Profile
    num_prefill: int
    num_decode: int
    policies: tuple[str, ...]
    slo: Slo
    arrivals: Arrivals
    scales: tuple[float, ...]
    """Rates to run, by the trace's own."""
    target: float | None
    """Attainment that the goodput is searched for with; ``None``: it is not searched for."""
    pool: PoolSettings | None
    freeze_roles: bool
    seed: int
    jobs: int

    @property
    def own_rate(self) -> float:
        """Of the trace, requests per second."""
        return mean_rate(self.trace)

    def scenario(self, policy: str) -> Scenario:
        """One policy on the cluster that is asked about."""
        return Scenario(
            self.profile,
            "least-loaded" if policy == STATIC_BEST else policy,
            self.num_prefill,
            self.num_decode,
            self.slo,
            freeze_roles=self.freeze_roles,
            pool=self.pool,
        )

    def guess(self) -> float:
        """A rate from which to search for the goodput: what the computation alone would allow."""
        cost, most = self.profile.cost, self.profile.max_num_batched_tokens
        seconds = 0.0
        for request in self.trace:
            context = request.num_prompt_tokens + request.num_output_tokens / 2
            seconds += cost.prefill_s(request.num_prompt_tokens, chunk=most)
            token_s = cost.decode_s(_GUESSED_BATCH, _GUESSED_BATCH * context) / _GUESSED_BATCH
            seconds += (request.num_output_tokens - 1) * token_s
        num = self.num_prefill + self.num_decode
        return 0.6 * num * len(self.trace) / seconds

    def inputs(self) -> dict[str, Any]:
        """For JSON: names of files, and no paths."""
        return {
            "traces": list(self.trace_names),
            "format": self.format,
            "num_requests": len(self.trace),
            "trace_rate": self.own_rate,
            "profile": self.profile.name,
            "prefill": self.num_prefill,
            "decode": self.num_decode,
            "slo": {"ttft_s": self.slo.ttft_s, "tpot_s": self.slo.tpot_s},
            "arrivals": self.arrivals,
            "rate_scale": list(self.scales),
            "find_goodput": self.target,
            "host_tokens": None if self.pool is None else self.pool.host_tokens,
            "freeze_roles": self.freeze_roles,
            "seed": self.seed,
        }


_GUESSED_BATCH = 32


def make_plan(flags: SimulateFlags) -> Plan:
    """Read and check everything before anything runs. Raises ConfigError."""
    kind = None
    if flags.format is not None:
        kind = cast(TraceFormat, _one_of(flags.format, get_args(TraceFormat), "--format"))
    arrivals = cast(Arrivals, _one_of(flags.arrivals, get_args(Arrivals), "--arrivals"))
    slo = _slo(flags.slo)
    num_prefill, num_decode = _sizes(flags)
    scales = _scales(flags.rate_scale)
    target = flags.find_goodput
    if target is not None and not 0.0 < target <= 1.0:
        raise ConfigError(
            f"--find-goodput is {target:g}; expected a share above 0 and at most 1",
            param="find_goodput",
        )
    if not scales and target is None:
        scales = (1.0,)
    if flags.jobs is not None and flags.jobs < 1:
        raise ConfigError(f"--jobs is {flags.jobs}; expected at least 1", param="jobs")
    if flags.plot is not None:
        _check_plot(flags.plot)
    policies = _policies(flags.policies)
    if STATIC_BEST in policies and target is None:
        raise ConfigError(
            f"--policy {STATIC_BEST} is the split with the best goodput; it needs --find-goodput",
            param="policy",
        )
    profile = load_profile(flags.profile)
    files = [Path(name).expanduser() for name in _names(flags.traces, "--trace")]
    traces = [read_trace(path, kind, seed=flags.seed) for path in files]
    if len(trace := follow(*traces)) < 2:
        raise ConfigError("--trace holds one request; a rate needs two", param="trace")
    return Plan(
        trace=trace,
        trace_names=tuple(path.name for path in files),
        format=kind,
        profile=profile,
        num_prefill=num_prefill,
        num_decode=num_decode,
        policies=policies,
        slo=slo,
        arrivals=arrivals,
        scales=scales,
        target=target,
        pool=None if flags.host_tokens is None else _pool(flags.host_tokens),
        freeze_roles=flags.freeze_roles,
        seed=flags.seed,
        jobs=flags.jobs or os.cpu_count() or 1,
    )


def _names(text: str, flag: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise ConfigError(f"{flag} is empty", param=flag.removeprefix("--"))
    return names


def _one_of(value: str, known: tuple[str, ...], flag: str) -> str:
    if value not in known:
        raise ConfigError(
            f"{flag} is {value!r}; expected one of {', '.join(known)}",
            param=flag.removeprefix("--"),
        )
    return value


def _number(text: str, flag: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value < math.inf:
        raise ConfigError(
            f"{flag} has {text.strip()!r}; expected a number above 0", param=flag.removeprefix("--")
        )
    return value


def _slo(text: str) -> Slo:
    found: dict[str, float] = {}
    for item in _names(text, "--slo"):
        name, equals, value = item.partition("=")
        if not equals or name not in ("ttft", "tpot") or name in found:
            raise ConfigError(
                f"--slo has {item!r}; expected ttft=SECONDS, tpot=SECONDS or both", param="slo"
            )
        found[name] = _number(value, f"--slo {name}")
    return Slo(found.get("ttft"), found.get("tpot"))


def _sizes(flags: SimulateFlags) -> tuple[int, int]:
    if flags.instances is not None:
        if flags.prefill is not None or flags.decode is not None:
            raise ConfigError(
                "--instances is given with --prefill or --decode; expected one or the other",
                param="instances",
            )
        if flags.instances < 2:
            raise ConfigError(
                f"--instances is {flags.instances}; expected at least 2", param="instances"
            )
        # An odd one prefills: most traces have more to read than to write.
        return flags.instances - flags.instances // 2, flags.instances // 2
    if flags.prefill is None or flags.decode is None:
        raise ConfigError(
            "the size of the cluster is missing: give --instances, or --prefill and --decode",
            param="instances",
        )
    for name, value in (("prefill", flags.prefill), ("decode", flags.decode)):
        if value < 1:
            raise ConfigError(f"--{name} is {value}; expected at least 1", param=name)
    return flags.prefill, flags.decode


def _pool(host_tokens: int) -> PoolSettings:
    if host_tokens < 0:
        raise ConfigError(
            f"--host-tokens is {host_tokens}; expected 0 or more", param="host_tokens"
        )
    return PoolSettings(host_tokens)


def _scales(text: str | None) -> tuple[float, ...]:
    if text is None:
        return ()
    return tuple(_number(item, "--rate-scale") for item in _names(text, "--rate-scale"))


def _policies(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(_names(text, "--policy")))
    for name in names:
        if name == STATIC_BEST or name in POLICIES:
            continue
        if ":" not in name:
            known = ", ".join((*POLICIES, STATIC_BEST))
            raise ConfigError(
                f"--policy has {name!r}; expected names out of {known}, or package.module:Class",
                param="policy",
            )
        make_policy(name)
    return names


def _check_plot(path: Path) -> None:
    if path.suffix not in PLOT_FORMATS:
        raise ConfigError(
            f"--plot is {str(path)!r}; expected a name that ends in {' or '.join(PLOT_FORMATS)}",
            param="plot",
        )
    if not path.expanduser().resolve().parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no such folder", param="plot")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed: pip install 'baton-serve[plot]'",
            param="plot",
        ) from error
