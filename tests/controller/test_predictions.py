"""What is predicted of instances and requests, and how far off that was."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from baton.cli import admin
from baton.core.cluster import InstanceLoad, Placement, Role, StepSample, Target
from baton.core.cost_model import CostModel, LinkCosts, StepCosts, StepShape, chunk_context
from controller import wire
from controller.events import AttemptEnded, PlaceQuery, RequestEnded
from controller.prediction_metrics import PredictionCollector
from controller.predictions import Predictions, queue_s, tpot_s, ttft_s
from controller.traces import TraceBook
from kvpool.layout import KVLayout
from tests.controller.controller_helpers import make_info

MODEL = CostModel(
    StepCosts(0.010, 1e-4, 1e-8),
    StepCosts(0.020, 1e-3, 1e-8),
    LinkCosts(1e-3, 1e9),
    1000.0,
    {"host": LinkCosts(1e-3, 1e9), "disk": LinkCosts(0.5, 1e8)},
)
TARGET = Target("i", 1, "i:1")


def load(seed: int, *, slower: float = 1.0, count: int = 40) -> InstanceLoad:
    """Of steps as ``MODEL`` says, some of each kind."""
    chance, found = random.Random(seed), []
    for index in range(count):
        if index % 2:
            num = chance.randint(1, 100)
            shape = StepShape(num_decodes=num, decode_context=num * chance.randint(10, 5000))
        else:
            num, start = chance.randint(20, 2000), chance.randint(0, 20_000)
            shape = StepShape(num, chunk_context(start, num))
        found.append(StepSample(shape, MODEL.step_s(shape) * slower))
    return InstanceLoad(samples=tuple(found))


def close(found: CostModel | None, slower: float) -> bool:
    if found is None:
        return False
    shape = StepShape(num_decodes=10, decode_context=10_000)
    wanted = [MODEL.prefill_s(1000), MODEL.step_s(shape)]
    got = [found.prefill_s(1000), found.step_s(shape)]
    return all(g == pytest.approx(w * slower, rel=0.1) for g, w in zip(got, wanted, strict=True))


def test_without_a_profile_nothing_is_predicted_before_anything_is_measured() -> None:
    predictions = Predictions()
    assert predictions.model("a") is None
    predictions.join(make_info("a"))
    assert predictions.model("a") is None
    predictions.observe("a", Role.MIXED, InstanceLoad())
    assert predictions.model("a") is None
    for seed in range(4):
        assert predictions.observe("a", Role.MIXED, load(seed))
    assert close(predictions.model("a"), 1.0)
    assert not predictions.observe("a", Role.MIXED, InstanceLoad()), "nothing new"


def test_who_measured_nothing_yet_costs_what_a_peer_does() -> None:
    """Else it would seem to cost nothing, and draw everything."""
    predictions = Predictions()
    for name in ("a", "b"):
        predictions.join(make_info(name))
    predictions.join(make_info("other", fingerprint="of another model"))
    for seed in range(4):
        predictions.observe("a", Role.MIXED, load(seed))
    assert predictions.observe("b", Role.MIXED, InstanceLoad()), "there is something by now"
    assert close(predictions.model("b"), 1.0)
    assert predictions.model("other") is None
    predictions.forget("a")
    assert predictions.model("b") is None
    for seed in range(4):
        predictions.observe("b", Role.MIXED, load(seed, slower=3.0))
    assert close(predictions.model("b"), 3.0), "but it learns from its own steps alone"


def test_a_profile_is_what_instances_start_from_and_leave() -> None:
    predictions = Predictions(MODEL)
    assert predictions.model("stranger") is MODEL
    predictions.join(make_info("a"))
    assert close(predictions.model("a"), 1.0)
    for seed in range(6):
        predictions.observe("a", Role.MIXED, load(seed, slower=3.0))
    found = predictions.model("a")
    assert close(found, 3.0)
    assert found is not None
    assert (found.tiers, found.handoff) == (MODEL.tiers, MODEL.handoff)


def test_who_did_not_join_teaches_nothing() -> None:
    predictions = Predictions(MODEL)
    assert not predictions.observe("a", Role.MIXED, load(1, slower=9.0))
    assert predictions.model("a") is MODEL
    assert predictions.errors() == {}


@pytest.mark.parametrize("leaves_first", [True, False])
def test_a_new_instance_starts_from_its_peers(leaves_first: bool) -> None:
    predictions = Predictions(MODEL)
    predictions.join(make_info("a"))
    for seed in range(6):
        predictions.observe("a", Role.MIXED, load(seed, slower=3.0))
    if leaves_first:
        predictions.forget("a")
        predictions.forget("a")
    predictions.join(make_info("b"))
    predictions.join(make_info("other", fingerprint="of another model"))
    assert close(predictions.model("b"), 3.0)
    assert close(predictions.model("other"), 1.0)


def test_what_a_role_taught_is_there_when_the_instance_takes_it_again() -> None:
    predictions = Predictions(MODEL)
    info = make_info("a", Role.PREFILL)
    predictions.join(info)
    for seed in range(6):
        predictions.observe("a", Role.PREFILL, load(seed, slower=2.0))
    assert predictions.observe("a", Role.MIXED, InstanceLoad()), "another role, another predictor"
    assert close(predictions.model("a"), 2.0), "it starts from what the instance was before"
    for seed in range(6):
        predictions.observe("a", Role.MIXED, load(seed, slower=5.0))
    assert close(predictions.model("a"), 5.0)
    predictions.join(info)
    assert close(predictions.model("a"), 2.0)


def test_blocks_of_an_instance_are_as_large_as_its_layout_says() -> None:
    predictions = Predictions()
    layout = KVLayout("float32", 16, num_layers=2, num_kv_heads=4, head_dim=8, num_shards=2)
    predictions.join(make_info("a", layout=layout.text))
    for seed in range(4):
        predictions.observe("a", Role.MIXED, load(seed))
    found = predictions.model("a")
    assert found is not None
    assert found.kv_bytes_per_token == 2 * 2 * 4 * 8 * 2 * 4


# Requests.


def ended(
    book: TraceBook, query: PlaceQuery, outcome: str = "stop", completion_tokens: int = 10
) -> None:
    book.ended(
        RequestEnded(
            query.request_id,
            outcome,
            completion_tokens=completion_tokens,
            ttft_s=2.0,
            tpot_s=0.1,
            attempts=(AttemptEnded(query.request_id, 0),),
        )
    )


def placed(book: TraceBook, query: PlaceQuery, ttft: float | None, tpot: float | None) -> None:
    placement = Placement(query.request_id, query.attempt, TARGET, TARGET)
    book.placed(query, placement, "why", 1, predicted_ttft_s=ttft, predicted_tpot_s=tpot)


def errors_after(
    ttft: float | None,
    tpot: float | None,
    *,
    num_attempts: int = 1,
    outcome: str = "stop",
    completion_tokens: int = 10,
) -> Mapping[str, float]:
    book, predictions = TraceBook(10), Predictions()
    for attempt in range(num_attempts):
        placed(book, PlaceQuery("r", attempt), ttft, tpot)
    ended(book, PlaceQuery("r"), outcome, completion_tokens)
    predictions.ended(book.get("r"))
    return predictions.errors()


def test_what_came_is_compared_with_what_was_predicted() -> None:
    errors = errors_after(1.0, 0.15)
    assert errors == {"ttft": pytest.approx(0.5), "tpot": pytest.approx(0.5)}
    assert errors_after(1.0, 0.15, completion_tokens=1) == {"ttft": pytest.approx(0.5)}
    assert errors_after(None, None) == {}
    assert errors_after(1.0, 0.1, num_attempts=2) == {}, "a replay has another beginning"
    assert errors_after(1.0, 0.1, outcome="abort") == {}
    Predictions().ended(None)


def test_a_scrape_shows_the_errors_by_kind() -> None:
    predictions, registry, book = Predictions(MODEL), CollectorRegistry(), TraceBook(10)
    registry.register(PredictionCollector(predictions.errors))
    predictions.join(make_info("a"))
    predictions.observe("a", Role.MIXED, load(1))
    placed(book, PlaceQuery("r"), 1.0, 0.1)
    ended(book, PlaceQuery("r"))
    predictions.ended(book.get("r"))
    text = generate_latest(registry).decode()
    for kind in ("ttft", "tpot", "prefill_step", "decode_step"):
        assert f'baton_prediction_error_ratio{{kind="{kind}"}}' in text
    assert predictions.errors_of("a")["prefill_step"] < 0.01
    assert predictions.errors_of("b") == {}


def test_explain_shows_what_was_predicted_beside_what_came() -> None:
    book = TraceBook(10)
    placed(book, PlaceQuery("r"), 1.25, 0.075)
    placed(book, PlaceQuery("q"), None, None)
    for name in ("r", "q"):
        ended(book, PlaceQuery(name))
    trace, other = book.get("r"), book.get("q")
    assert trace is not None
    assert other is not None
    reply = wire.explanation(trace)
    assert reply.attempts[0].predicted_ttft_s == 1.25
    assert reply.attempts[0].predicted_tpot_s == 0.075
    assert admin.predicted_text(reply.attempts[0]) == "; predicted TTFT 1250.0 ms, TPOT 75.00 ms"
    nothing = wire.explanation(other).attempts[0]
    assert not nothing.HasField("predicted_ttft_s")
    assert admin.predicted_text(nothing) == ""


# Formulas.


def test_the_first_token_waits_for_the_queue_and_the_prompt() -> None:
    alone_s = ttft_s(MODEL, 1000, chunk=512)
    assert alone_s == pytest.approx(MODEL.prefill_s(1000, chunk=512))
    waiting_s = queue_s(MODEL, 2048, chunk=512)
    assert waiting_s == pytest.approx(4 * 0.010 + 2048e-4)
    assert ttft_s(MODEL, 1000, chunk=512, queued_s=waiting_s) == pytest.approx(waiting_s + alone_s)
    beside_s = ttft_s(MODEL, 1000, chunk=512, num_decodes=10, decode_context=1000)
    assert beside_s == pytest.approx(alone_s + 2 * (0.010 + 10e-3 + 1000e-8))


def test_a_cached_prefix_counts_as_its_tier_is_fast() -> None:
    device_s = ttft_s(MODEL, 1000, chunk=512, cached={"device": 900})
    assert device_s == pytest.approx(MODEL.prefill_s(1000, 900, chunk=512))
    host_s = ttft_s(MODEL, 1000, chunk=512, cached={"host": 900})
    assert host_s == pytest.approx(device_s + MODEL.fetch_s("host", 900))
    assert ttft_s(MODEL, 1000, chunk=512, cached={"host": 900}, queued_s=1.0) == pytest.approx(
        1.0 + device_s
    ), "it is fetched while others are computed"
    assert ttft_s(MODEL, 1000, chunk=512, cached={"disk": 900}) == pytest.approx(
        MODEL.prefill_s(1000, chunk=512)
    ), "half a second for the disk is more than to compute it"
    assert ttft_s(MODEL, 1000, chunk=512, cached={"device": 5000}) > 0.0


def test_time_per_token_grows_with_what_is_computed_beside_it() -> None:
    alone_s = tpot_s(MODEL, 10, 10_000)
    assert alone_s == pytest.approx(0.020 + 10e-3 + 1e-4)
    beside_s = tpot_s(MODEL, 10, 10_000, prompt_tokens_per_step=100, prompt_context=1000)
    assert beside_s == pytest.approx(alone_s + 100 * (1e-4 + 1e-5))
