"""What is predicted of instances and requests, and how far off it was. Pure.

One predictor per instance and role, fed by the steps that its heartbeats carry. An instance that
joins starts from its peers (equal model and KV layout), else from the profile that the cluster was
given, else from nothing; what a role taught is kept for the time that the instance takes it again.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence

from baton.core.cluster import InstanceInfo, InstanceLoad, Role
from baton.core.cost_model import CostModel, LinkCosts, StepCosts
from baton.core.predictor import (
    DECODE_STEP,
    PREFILL_STEP,
    InstancePredictor,
    OnlineCosts,
    PredictionError,
)
from controller.traces import RequestTrace
from kvpool.layout import KVLayout, canonical_text

TTFT, TPOT = "ttft", "tpot"

_ENDED_WELL = ("stop", "length")
_NUM_TRUSTED = 20
"""Steps from which an instance tells its peers something."""
_UNKNOWN_LINK = LinkCosts(latency_s=2e-3, bytes_per_s=1e9)
_UNKNOWN_KV_BYTES = 65536.0
_MAX_REMEMBERED = 64

Group = tuple[str, str]
"""Model fingerprint and canonical KV layout: instances of equal shape, which may change roles."""
_Start = tuple[StepCosts | None, StepCosts | None]
_Kind = Callable[[InstancePredictor], OnlineCosts]


@dataclasses.dataclass(slots=True)
class _Member:
    group: Group
    kv_bytes_per_token: float
    role: Role
    by_role: dict[Role, InstancePredictor]

    @property
    def now(self) -> InstancePredictor:
        return self.by_role[self.role]


class Predictions:
    """Of one cluster. ``base``: a profile's cost model, for links and as a start of steps."""

    def __init__(self, base: CostModel | None = None) -> None:
        self._base = base
        self._members: dict[str, _Member] = {}
        self._remembered: dict[Group, _Start] = {}
        """Of groups whose last members left."""
        self._examples: dict[tuple[Group, str], str] = {}
        """Of each group and kind of steps: who told of such steps last."""
        self._errors = {TTFT: PredictionError(), TPOT: PredictionError()}

    def join(self, info: InstanceInfo) -> None:
        """An instance is here, with this role; again: it changed it."""
        group = (info.model_fingerprint, canonical_text(info.kv_layout))
        member = self._members.get(info.instance_id)
        if member is not None and member.group == group:
            self._take_role(member, info.role)
            return
        predictor = InstancePredictor(*self._start(group))
        self._members[info.instance_id] = _Member(
            group, self._kv_bytes(info), info.role, {info.role: predictor}
        )

    def forget(self, instance_id: str) -> None:
        """An instance is gone; what it taught stays for the next ones of its shape."""
        member = self._members.pop(instance_id, None)
        if member is not None:
            self._remember(member)

    def observe(self, instance_id: str, role: Role, load: InstanceLoad) -> bool:
        """Take in a heartbeat of an instance that joined; whether what is predicted of it may be
        something else now."""
        member = self._members.get(instance_id)
        if member is None:
            return False
        changed = self._take_role(member, role)
        for sample in load.samples:
            member.now.observe(sample)
        prefill, decode = member.now.prefill, member.now.decode
        if load.samples:
            for kind, online in ((PREFILL_STEP, prefill), (DECODE_STEP, decode)):
                if online.known:
                    self._examples[member.group, kind] = instance_id
            return True
        return changed or not (prefill.known and decode.known)

    def model(self, instance_id: str) -> CostModel | None:
        """What is predicted of an instance; ``None`` where there is nothing to go by.

        Of steps that it has not made yet: what is predicted of a peer. An instance that seems to
        cost nothing would draw everything.
        """
        member = self._members.get(instance_id)
        if member is None:
            return self._base
        prefill = self._known(member, PREFILL_STEP, lambda predictor: predictor.prefill)
        decode = self._known(member, DECODE_STEP, lambda predictor: predictor.decode)
        if prefill is None or decode is None:
            return None
        if self._base is not None:
            return dataclasses.replace(self._base, prefill=prefill, decode=decode)
        return CostModel(prefill, decode, _UNKNOWN_LINK, member.kv_bytes_per_token)

    def _known(self, member: _Member, kind: str, of: _Kind) -> StepCosts | None:
        """From its own steps, or a peer's."""
        if of(member.now).known:
            return of(member.now).costs
        example = self._members.get(self._examples.get((member.group, kind), ""))
        return None if example is None or not of(example.now).known else of(example.now).costs

    def ended(self, trace: RequestTrace | None) -> None:
        """A request's end was reported: compare it with what was predicted, where that is fair:
        it ended well, and at its first placement."""
        if trace is None or trace.ended is None or len(trace.attempts) != 1:
            return
        outcome, (attempt,) = trace.ended, trace.attempts.values()
        if outcome.outcome not in _ENDED_WELL:
            return
        if attempt.predicted_ttft_s is not None:
            self._errors[TTFT].observe(attempt.predicted_ttft_s, outcome.ttft_s)
        if attempt.predicted_tpot_s is not None and outcome.completion_tokens > 1:
            self._errors[TPOT].observe(attempt.predicted_tpot_s, outcome.tpot_s)

    def errors(self) -> dict[str, float]:
        """Mean absolute relative error of recent predictions by kind: ``ttft`` and ``tpot`` of
        requests, ``prefill_step``, ``decode_step`` and ``mixed_step`` as the mean over instances.
        Kinds without any are missing."""
        found: dict[str, list[float]] = {}
        for member in self._members.values():
            for kind, error in member.now.errors.items():
                found.setdefault(kind, []).append(error)
        requests = {kind: e.mean for kind, e in self._errors.items() if e.mean is not None}
        return requests | {kind: statistics.fmean(each) for kind, each in found.items()}

    def errors_of(self, instance_id: str) -> Mapping[str, float]:
        """Of one instance's steps."""
        member = self._members.get(instance_id)
        return {} if member is None else member.now.errors

    # Starts.

    def _take_role(self, member: _Member, role: Role) -> bool:
        if member.role is role:
            return False
        if role not in member.by_role:
            now = member.now
            group = self._start(member.group)
            member.by_role[role] = InstancePredictor(
                _own(now.prefill, group[0]), _own(now.decode, group[1])
            )
        member.role = role
        return True

    def _start(self, group: Group) -> _Start:
        """What one more of a group starts from."""
        peers = [member.now for member in self._members.values() if member.group == group]
        known = self._remembered.get(group, (None, None))
        profile: _Start = (None, None)
        if self._base is not None:
            profile = (self._base.prefill, self._base.decode)
        return (
            _median(peers, lambda peer: peer.prefill) or known[0] or profile[0],
            _median(peers, lambda peer: peer.decode) or known[1] or profile[1],
        )

    def _remember(self, member: _Member) -> None:
        known = self._remembered.pop(member.group, (None, None))
        now = member.now
        taught = (_own(now.prefill, known[0]), _own(now.decode, known[1]))
        if taught != (None, None):
            self._remembered[member.group] = taught
            while len(self._remembered) > _MAX_REMEMBERED:
                del self._remembered[next(iter(self._remembered))]

    def _kv_bytes(self, info: InstanceInfo) -> float:
        if self._base is not None:
            return self._base.kv_bytes_per_token
        try:
            layout = KVLayout.parse(info.kv_layout).canonical
        except ValueError:
            return _UNKNOWN_KV_BYTES
        return layout.block_bytes / layout.block_size


