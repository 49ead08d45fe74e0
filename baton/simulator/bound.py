"""What no scheduler can beat: a bound for clusters whose instances could all do everything at once.

The cluster is one machine of ``num`` instances' speed. A request needs the machine's time for its
prompt, in chunks as large as steps get, before its TTFT is over; its output takes a share of an
instance, the smallest that a full decode batch leaves it, as long as it decodes. Prompts are
served by earliest deadline, and where one cannot make it, the longest among those up to it is given
up (Moore and Hodgson's rule, which is best for the jobs at hand). No handoff, no waiting for steps,
no split into instances, and the future of outputs is known. Pure.
"""

from __future__ import annotations

import heapq

from baton.core.cost_model import Profile
from baton.core.slo import Slo
from baton.simulator.workload import Trace

_TICK_S = 0.05


def oracle_attainment(trace: Trace, profile: Profile, slo: Slo, num: int) -> float:
    """The share of requests that could be good. Needs both targets."""
    assert slo.ttft_s is not None
    assert slo.tpot_s is not None
    free = _free_capacity(trace, profile, slo, num)
    # Earliest deadline first; equal for all, so in order of arrival.
    longest: list[float] = []
    num_good = 0
    # Work is counted on the machine's own clock: what it could have computed by then.
    clock = [0.0]
    for share in free:
        clock.append(clock[-1] + share * _TICK_S)

    def work_at(time_s: float) -> float:
        index = min(len(clock) - 2, int(time_s / _TICK_S))
        return clock[index] + (time_s - index * _TICK_S) * free[index]

    done = 0.0
    """Work until which the machine is taken."""
    for request in trace:
        work = profile.cost.prefill_s(
            request.num_prompt_tokens, chunk=profile.max_num_batched_tokens
        )
        start = work_at(request.arrival_s)
        if start >= done:
            longest.clear()
            done = start
        done += work
        heapq.heappush(longest, -work)
        num_good += 1
        if done > work_at(request.arrival_s + slo.ttft_s):
            done += heapq.heappop(longest)
            num_good -= 1
    return num_good / len(trace)


def _free_capacity(trace: Trace, profile: Profile, slo: Slo, num: int) -> list[float]:
    """Instances' worth of time for prompts, per tick: all, less what decodes take."""
    assert slo.tpot_s is not None
    cost = profile.cost
    ends = max(r.arrival_s + r.num_output_tokens * slo.tpot_s for r in trace) + 120.0
    changes = [0.0] * (int(ends / _TICK_S) + 2)
    for request in trace:
        context = request.num_prompt_tokens + request.num_output_tokens / 2
        marginal = cost.decode.item_s + context * cost.decode.context_s
        left_s = max(1e-6, slo.tpot_s - cost.decode.overhead_s)
        batch = min(
            left_s / max(marginal, 1e-9),
            float(profile.max_num_seqs),
            profile.kv_capacity_tokens / context,
        )
        # The weights are read anyway while prompts are computed: only the context is extra.
        share = min(1.0 / max(1.0, batch), marginal / slo.tpot_s)
        first = int(request.arrival_s / _TICK_S)
        last = int((request.arrival_s + request.num_output_tokens * slo.tpot_s) / _TICK_S)
        changes[first] += share
        changes[last + 1] -= share
    free: list[float] = []
    used = 0.0
    for change in changes:
        used += change
        free.append(max(0.0, num - used))
    return free
