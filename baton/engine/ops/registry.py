"""Which implementation of an operation runs where, and why.

An operation is a name with a *reference*, written in plain torch and meant to be read. A device
may have *overrides*. At load, each place in the model that needs an operation (a :class:`Site`)
asks once; nothing is looked up while a step runs. The best by priority among those that can handle
the site is taken, and what was passed over is remembered with its reason: ``baton ops`` prints it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from baton.core.errors import ConfigError

_log = logging.getLogger(__name__)

REFERENCE = "reference"


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """A place that needs an operation, and all that a choice may depend on.

    A choice must depend on nothing else, least of all on time: equal instances have to compute
    equal bits.
    """

    op: str
    where: str
    """A part of the model, with ``*`` for what repeats: ``layers.*.attention.qkv``."""
    device: torch.device
    dtype: torch.dtype
    shape: tuple[tuple[str, int], ...] = ()
    """Named sizes, in order of name."""

    def __getitem__(self, name: str) -> int:
        return dict(self.shape)[name]


@dataclasses.dataclass(frozen=True, slots=True)
class Implementation:
    """One way to do an operation.

    Args:
        make: from a site to what the model calls (or, for operations with weights, to what makes
            that from the weights). The signatures are those of ``reference.py``.
        can_handle: ``None``, or the reason why not, in a few words.
    """

    op: str
    name: str
    make: Callable[[Site], Any]
    priority: int = 0
    devices: frozenset[str] | None = None
    """Device types; ``None``: all."""
    can_handle: Callable[[Site], str | None] = lambda site: None
    layout: Callable[[Site], str | None] = lambda site: None
    """How the operation's weights lie in memory, in a few words; ``None``: it has none."""

    def refusal(self, site: Site) -> str | None:
        """Why not here, or ``None``."""
        if self.devices is not None and site.device.type not in self.devices:
            return f"only on {', '.join(sorted(self.devices))}"
        return self.can_handle(site)


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """What was taken for a site, and what was passed over."""

    site: Site
    implementation: Implementation
    passed_over: tuple[tuple[str, str], ...]
    """(name, reason) of the others, best priority first."""

    @property
    def reason(self) -> str:
        """Why this one, in a few words."""
        if self.implementation.name == REFERENCE:
            return "no override can run here" if self.passed_over else "there is no override"
        return f"best that can run here (priority {self.implementation.priority})"

    @property
    def layout(self) -> str | None:
        """How the weights lie in memory; ``None`` for an operation without weights."""
        return self.implementation.layout(self.site)


class Unbuilt:
    """What a dry ``Ops`` binds: stands for any operation or product, and builds nothing."""

    row_quantum = 1

    def __call__(self, *args: Any, **kwargs: Any) -> Unbuilt:
        """Itself, as what it would have made."""
        return self


class Ops:
    """Chooses for one model on one device, and remembers what it chose."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        implementations: Sequence[Implementation] | None = None,
        *,
        dry: bool = False,
    ) -> None:
        """``implementations``: default, the catalog's. ``dry``: choose, and make nothing."""
        from baton.engine.ops.catalog import CATALOG

        self.device = device
        self.dtype = dtype
        self.dry = dry
        self.weight_device = torch.device("meta") if dry else device
        """Where the loader puts weights: nowhere in a dry run."""
        self._implementations = CATALOG if implementations is None else tuple(implementations)
        self._choices: dict[Site, Choice] = {}

    @property
    def choices(self) -> tuple[Choice, ...]:
        """In the order in which they were first asked for."""
        return tuple(self._choices.values())

    def bind(self, op: str, where: str, dtype: torch.dtype | None = None, **shape: int) -> Any:
        """What to call at this place. ``ConfigError`` where nothing can do it."""
        sizes = tuple(sorted(shape.items()))
        site = Site(op, where, self.device, dtype or self.dtype, sizes)
        if site not in self._choices:
            choice = self._choices[site] = choose(site, self._implementations)
            _log.debug("%s at %s: %s", op, where, choice.implementation.name)
        return Unbuilt() if self.dry else self._choices[site].implementation.make(site)


def choose(site: Site, implementations: Sequence[Implementation]) -> Choice:
    """The best by priority of those that can handle the site. Pure."""
    candidates = [item for item in implementations if item.op == site.op]
    candidates.sort(key=lambda item: -item.priority)
    taken: Implementation | None = None
    passed_over = []
    for item in candidates:
        refusal = item.refusal(site)
        if refusal is None and taken is None:
            taken = item
        else:
            passed_over.append((item.name, refusal or f"priority {item.priority}"))
    if taken is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over) or "none exists"
        raise ConfigError(
            f"no implementation of {site.op} can run {site.where} on {site.device} ({reasons}): "
            "use another device or dtype",
            param="device",
        )
    return Choice(site, taken, tuple(passed_over))
