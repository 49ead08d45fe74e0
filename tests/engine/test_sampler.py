"""The sampler, against a slow and obvious float64 implementation."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.philox import uniforms
from baton.core.request import SamplingParams
from baton.engine.plan import SlotBegin
from baton.engine.sampler import apply_penalties, choose, sample, token_logprobs
from baton.engine.slot_state import SamplingColumns, SlotState

CPU = torch.device("cpu")
EPS = 5e-6


def penalised(
    logits: npt.NDArray[np.float32],
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
) -> npt.NDArray[np.float64]:
    """Float32 steps: what follows must see the same ties as the sampler does."""
    result = logits.copy()
    repetition, frequency, presence = map(
        np.float32,
        (params.repetition_penalty, params.frequency_penalty, params.presence_penalty),
    )
    for token in set(prompt) | set(output):
        if result[token] > 0:
            result[token] /= repetition
        else:
            result[token] *= repetition
    for token, count in Counter(output).items():
        result[token] -= frequency * np.float32(count)
        result[token] -= presence
    return result.astype(np.float64)


def reference(
    logits: npt.NDArray[np.float64],
    params: SamplingParams,
    uniform: float,
    *,
    top_p: float,
    min_p: float,
) -> set[int]:
    """One row's token, or its neighbours where rounding decides. ``logits`` after penalties."""
    if params.temperature == 0:
        return {int(np.argmax(logits))}
    scaled = (logits - logits.max()) / max(params.temperature, 1e-6)
    kept = set(range(len(scaled)))
    if params.top_k is not None and params.top_k < len(scaled):
        kth = sorted(scaled, reverse=True)[params.top_k - 1]
        kept = {token for token in kept if scaled[token] >= kth}
    if params.top_p < 1:
        total = math.fsum(math.exp(scaled[token]) for token in kept)
        mass, last = 0.0, 0.0
        for token in sorted(kept, key=lambda token: -scaled[token]):
            if mass >= top_p * total:
                break
            mass += math.exp(scaled[token])
            last = scaled[token]
        kept = {token for token in kept if scaled[token] >= last}
    if params.min_p > 0:
        kept = {token for token in kept if math.exp(scaled[token]) >= min_p}
    order = sorted(kept)
    cdf = np.cumsum([math.exp(scaled[token]) for token in order])
    low, high = np.searchsorted(cdf / cdf[-1], (uniform - EPS, uniform + EPS), side="right")
    return set(order[low : high + 1])


def acceptable(logits: npt.NDArray[np.float64], params: SamplingParams, uniform: float) -> set[int]:
    """The reference's answers where rounding may tip a comparison either way."""
    shifts = (-EPS, 0.0, EPS)
    return {
        token
        for p_shift, min_shift in itertools.product(shifts, shifts)
        for token in reference(
            logits,
            params,
            uniform,
            top_p=max(params.top_p + p_shift, 1e-12),
            min_p=min(params.min_p * (1 + min_shift), 1.0),
        )
    }


@st.composite
def params_of_rows(draw: st.DrawFn) -> SamplingParams:
    def maybe(strategy: st.SearchStrategy[Any], neutral: Any) -> Any:
        return draw(st.one_of(st.just(neutral), strategy))

    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 1e-8, 0.05, 0.5, 1.0, 2.0])),
        top_k=maybe(st.sampled_from([1, 2, 7, 50, 300, 10**6]), None),
        top_p=maybe(st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999]), 1.0),
        min_p=maybe(st.sampled_from([0.01, 0.3, 1.0]), 0.0),
        repetition_penalty=maybe(st.sampled_from([0.5, 1.3, 2.0]), 1.0),
        presence_penalty=maybe(st.sampled_from([-2.0, 0.7, 2.0]), 0.0),
        frequency_penalty=maybe(st.sampled_from([-1.0, 0.4, 2.0]), 0.0),
    )


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(params_of_rows(), min_size=1, max_size=6),
    vocab_size=st.sampled_from([2, 11, 300, 700]),
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([0.01, 1.0, 4.0, 30.0]),
    ties=st.booleans(),
)
def test_against_reference(
    rows: list[SamplingParams], vocab_size: int, seed: int, scale: float, ties: bool
) -> None:
    rng = np.random.default_rng(seed)
    state = SlotState(2, vocab_size, CPU)
    slots = rng.permutation(len(rows) + 3)[: len(rows)]
    logits = (rng.standard_normal((len(rows), vocab_size)) * scale).astype(np.float32)
    if ties:
        logits = np.round(logits)
    draws = np.where(rng.random(len(rows)) < 0.2, 1 - 2.0**-53, rng.random(len(rows)))
    expected = []
    for row, params in enumerate(rows):
        prompt = tuple(rng.integers(0, vocab_size, 9).tolist())
        output = tuple(rng.integers(0, vocab_size, int(rng.integers(0, 9))).tolist())
        state.begin(SlotBegin(int(slots[row]), params, prompt, output))
        changed = penalised(logits[row], params, prompt, output)
        expected.append(acceptable(changed, params, draws[row]))
    before = torch.from_numpy(logits.copy())
    tokens = sample(torch.from_numpy(logits), slots, draws, state).tolist()
    assert torch.equal(before, torch.from_numpy(logits))
    for row, (token, allowed) in enumerate(zip(tokens, expected, strict=True)):
        assert token in allowed, (row, rows[row])


