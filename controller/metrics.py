"""What the controller tells Prometheus."""

from __future__ import annotations

import collections

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from baton.core.cluster import Placement, Role
from baton.core.errors import Code
from controller.events import Failure, Placed
from controller.membership import InstanceState
from controller.role_metrics import RoleMetrics
from controller.state import ClusterState

_DECISION_BUCKETS_S = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


class ControllerMetrics:
    """Written by the shell, read by a scrape, all on one loop."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.placements = Counter(
            "baton_controller_placements",
            "Placement requests answered, by outcome",
            ["outcome"],
            registry=registry,
        )
        self.queued = Gauge(
            "baton_controller_queued_placements",
            "Placement requests that wait for a usable pair",
            registry=registry,
        )
        self.open = Gauge(
            "baton_controller_open_placements",
            "Placements whose end no gateway has reported",
            registry=registry,
        )
        self.instances = Gauge(
            "baton_instances", "Live instances", ["role", "state"], registry=registry
        )
        self.epoch = Gauge("baton_controller_epoch", "The controller's epoch", registry=registry)
        self.decision_s = Histogram(
            "baton_controller_decision_seconds",
            "Time to decide one batch of placements",
            buckets=_DECISION_BUCKETS_S,
            registry=registry,
        )
        self.index_blocks = Gauge(
            "baton_controller_index_blocks",
            "Different KV blocks that somebody has",
            registry=registry,
        )
        self.index_holders = Gauge(
            "baton_controller_index_holders",
            "Instances and pool nodes in the index",
            registry=registry,
        )
        for outcome in ("placed", "refused", "shed"):
            self.placements.labels(outcome)
        self.role_metrics = RoleMetrics(registry)

    def observe_blocks(self, num_blocks: int, num_holders: int) -> None:
        """After a report of KV blocks."""
        self.index_blocks.set(num_blocks)
        self.index_holders.set(num_holders)

    def observe_placed(self, command: Placed) -> None:
        """Count results."""
        num_placed = sum(isinstance(r, Placement) for r in command.results.values())
        num_shed = sum(
            isinstance(r, Failure) and r.code is Code.OVERLOADED for r in command.results.values()
        )
        self.placements.labels("placed").inc(num_placed)
        self.placements.labels("shed").inc(num_shed)
        self.placements.labels("refused").inc(len(command.results) - num_placed - num_shed)

    def observe_membership(self, state: ClusterState) -> None:
        """After a change of membership."""
        self.epoch.set(state.epoch)
        counts = collections.Counter(
            (record.info.role, record.state) for record in state.instances.values()
        )
        for role in Role:
            for instance_state in InstanceState:
                if instance_state is not InstanceState.DEAD:
                    count = counts[role, instance_state]
                    self.instances.labels(role, instance_state).set(count)