def _own(online: OnlineCosts, otherwise: StepCosts | None) -> StepCosts | None:
    return online.costs if online.num_samples >= _NUM_TRUSTED else otherwise


def _median(peers: Sequence[InstancePredictor], of: _Kind) -> StepCosts | None:
    """Each coefficient's median over those that measured enough; ``None`` if nobody did."""
    costs = [of(peer).costs for peer in peers if of(peer).num_samples >= _NUM_TRUSTED]
    if not costs:
        return None
    return StepCosts(
        statistics.median(each.overhead_s for each in costs),
        statistics.median(each.item_s for each in costs),
        statistics.median(each.context_s for each in costs),
    )


def queue_s(model: CostModel, num_tokens: int, *, chunk: int) -> float:
    """Seconds until so many waiting prompt tokens are computed, in steps of up to ``chunk``."""
    costs = model.prefill
    return num_tokens * (costs.item_s + costs.overhead_s / max(1, chunk))


def ttft_s(
    model: CostModel,
    num_tokens: int,
    *,
    chunk: int,
    cached: Mapping[str, int] | None = None,
    queued_s: float = 0.0,
    num_decodes: int = 0,
    decode_context: int = 0,
) -> float:
    """Predicted time to the first token of a prompt.

    Args:
        model: of the instance that would compute it.
        chunk: prompt tokens per step, at most.
        cached: how many of its leading tokens each tier has; ``device``: the instance itself. A
            lower tier is used where that is faster, as the instance will decide.
        queued_s: of what waits there before it; a fetch goes on meanwhile.
        num_decodes: sequences that decode in the same steps.
        decode_context: tokens in their cache.
    """
    cached = cached or {}
    most = max(0, num_tokens - 1)
    device = min(most, cached.get("device", 0))
    own_s = _compute_s(model, num_tokens, device, chunk, num_decodes, decode_context)
    best = queued_s + own_s
    for tier, there in cached.items():
        there = min(most, there)
        if tier == "device" or there <= device:
            continue
        rest_s = _compute_s(model, num_tokens, there, chunk, num_decodes, decode_context)
        fetch_s = model.fetch_s(tier, there - device)
        best = min(best, max(queued_s, fetch_s) + rest_s)
    return best


def _compute_s(
    model: CostModel, num_tokens: int, num_cached: int, chunk: int, num_decodes: int, context: int
) -> float:
    alone_s = model.prefill_s(num_tokens, num_cached, chunk=chunk)
    if not num_decodes:
        return alone_s
    num_steps = -(-max(1, num_tokens - num_cached) // max(1, chunk))
    overhead_s = max(0.0, model.decode.overhead_s - model.prefill.overhead_s)
    beside_s = num_decodes * model.decode.item_s + context * model.decode.context_s
    return alone_s + num_steps * (overhead_s + beside_s)


def tpot_s(
    model: CostModel,
    num_decodes: int,
    context: int,
    *,
    prompt_tokens_per_step: float = 0.0,
    prompt_context: float = 0.0,
) -> float:
    """Predicted time per token of a batch: so many sequences with so much context in all, beside
    what is computed of prompts in the same steps, on average (``prompt_context`` before each of
    those tokens)."""
    decode_s = model.decode_s(num_decodes, context)
    if prompt_tokens_per_step <= 0.0:
        return decode_s
    costs = model.prefill
    overhead_s = max(0.0, costs.overhead_s - model.decode.overhead_s)
    token_s = costs.item_s + prompt_context * costs.context_s
    return decode_s + overhead_s + prompt_tokens_per_step * token_s