def draw_one(logits: list[float], uniform: float, **params: Any) -> int:
    columns = SamplingColumns.of([SamplingParams(**params)], len(logits))
    return int(choose(torch.tensor([logits]), columns, np.array([uniform])))


INF = float("inf")


@pytest.mark.parametrize("penalty", [1e-46, 1e-39, 1e-10])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_absurd_penalty_does_not_fail_the_step(penalty: float, temperature: float) -> None:
    """It used to make NaN of its row, and an index out of bounds of everybody's step."""
    params = SamplingParams(
        temperature=temperature, repetition_penalty=penalty, frequency_penalty=2.0, top_p=0.9
    )
    columns = SamplingColumns.of([params], 8)
    logits = torch.tensor([[3.0, -2.0, 0.0, 1.0, -INF, 5.0, 2.0, 1.0]])
    counts = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    penalized = apply_penalties(logits, counts, counts > 0, columns)
    assert bool(torch.isfinite(penalized).all())
    token = choose(penalized, columns, np.array([0.5]))
    assert 0 <= int(token[0]) < 8


def test_a_row_of_nan_does_not_fail_the_others() -> None:
    columns = SamplingColumns.of([SamplingParams(), SamplingParams()], 4)
    logits = torch.tensor([[float("nan")] * 4, [0.0, 50.0, 0.0, 0.0]])
    assert int(choose(logits, columns, np.array([0.5, 0.5]))[1]) == 1


@pytest.mark.parametrize("uniform", [0.0, 0.3, 1 - 1e-7, 1 - 2.0**-53])
def test_never_an_impossible_token(uniform: float) -> None:
    assert draw_one([-INF, 1.0, -INF, -INF], uniform) == 1
    assert draw_one([-INF, -2000.0, 0.0, -2000.0], uniform) == 2
    assert draw_one([5.0, 4.9, 4.8, 4.7], uniform, top_k=1) == 0
    assert draw_one([5.0, 4.9, 4.8, 4.7], uniform, top_p=1e-9) == 0
    assert draw_one([1.0, 4.9, 4.8, 4.7], uniform, min_p=1.0) == 1
    assert draw_one([1.0, 4.9, 4.8999, 4.7], uniform, temperature=1e-30) == 1
    assert draw_one([1e30, -1e30, 3e38, -3e38], uniform, temperature=2.0) == 2


