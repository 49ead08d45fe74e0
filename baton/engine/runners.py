"""Which runner an instance's settings ask for. No torch here until a runner is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from baton.core.config import EngineConfig
from baton.core.errors import ConfigError
from baton.engine.checkpoint import Checkpoint
from baton.engine.parallel.mesh import Axes
from baton.engine.plan import Runner

Progress = Callable[[int, int], None]
"""Told while weights load: bytes done, bytes in all."""


def check_ranks(checkpoint: Checkpoint, config: EngineConfig) -> None:
    """Raises ConfigError for a model that cannot be cut so: before any rank is started.

    The same rules as those by which each rank loads its shard (``baton.engine.loader``).
    """
    model, tp = checkpoint.config, config.tp
    widths = {"num_attention_heads": model.num_heads}
    if model.num_kv_heads >= tp:
        widths["num_key_value_heads"] = model.num_kv_heads
    elif tp % model.num_kv_heads:
        raise _cannot(
            checkpoint, f"num_key_value_heads {model.num_kv_heads} cannot be shared by tp={tp}"
        )
    moe = model.moe
    if moe is None or len(moe.layers) < model.num_layers:
        widths["intermediate_size"] = model.intermediate_size
    if moe is not None and moe.shared_intermediate_size is not None:
        widths["intermediate_size of shared experts"] = moe.shared_intermediate_size
    if moe is not None and config.ep == 1:
        widths["moe_intermediate_size"] = moe.intermediate_size
    if moe is not None and config.ep > moe.num_experts:
        raise _cannot(checkpoint, f"{moe.num_experts} experts cannot be shared by ep={config.ep}")
    for what, width in widths.items():
        if width % tp:
            raise _cannot(checkpoint, f"{what} {width} cannot be split over tp={tp}")


def _check_device(config: EngineConfig) -> None:
    if config.device != "cpu":
        from baton.engine.ops.devices import find_device

        find_device(config.device)


def _cannot(checkpoint: Checkpoint, problem: str) -> ConfigError:
    return ConfigError(f"{checkpoint.path}: {problem}; use another number of ranks", param="tp")


class _WarmRunner(Runner[Any, Any], Protocol):
    def warm_up(self) -> None: ...


def make_runner(
    checkpoint: Checkpoint, config: EngineConfig, *, progress: Progress | None = None
) -> Runner[Any, Any]:
    """A runner with its weights loaded, warmed up: for the plans of ``make_engine(config, ...)``.

    It computes in this process, or in one child process for each rank where there are several, and
    has KV memory of its own. Raises ConfigError for what the model cannot do, RankLost for a rank
    that does not start; then nothing is left behind. ``progress`` is not told of ranks.
    """
    # Imported here: importing torch takes longer than finding most mistakes, and drivers of ranks
    # do without it.
    check_ranks(checkpoint, config)
    _check_device(config)
    if Axes(config.tp, config.ep, config.dp).world_size > 1:
        from baton.engine.parallel.launch import ProcessLauncher
        from baton.engine.parallel.runner import make_ranked_runner

        return _warm(make_ranked_runner(checkpoint, config, launcher=ProcessLauncher()))
    from baton.engine.runner import InlineRunner

    return _warm(InlineRunner(checkpoint, config, progress=progress))


def _warm(runner: _WarmRunner) -> Runner[Any, Any]:
    try:
        runner.warm_up()
    except BaseException:
        runner.close()
        raise
    return runner
