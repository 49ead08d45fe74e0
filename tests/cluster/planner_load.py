"""Loads for the planner on running clusters of emulated instances: a steady one, and a shift.

The shift has the shape of dynamo#10528: from one moment on prompts are long, the queue before
prefill grows, and what ends at first came before it and looks fine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from baton.client.admin import AdminClient
from protos.baton.v1 import cluster_pb2
from tests.cluster.emulated_kit import Ask, asks, emulated_cluster, send_at
from tests.cluster.harness import Cluster, Reply

TTFT_S, TPOT_S = 2.0, 0.1
COOLDOWN_S = 4.0
Timed = list[tuple[float, Ask]]


@contextlib.contextmanager
def planned_cluster(folder: Path, num_side: int, *, frozen: bool = False) -> Iterator[Cluster]:
    """Half the instances on each side; ``frozen``: the planner is off."""
    settings: dict[str, Any] = {
        "controller": {
            "heartbeat_s": 0.5,
            "roles": {
                "mode": "off" if frozen else "auto",
                "cooldown_s": COOLDOWN_S,
                "interval_s": 0.5,
            },
        },
        "service": {
            "classes": {"standard": {"ttft_s": TTFT_S, "tpot_s": TPOT_S}},
            "default": "standard",
        },
        # What waits is not lost.
        "gateway": {"gap_timeout_s": 120.0},
    }
    sizes = ("--prefill", str(num_side), "--decode", str(num_side))
    with emulated_cluster(folder, sizes, settings=settings) as cluster:
        yield cluster


def steady(rate: float, seconds: float, *, seed: int) -> Timed:
    """Poisson arrivals of short prompts."""
    return _timed(rate, asks(int(rate * seconds), prompt=500, output=30, seed=seed), 0.0, seed)


def shift(rate: float, before_s: float, seconds: float, *, seed: int) -> Timed:
    """The steady load, and from ``before_s`` on long prompts with longer outputs."""
    long = asks(int(rate * seconds), prompt=4000, output=60, seed=seed + 1)
    return steady(rate, before_s, seed=seed) + _timed(rate, long, before_s, seed + 1)


def _timed(rate: float, requests: Sequence[Ask], start_s: float, seed: int) -> Timed:
    draw = random.Random(seed)
    timed, at_s = [], start_s
    for ask in requests:
        timed.append((at_s, ask))
        at_s += draw.expovariate(rate)
    return timed


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """A load that was sent."""

    timed: Timed
    replies: list[Reply]
    """In the order of ``timed``; every token is right."""
    flips: list[cluster_pb2.RoleFlip]

    def attained(self, from_s: float, to_s: float) -> float:
        """Of what arrived then, within the targets."""
        good = [
            _good(reply)
            for (at_s, _), reply in zip(self.timed, self.replies, strict=True)
            if from_s <= at_s < to_s
        ]
        return sum(good) / len(good)

    def ended_well(self, from_s: float, to_s: float) -> float:
        """Of what ended then, within the targets."""
        good = [
            _good(reply)
            for (at_s, _), reply in zip(self.timed, self.replies, strict=True)
            if from_s <= at_s + reply.seconds < to_s
        ]
        return sum(good) / len(good)

    def shortest_gap_s(self) -> float:
        """Between two switches; endless where there are fewer."""
        times = sorted(flip.wall_s for flip in self.flips)
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        return min(gaps, default=float("inf"))

    def returns(self) -> list[str]:
        """Instances that went to another role and back."""
        last: dict[str, str] = {}
        found = []
        for flip in self.flips:
            if last.get(flip.instance_id) == flip.to_role:
                found.append(f"{flip.instance_id} is {flip.to_role} again")
            last[flip.instance_id] = flip.from_role
        return found

    def describe(self) -> str:
        """The switches, for people."""
        lines = [f"{f.instance_id}: {f.from_role} -> {f.to_role} ({f.reason})" for f in self.flips]
        return "\n".join(lines) or "no switches"


def _good(reply: Reply) -> bool:
    tpot_s = (reply.seconds - reply.first_s) / max(1, len(reply.token_ids) - 1)
    return reply.first_s <= TTFT_S and tpot_s <= TPOT_S


async def send(cluster: Cluster, timed: Timed) -> Run:
    """Send it all; with the switches that were made meanwhile."""
    with AdminClient(cluster.controller) as admin:
        known = max((flip.number for flip in admin.roles().log), default=0)
        replies = await send_at(cluster, timed)
        flips = [flip for flip in admin.roles().log if flip.number > known]
    return Run(timed, replies, [flip for flip in flips if flip.state == "done"])