def test_draw_at_the_very_end_is_possible_everywhere() -> None:
    """Many shapes of distribution, whose sums round in all ways."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.standard_normal((500, 997)).astype(np.float32) * 20)
    logits[:, 900:] = -INF
    logits[rng.random((500, 997)) < 0.5] = -INF
    logits[:, 5] = 0.0
    columns = SamplingColumns.of([SamplingParams()] * 500, 997)
    tokens = choose(logits, columns, np.full(500, 1 - 2.0**-53))
    assert torch.isfinite(logits.gather(1, tokens.unsqueeze(1))).all()


def test_ties_are_kept_or_dropped_together() -> None:
    logits = [1.0, 3.0, 2.0, 2.0, 2.0, 0.0]
    grid = np.linspace(0, 0.9999, 200)
    assert {draw_one(logits, u, top_k=2) for u in grid} == {1, 2, 3, 4}
    # 1 holds 0.41; one of the equals is needed to reach a half, so all of them stay.
    assert {draw_one(logits, u, top_p=0.5) for u in grid} == {1, 2, 3, 4}
    assert {draw_one(logits, u, top_p=0.3) for u in grid} == {1}
    assert [draw_one([7.0, 9.0, 9.0], 0.9, temperature=0.0)] == [1]


def test_flat_distribution_needs_all_candidates() -> None:
    """Top-p over more tokens than are sorted at first."""
    logits = torch.linspace(0, 0.1, 5000).unsqueeze(0)
    columns = SamplingColumns.of([SamplingParams(top_p=0.5)], 5000)
    draws = [int(choose(logits, columns, np.array([u]))) for u in (0.0, 0.5, 0.9999)]
    probs = np.exp(np.linspace(0, 0.1, 5000))
    lowest = 5000 - int(np.searchsorted(np.cumsum(probs[::-1]), 0.5 * probs.sum())) - 1
    assert draws[0] == pytest.approx(lowest, abs=2)
    assert draws[2] == pytest.approx(4999, abs=2)
    assert lowest < draws[1] < 4999


def test_draw_follows_the_distribution() -> None:
    """Chi-square over 40,000 draws with consecutive positions of one seed."""
    count = 40_000
    logits = torch.tensor([2.0, 0.0, 1.5, -1.0, 1.0, 0.5, -2.0, 1.9])
    draws = uniforms(np.full(count, 7), np.zeros(count), np.arange(count))
    columns = SamplingColumns.of([SamplingParams(temperature=1.3, top_k=7)] * count, 8)
    tokens = choose(logits.expand(count, -1), columns, draws)
    observed = tokens.bincount(minlength=8).double()
    kept = torch.cat((logits[:6], torch.tensor([-INF]), logits[7:])).double()
    expected = torch.softmax(kept / 1.3, -1) * count
    assert observed[6] == 0
    present = expected > 0
    chi_square = ((observed - expected)[present] ** 2 / expected[present]).sum().item()
    assert chi_square < 22.5, "6 degrees of freedom: 0.1 % of true samplers exceed this"


def test_rows_do_not_influence_each_other() -> None:
    rng = np.random.default_rng(3)
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(),
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.7, temperature=0.4),
        SamplingParams(min_p=0.2),
    ]
    logits = torch.from_numpy(rng.standard_normal((5, 400)).astype(np.float32) * 3)
    draws = rng.random(5)
    together = choose(logits, SamplingColumns.of(params, 400), draws).tolist()
    alone = [
        int(choose(logits[i : i + 1], SamplingColumns.of([params[i]], 400), draws[i : i + 1]))
        for i in range(5)
    ]
    assert together == alone


def test_slot_state_counts_what_is_sampled() -> None:
    state = SlotState(1, 5, CPU)
    penalty = SamplingParams(presence_penalty=1.0)
    state.begin(SlotBegin(0, SamplingParams(), (1,), ()))
    state.begin(SlotBegin(3, penalty, (1, 1), (2, 2, 4)))
    state.begin(SlotBegin(1, penalty, (0,), ()))
    slots = np.array([3, 0])
    state.record(slots, torch.tensor([4, 1]))
    state.record(slots, torch.tensor([0, 2]))
    counts, prompt_seen = state.history(torch.tensor([3, 1]))
    assert counts.tolist() == [[1, 0, 2, 0, 2], [0, 0, 0, 0, 0]]
    assert prompt_seen.tolist() == [[False, True, False, False, False], [True] + [False] * 4]
    assert state.last_token[[3, 0]].tolist() == [0, 2]
    state.begin(SlotBegin(3, penalty, (2,), (1,)))
    state.begin(SlotBegin(20, SamplingParams(), (2,), ()))
    counts, prompt_seen = state.history(torch.tensor([3]))
    assert counts.tolist() == [[0, 1, 0, 0, 0]]
    assert prompt_seen.tolist() == [[False, False, True, False, False]]
    assert state.last_token[[3, 0]].tolist() == [0, 2]


def test_slots_without_penalties_need_no_counts() -> None:
    """The [slots, vocab] buffers of such a vocabulary could not be allocated."""
    state = SlotState(64, 2**50, CPU)
    state.begin(SlotBegin(5, SamplingParams(), (1,), ()))
    state.record(np.array([5]), torch.tensor([9]))
    assert state.last_token[5] == 9


def test_token_logprobs() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, -1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    first, second = token_logprobs(logits, torch.tensor([3, 4]), [3, 0])
    exact = torch.log_softmax(logits[0].double(), -1).tolist()
    assert first.token_id == 3
    assert first.logprob == pytest.approx(exact[3], abs=1e-6)
    assert first.rank == 2
    assert [token for token, _ in first.top] == [1, 2, 3]
    assert [value for _, value in first.top] == pytest.approx([exact[1], exact[2], exact[3]])
    assert (second.rank, second.top) == (1, ())
    assert second.logprob == pytest.approx(-math.log(5))
    (wide,) = token_logprobs(logits[:1], torch.tensor([1]), [20])
    assert [token for token, _ in wide.top] == [1, 2, 3, 0, 4]
