"""What the controller tells Prometheus about roles: switches, and the planner's advice."""

from __future__ import annotations

import itertools
import math

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from baton.core.cluster import Role
from controller.planner import RoleAdvice
from controller.role_events import RoleSwitchEnded, Who

_SECONDS_BUCKETS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_RESULTS = ("done", "refused", "timed_out", "lost")


class RoleMetrics:
    """Written by the shell."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._switches = Counter(
            "baton_controller_role_switches",
            "Role switches ended, by result",
            ["result"],
            registry=registry,
        )
        self._flips = Counter(
            "baton_role_flips",
            "Role switches ended, by roles, who wanted them, and result",
            ["from", "to", "who", "result"],
            registry=registry,
        )
        self._seconds = Histogram(
            "baton_role_flip_seconds",
            "From the preparation of a role switch to its end",
            buckets=_SECONDS_BUCKETS,
            registry=registry,
        )
        self._desired = Gauge(
            "baton_roles_desired",
            "Instances of each role that the planner would like; NaN: no opinion",
            ["role"],
            registry=registry,
        )
        self._desired_instances = Gauge(
            "baton_roles_desired_instances",
            "Instances that the planner would like, for an autoscaler; NaN: no opinion",
            registry=registry,
        )
        self._paused = Gauge(
            "baton_roles_paused", "1 while the planner may switch nothing", registry=registry
        )
        for result in _RESULTS:
            self._switches.labels(result)
        for source, target in itertools.permutations(Role, 2):
            for result in _RESULTS:
                for who in Who:
                    self._flips.labels(source, target, who, result)
            self._flips.labels(source, target, Who.PLANNER, "advised")
        self.observe_advice(RoleAdvice(), paused=False)

    def observe_switch(self, command: RoleSwitchEnded) -> None:
        """A switch ended, or was advised only."""
        if command.result in _RESULTS:
            self._switches.labels(command.result).inc()
        self._flips.labels(command.previous, command.target, command.who, command.result).inc()
        if command.seconds is not None:
            self._seconds.observe(command.seconds)

    def observe_advice(self, advice: RoleAdvice, *, paused: bool) -> None:
        """The planner says something else, or was paused."""
        for role in Role:
            wanted = advice.desired.get(role, 0) if advice.desired else math.nan
            self._desired.labels(role).set(wanted)
        instances = advice.desired_instances
        self._desired_instances.set(math.nan if instances is None else instances)
        self._paused.set(paused)
