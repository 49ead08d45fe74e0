"""Same tokens: disaggregated, mixed, and `transformers` (the short form of acceptance 2.2)."""

from __future__ import annotations

from tests.cluster import oracle, tokens
from tests.cluster.harness import Cluster, assert_nothing_held, metrics, serving

PROMPTS = 16
TOKENS = 48


def test_disaggregated_equals_the_oracle_and_mixed(pair: Cluster) -> None:
    prompts = oracle.prompts(PROMPTS, longest=1200)
    greedy = tokens.run_greedy(pair, prompts, num_tokens=TOKENS, concurrency=16)
    tokens.check_greedy(prompts, greedy)
    sampled = tokens.run_sampled(pair, prompts, num_tokens=TOKENS, concurrency=16)
    tokens.check_sampled(prompts, sampled)
    again = tokens.run_sampled(pair, prompts, num_tokens=TOKENS, concurrency=5)
    assert len(tokens.same_draws(prompts, sampled, again)) <= oracle.MAX_TIES

    # They really were disaggregated: every request's KV was handed over, none recomputed.
    decode = next(i for i in pair.live_instances() if i.role == "decode")
    values = metrics(decode.metrics_address)
    assert values["baton_handoffs_total{result=arrived,side=decode}"] == 3 * PROMPTS
    assert values["baton_handoffs_total{result=recomputed,side=decode}"] == 0
    assert values["baton_kv_pulled_bytes_total"] > 0
    assert_nothing_held(pair, within_s=5.0)

    with serving("--prefill", "0", "--decode", "0", "--mixed", "1") as mixed:
        tokens.check_greedy(
            prompts, tokens.run_greedy(mixed, prompts, num_tokens=TOKENS, concurrency=16)
        )
        alone = tokens.run_sampled(mixed, prompts, num_tokens=TOKENS, concurrency=16)
        assert len(tokens.same_draws(prompts, sampled, alone)) <= oracle.MAX_TIES
        assert_nothing_held(mixed, within_s=5.0)


def test_prefixes_are_reused(pair: Cluster) -> None:
    prompt = oracle.corpus()[5000:5400]
    first = tokens.run_greedy(pair, [prompt], num_tokens=8, concurrency=1)
    prefill = next(i for i in pair.live_instances() if i.role == "prefill")
    before = metrics(prefill.metrics_address)["baton_cached_tokens_total"]
    second = tokens.run_greedy(pair, [prompt], num_tokens=8, concurrency=1)
    after = metrics(prefill.metrics_address)["baton_cached_tokens_total"]
    assert second == first
    assert after - before == 384  # all full blocks of 16 but the one that holds the last token
