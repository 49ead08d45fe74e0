"""What memory a rank has, needs and uses, as numbers. No torch here: drivers and the CLI need this.

At the start a rank measures (``worst_case``) what it holds and how much more its largest steps take
for a moment. What the limit leaves is for KV blocks::

    limit = held + transient + reserve + margin + blocks
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from baton.core.config import EngineConfig
from baton.core.errors import ConfigError

MIB, GIB = 2**20, 2**30
_MARGIN_BYTES = 32 * MIB
_MARGIN_SHARE = 0.1
"""Of the largest step: what an allocator loses to fragments, and kernels made for other shapes."""
BLOCK_RECORD_BYTES = 512
"""Host memory that the scheduler and the prefix cache keep of a block beside its KV bytes."""


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """What one rank was measured to need beside its KV blocks, in bytes."""

    held: int
    """For good: imports, weights, tables, workspaces that libraries keep."""
    prefill: int
    """For a moment, by the largest prefill step."""
    decode: int
    """For a moment, by the largest decode step."""
    mixed: int
    """For a moment, by the largest step of both."""
    reserve: int
    """Made when first needed: token counts for penalties, records of requests."""
    limit: int
    """What all must fit into."""
    block_bytes: int
    """This rank's part of a KV block."""
    seconds: float = 0.0
    """How long measuring took."""

    @property
    def transient(self) -> int:
        """The largest of the three."""
        return max(self.prefill, self.decode, self.mixed)

    @property
    def margin(self) -> int:
        """For what measuring cannot see."""
        return _MARGIN_BYTES + math.ceil(_MARGIN_SHARE * self.transient)

    @property
    def beside_blocks(self) -> int:
        """All but the KV blocks."""
        return self.held + self.transient + self.reserve + self.margin

    @property
    def rest(self) -> int:
        """For KV blocks; negative where there is too little for the rest."""
        return self.limit - self.beside_blocks

    @property
    def text(self) -> str:
        """The numbers in words."""
        return (
            f"limit {mib(self.limit)}, held {mib(self.held)}, largest step {mib(self.transient)} "
            f"(prefill {mib(self.prefill)}, decode {mib(self.decode)}, both {mib(self.mixed)}), "
            f"reserve {mib(self.reserve)}, margin {mib(self.margin)}"
        )


def fit_blocks(needs: Sequence[MemoryNeeds], config: EngineConfig, max_model_len: int) -> int:
    """KV blocks of each dp group: ``config.num_blocks``, or what the tightest rank has room for.

    ``needs``: of each rank. ``max_model_len``: the longest sequence in tokens, if the cache does
    not bound it. Raises ConfigError, with the numbers, where ``config.num_blocks`` do not fit, or
    not even one sequence: of ``config.max_model_len`` tokens, or, where that is not set, of what
    one step may compute.
    """
    tightest = min(needs, key=lambda need: need.rest // (need.block_bytes + BLOCK_RECORD_BYTES))
    each = tightest.block_bytes + BLOCK_RECORD_BYTES
    fitting = max(0, tightest.rest // each)
    if config.num_blocks is not None:
        if config.num_blocks <= fitting:
            return config.num_blocks
        raise ConfigError(
            f"{config.num_blocks} KV blocks of {each} bytes need {mib(config.num_blocks * each)}, "
            f"but {mib(max(0, tightest.rest))} are left for them ({tightest.text}): "
            f"use at most {fitting} blocks, or raise memory_limit_gib",
            param="engine.num_blocks",
        )
    tokens = config.max_model_len or min(max_model_len, config.max_num_batched_tokens)
    wanted = -(-tokens // config.block_size)
    if fitting < wanted:
        raise ConfigError(
            f"one sequence of {tokens} tokens needs {wanted} KV blocks of {each} bytes, "
            f"{mib(wanted * each)}, but {mib(max(0, tightest.rest))} are left for them "
            f"({tightest.text}): raise memory_limit_gib, or lower max_model_len, max_num_seqs or "
            "max_num_batched_tokens",
            param="engine.memory_limit_gib",
        )
    # More than all sequences can use at once would only be cache; the user gave it for that.
    return fitting


def check_weights(num_bytes: int, config: EngineConfig, limit: int) -> None:
    """Before anything is loaded: raises ConfigError for weights larger than ``limit``, in bytes.

    ``num_bytes``: of the whole model in its dtype; a rank has at least its share of them.
    """
    ranks = max(config.tp * config.dp, config.ep)
    if num_bytes // ranks > limit:
        raise ConfigError(
            f"the weights take {mib(num_bytes)} as {config.dtype}, {mib(num_bytes // ranks)} on "
            f"each of {ranks} ranks, and the memory limit is {mib(limit)}: use more memory, more "
            "ranks or a smaller model",
            param="engine.memory_limit_gib",
        )


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryEntry:
    """A line of the map."""

    tag: str
    """What it is, such as ``weights.experts``."""
    size: int
    """Bytes that are set aside."""
    in_use: int
    """Bytes of them that take memory now; pages that were never touched do not."""


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryMap:
    """What one rank's memory is used for."""

    rank: str
    device: str
    entries: tuple[MemoryEntry, ...]
    in_use: int
    """By the kernel's or the driver's account, beyond ``imports``."""
    imports: int
    """What was in use before the rank began to load."""
    peak: int
    """The most that was in use at once since the largest steps were measured; with imports."""
    needs: MemoryNeeds | None = None
    """What was measured at the start."""

    @property
    def unaccounted(self) -> int:
        """Bytes in use that no entry explains."""
        return self.in_use - sum(entry.in_use for entry in self.entries)

    @property
    def text(self) -> str:
        """A line per entry, largest first, for logs and errors."""
        lines = [f"memory of {self.rank} on {self.device}, {mib(self.in_use)} beyond imports:"]
        entries = sorted(self.entries, key=lambda entry: -entry.in_use)
        entries.append(MemoryEntry("unaccounted", self.unaccounted, self.unaccounted))
        for entry in entries:
            share = entry.in_use / self.in_use if self.in_use else 0.0
            lines.append(
                f"  {entry.tag:24} {mib(entry.in_use):>12} {share:6.1%}  of {mib(entry.size)}"
            )
        lines.append(f"  imports {mib(self.imports)}, peak {mib(self.peak)}")
        if self.needs is not None:
            lines.append(f"  at the start: {self.needs.text}")
        return "\n".join(lines)


def mib(num_bytes: int) -> str:
    """``12.3 MiB``"""
    return f"{num_bytes / MIB:.1f} MiB"
