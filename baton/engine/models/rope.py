"""Frequencies of the rotary embedding (arXiv:2104.09864) and of what stretches it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from baton.engine.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, dim: int) -> Tensor:
    """Radians per position of each pair of dims: float32 [dim / 2], on the CPU.

    In the order and precision of ``transformers``: the tables are to be equal, not just near.
    """
    steps = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    periods = rope.theta**steps
    if rope.kind == "linear":
        return 1.0 / periods / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, 1.0 / periods)
    if rope.kind == "yarn":
        return _yarn(rope, periods, dim)
    return 1.0 / periods


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Slow ones are divided by the factor, fast ones stay, those between are blended."""
    low, high = rope.low_freq_factor, rope.high_freq_factor
    assert low is not None
    assert high is not None
    assert rope.original_max_len is not None
    lengths = 2 * math.pi / frequencies
    slow, fast = lengths > rope.original_max_len / low, lengths < rope.original_max_len / high
    stretched = torch.where(slow, frequencies / rope.factor, frequencies)
    share = (rope.original_max_len / lengths - low) / (high - low)
    blended = (1 - share) * stretched / rope.factor + share * stretched
    return torch.where(slow | fast, stretched, blended)


def _yarn(rope: RopeConfig, periods: Tensor, dim: int) -> Tensor:
    """A ramp over the dims, from unscaled to divided by the factor (arXiv:2309.00071)."""
    assert rope.original_max_len is not None

    def place(rotations: float) -> float:
        """The (fractional) pair that turns so often within the original length."""
        assert rope.original_max_len is not None
        turns = rope.original_max_len / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = place(rope.beta_fast), place(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    pairs = torch.arange(dim // 2, dtype=torch.float32)
    unscaled = 1 - ((pairs - low) / (high - low)).clamp(0, 1)
    return 1.0 / (rope.factor * periods) * (1 - unscaled) + 1.0 / periods * unscaled
