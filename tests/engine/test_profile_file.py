"""Profiles as files: what is written can be read, and what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.core.errors import ConfigError
from baton.engine.profile_file import load_profile, save_profile

DERIVED = Path(__file__).parents[2] / "benchmarks/profiles/ascend-910b-qwen2.5-7b.yaml"


def test_the_derived_profile_follows_from_its_data_sheet() -> None:
    profile = load_profile(DERIVED)
    assert profile.source.startswith("derived")
    cost, flops, bandwidth = profile.cost, 313e12 * 0.55, 1.6e12 * 0.7
    assert cost.prefill.item_s == pytest.approx(15.2e9 / flops, rel=1e-4)
    assert cost.prefill.context_s == pytest.approx(4 * 28 * 3584 / flops, rel=1e-4)
    assert cost.decode.overhead_s == pytest.approx(0.005 + 15.2e9 / bandwidth, rel=1e-4)
    assert cost.decode.context_s == pytest.approx(57344 / bandwidth, rel=1e-4)
    assert profile.kv_capacity_tokens == int((64e9 * 0.9 - 15.2e9) / 57344)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    profile = load_profile(DERIVED)
    save_profile(profile, tmp_path / "p.yaml", ("how it was made",))
    assert load_profile(tmp_path / "p.yaml") == profile
    assert (tmp_path / "p.yaml").read_text().startswith("# how it was made\n")


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("decode:", "decoding:", "lacks decode"),
        ("kv_bytes_per_token: 57344", "kv_bytes_per_token: much", "kv_bytes_per_token: 'much'"),
        ("max_num_seqs: 512", "max_num_seqs: 0.5", "max_num_seqs: 0.5"),
        ("max_num_seqs: 512", "max_num_seqs: 5120", "max_num_batched_tokens"),
        ("item_s: 0.0 ", "item_s: -1.0 ", "item_s must not be negative"),
        ("bytes_per_s: 3.0e+9", "bytes_per_s: 0", "bytes_per_s > 0"),
        ("  host:", "  tape:", "'tape' in tiers"),
        ("name: ascend", "name: [ascend", "not valid YAML"),
        ("block_size: 128", "block_size: true", "block_size: True"),
    ],
)
def test_a_wrong_profile_is_refused_by_name(tmp_path: Path, old: str, new: str, named: str) -> None:
    text = DERIVED.read_text()
    assert old in text
    (tmp_path / "p.yaml").write_text(text.replace(old, new))
    with pytest.raises(ConfigError) as refused:
        load_profile(tmp_path / "p.yaml")
    assert named in refused.value.message
    assert "p.yaml" in refused.value.message


def test_numbers_may_be_written_as_people_write_them(tmp_path: Path) -> None:
    text = DERIVED.read_text().replace("item_s: 8.8295e-05", "item_s: 1e-4")
    (tmp_path / "p.yaml").write_text(text)
    assert load_profile(tmp_path / "p.yaml").cost.prefill.item_s == 1e-4


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        load_profile(tmp_path / "nowhere.yaml")
