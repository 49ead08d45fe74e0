"""Online and offline work on one engine: who goes first, who gives way, and what becomes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from baton.core.config import EngineConfig
from baton.core.cost_model import CostModel, LinkCosts, StepCosts
from baton.core.request import Part, SamplingParams, Submission
from baton.core.slo import Slo
from baton.engine.compact import CompactEngine
from baton.engine.engine import Engine
from baton.engine.events import Event, Preempted, PrefixComplete, Reserved, TokensReady
from baton.engine.plan import shape_of
from baton.engine.states import SequenceState
from tests.engine.simulated_runner import SimulatedRunner, generate

CONFIG = EngineConfig(
    block_size=4,
    num_blocks=100,
    max_num_seqs=4,
    max_num_batched_tokens=16,
    async_scheduling=False,
)
# A step of one decode takes 6 ms, and of each more 1 ms more; a prompt token takes 1 ms.
COSTS = CostModel(
    prefill=StepCosts(0.005, 0.001, 0.0),
    decode=StepCosts(0.005, 0.001, 0.0),
    handoff=LinkCosts(0.0, 1.0),
    kv_bytes_per_token=1.0,
)
RUNNING, WAITING = SequenceState.RUNNING, SequenceState.WAITING


class Bench:
    """An engine with a runner, and what each step computed of whom."""

    def __init__(self, costs: CostModel | None = None, **changes: object) -> None:
        self.config = dataclasses.replace(CONFIG, **changes)  # type: ignore[arg-type]
        self.engine = Engine(self.config, max_model_len=400, salt=b"s", track_cache=True)
        self.engine.set_cost_model(costs)
        self.runner = SimulatedRunner(self.config.block_size)
        self.now = 0.0
        self.events: list[Event] = []

    def add(
        self,
        name: str,
        num_tokens: int,
        *,
        priority: int = 0,
        part: Part = Part.WHOLE,
        max_tokens: int = 50,
        rise_after_s: float | None = None,
        slo: Slo | None = None,
    ) -> Submission:
        submission = Submission(
            request_id=name,
            attempt=0,
            prompt_ids=tuple(ord(name[0]) + i for i in range(num_tokens)),
            sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens),
            priority=priority,
            rise_after_s=rise_after_s,
            slo=slo or Slo(),
        )
        self.engine.submit(submission, part, self.now)
        return submission

    def step(self) -> dict[str, int]:
        """Tokens of each sequence in the step."""
        self.events += self.engine.admit(self.now)
        plan = self.engine.schedule(self.now)
        assert plan is not None
        planned = self.engine._scheduler._plans[0][1]
        rows = {row.sequence.request_id: row.step.num_tokens for row in planned}
        self.events += self.engine.commit(plan, self.runner.execute(plan), self.now)
        self.engine.check_integrity()
        return rows

    def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(500):
            if condition():
                return
            self.step()
        raise AssertionError("it does not come true")

    def state(self, name: str) -> SequenceState | None:
        return self.engine.state_of(name)

    def tokens(self, name: str) -> list[int]:
        ready = [e for e in self.events if isinstance(e, TokensReady) and e.request_id == name]
        return [token for event in ready for token in event.token_ids]


def test_an_offline_prefill_stops_between_chunks_and_keeps_its_blocks() -> None:
    bench = Bench()
    bench.add("batch", 60, priority=-1)
    assert bench.step() == {"batch": 16}
    bench.add("online", 20)
    assert bench.step() == {"online": 16}
    assert bench.state("batch") is RUNNING
    assert bench.step() == {"online": 4, "batch": 12}
    assert not any(isinstance(event, Preempted) for event in bench.events)


def test_a_chunk_of_higher_priority_goes_first_among_online_ones_too() -> None:
    bench = Bench()
    bench.add("plain", 40)
    assert bench.step() == {"plain": 16}
    bench.add("urgent", 20, priority=1)
    assert bench.step() == {"urgent": 16}


def test_offline_decodes_give_up_their_slots_at_once() -> None:
    bench = Bench()
    names = ["a", "b", "c", "d"]
    for name in names:
        bench.add(name, 4, priority=-1)
    bench.step()
    assert bench.step() == dict.fromkeys(names, 1)
    bench.add("online", 5)
    assert bench.step() == {"a": 1, "b": 1, "c": 1, "online": 5}
    assert bench.state("d") is WAITING
    assert Preempted("d") in bench.events


def test_slots_are_not_taken_for_online_work_that_cannot_begin_all_the_same() -> None:
    bench = Bench(num_blocks=12)
    bench.add("old", 24, max_tokens=20)
    bench.until(lambda: len(bench.tokens("old")) == 2)
    bench.add("a", 4, priority=-1)
    bench.step()
    bench.add("large", 32)
    bench.step()
    assert (bench.state("a"), bench.state("large")) == (RUNNING, WAITING)


def test_offline_blocks_go_to_online_work_and_nothing_is_lost() -> None:
    bench = Bench(num_blocks=16, max_num_batched_tokens=64)
    wanted = [bench.add(name, 12, priority=-1, max_tokens=20) for name in "abc"]
    bench.step()
    wanted.append(bench.add("online", 32, max_tokens=4))
    assert "online" in bench.step()
    assert RUNNING not in (bench.state("b"), bench.state("c"))
    bench.until(lambda: not bench.engine.request_ids())
    for item in wanted:
        assert bench.tokens(item.request_id) == generate(item, 400)[0]
    assert bench.engine.block_statistics().num_referenced == 0


def test_what_a_preempted_sequence_leaves_is_offered_and_found_again() -> None:
    bench = Bench(num_blocks=16, max_num_batched_tokens=64)
    bench.add("a", 12, priority=-1)
    bench.until(lambda: len(bench.tokens("a")) == 6)
    bench.add("online", 48, max_tokens=1)
    bench.until(lambda: bench.state("online") is None)
    (offer,) = [e for e in bench.events if isinstance(e, PrefixComplete) and e.request_id == "a"]
    assert len(offer.keys) == 4, "16 of its 17 tokens; those that it drew too"
    assert offer.priority == -1
    bench.until(lambda: len(bench.tokens("a")) == 8)


def test_offline_work_offers_its_blocks_as_it_goes() -> None:
    bench = Bench()
    bench.add("a", 4, priority=-1, max_tokens=80)
    bench.add("online", 4, max_tokens=80)
    bench.until(lambda: len(bench.tokens("a")) == 70)
    offers = [event for event in bench.events if isinstance(event, PrefixComplete)]
    assert {offer.request_id for offer in offers} == {"a"}
    assert [len(offer.keys) for offer in offers] == [8, 16]


def test_a_handoff_gets_the_blocks_of_offline_decodes() -> None:
    bench = Bench(num_blocks=12, max_num_batched_tokens=64)
    bench.add("a", 16, priority=-1)
    bench.add("b", 16, priority=-1)
    bench.step()
    bench.add("online", 20, part=Part.DECODE)
    events = bench.engine.admit(0.0)
    assert any(isinstance(e, Reserved) and e.request_id == "online" for e in events)
    assert (bench.state("a"), bench.state("b")) == (RUNNING, WAITING)


@pytest.mark.parametrize("priority", [0, 1])
def test_work_of_any_online_priority_is_not_preempted_for_other_work(priority: int) -> None:
    bench = Bench(num_blocks=12, max_num_batched_tokens=64)
    bench.add("a", 16)
    bench.add("b", 16)
    bench.step()
    bench.add("online", 20, priority=priority)
    bench.step()
    assert [bench.state(name) for name in ("a", "b", "online")] == [RUNNING, RUNNING, WAITING]


def test_offline_work_rises_in_time() -> None:
    bench = Bench(max_num_seqs=1)
    bench.add("batch", 4, priority=-1, rise_after_s=10.0, max_tokens=3)
    wanted = bench.add("late", 4, priority=-1, max_tokens=3)
    for number in range(20):
        bench.add(f"online{number}", 4, max_tokens=3)
    for _ in range(9):
        bench.step()
    assert bench.state("batch") is WAITING
    bench.now = 10.0
    bench.until(lambda: bench.state("batch") is None)
    assert bench.state("online19") is WAITING
    assert bench.state("late") is WAITING
    bench.until(lambda: not bench.engine.request_ids())
    assert bench.tokens("late") == generate(wanted, 400)[0]


def test_a_running_sequence_that_has_risen_is_not_preempted() -> None:
    bench = Bench(max_num_seqs=1)
    bench.add("batch", 4, priority=-1, rise_after_s=10.0)
    bench.step()
    bench.now = 10.0
    bench.step()
    bench.add("online", 4)
    bench.step()
    assert (bench.state("batch"), bench.state("online")) == (RUNNING, WAITING)
    bench.engine.abort("batch")
    assert bench.step() == {"online": 4}


def test_chunks_leave_decodes_within_the_tightest_target() -> None:
    bench = Bench(COSTS, max_num_batched_tokens=64)
    bench.add("tight", 4, slo=Slo(tpot_s=0.05))
    bench.add("loose", 4, slo=Slo(tpot_s=1.0))
    bench.step()
    bench.add("long", 200)
    # 0.8 x 50 ms, less 5 ms of overhead and 2 ms of two decodes.
    assert bench.step() == {"tight": 1, "loose": 1, "long": 33}
    bench.engine.abort("tight")
    assert bench.step() == {"loose": 1, "long": 63}
    bench.engine.set_cost_model(None)
    bench.add("tighter", 1, slo=Slo(tpot_s=0.001), priority=1)
    bench.step()
    assert bench.step()["long"] > 33, "no limit without a cost model"


def test_prompts_progress_also_where_targets_are_missed_anyway() -> None:
    bench = Bench(COSTS, max_num_batched_tokens=64)
    bench.add("tight", 4, slo=Slo(tpot_s=0.001))
    bench.step()
    bench.add("long", 200)
    assert bench.step() == {"tight": 1, "long": 16}


def test_offline_chunks_take_no_time_of_online_decodes() -> None:
    bench = Bench(COSTS, max_num_batched_tokens=64)
    bench.add("tight", 4, slo=Slo(tpot_s=0.008), max_tokens=3)
    bench.step()
    bench.add("batch", 200, priority=-1)
    assert bench.step() == {"tight": 1}
    bench.until(lambda: bench.state("tight") is None)
    assert bench.step() == {"batch": 64}


def test_offline_chunks_are_short_where_somebody_may_come_who_is_in_a_hurry() -> None:
    bench = Bench(COSTS, max_num_batched_tokens=64)
    bench.add("online", 4, slo=Slo(ttft_s=0.305), max_tokens=1)
    bench.step()
    bench.add("batch", 200, priority=-1)
    assert bench.step() == {"batch": 25}
    bench.add("online", 4, slo=Slo(ttft_s=0.305), max_tokens=1)
    assert bench.step() == {"online": 4, "batch": 21}


def test_offline_decodes_stop_where_online_ones_would_miss_their_target() -> None:
    bench = Bench(COSTS, max_num_seqs=16, max_num_batched_tokens=64)
    for number in range(12):
        bench.add(f"batch{number}", 4, priority=-1)
    bench.step()
    assert len(bench.step()) == 12
    # 0.8 x 16.25 ms: 5 ms of overhead, and 8 decodes.
    bench.add("online", 4, slo=Slo(tpot_s=0.01625))
    bench.step()
    assert len(bench.step()) == 8
    assert bench.state("batch6") is RUNNING
    assert bench.state("batch7") is WAITING
    bench.engine.abort("online")
    bench.until(lambda: all(bench.state(f"batch{i}") is not WAITING for i in range(12)))


def test_offline_decodes_do_not_come_and_go() -> None:
    bench = Bench(COSTS, max_num_seqs=16, max_num_batched_tokens=64)
    bench.add("online", 4, slo=Slo(tpot_s=0.01625), max_tokens=40)
    for number in range(12):
        bench.add(f"batch{number}", 4, priority=-1, max_tokens=300)
    for _ in range(39):
        bench.step()
    assert not any(isinstance(event, Preempted) for event in bench.events)
    assert len(bench.step()) == 6, "0.7 x 16.25 ms bear 6 decodes"


def test_a_load_tells_of_decodes_and_of_offline_work() -> None:
    bench = Bench(max_num_batched_tokens=12)
    bench.add("online", 8)
    bench.add("batch", 3, priority=-1)
    bench.step()
    bench.add("waits", 30, priority=-1)
    bench.add("new", 30)
    load = bench.engine.load()
    assert (load.num_decoding, load.num_context_tokens) == (2, 11)
    assert (load.num_offline_decoding, load.num_offline_context_tokens) == (1, 3)
    assert (load.num_waiting_tokens, load.num_offline_waiting_tokens) == (60, 30)


def test_an_offline_flood_does_not_move_online_work() -> None:
    """Step for step, where time is no matter: neither memory nor slots are waited for."""
    alone, flooded = (
        CompactEngine(
            dataclasses.replace(CONFIG, max_num_batched_tokens=64),
            max_model_len=200,
            salt=b"s",
        )
        for _ in range(2)
    )
    names = [f"online{number}" for number in range(30)]
    told: list[list[tuple[int, str]]] = []
    for engine in (alone, flooded):
        ends: list[tuple[int, str]] = []
        for step in range(200):
            if step % 5 == 0 and step // 5 < len(names):
                name = names[step // 5]
                prompt = tuple(range(step % 31 + 1))
                sampling = SamplingParams(temperature=0.0, max_tokens=step % 17 + 2)
                engine.submit(Submission(name, 0, prompt, sampling), Part.WHOLE, 0.0)
            if engine is flooded:
                sampling = SamplingParams(temperature=0.0, max_tokens=50)
                item = Submission(f"b{step}", 0, tuple(range(20)), sampling, priority=-1)
                engine.submit(item, Part.WHOLE, 0.0)
            engine.admit(0.0)
            if engine.step_shape(0.0) is None:
                continue
            for event in engine.finish_step(0.0):
                if not isinstance(event, TokensReady) or event.request_id not in names:
                    continue
                if event.index == 0 or event.finish_reason is not None:
                    ends.append((step, event.request_id))
        told.append(ends)
    assert len(told[0]) >= 50
    assert told[0] == told[1]
    assert flooded.load().num_finished > alone.load().num_finished + 5


def test_shapes_of_plans_are_those_that_limits_went_by() -> None:
    bench = Bench(COSTS, max_num_batched_tokens=64)
    bench.add("tight", 4, slo=Slo(tpot_s=0.05))
    bench.step()
    bench.add("long", 200)
    plan = bench.engine.schedule(0.0)
    assert plan is not None
    assert COSTS.step_s(shape_of(plan)) <= 0.8 * 0.05
