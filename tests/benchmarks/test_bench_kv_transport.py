"""The benchmark of transports: it measures what it says, and checks the bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import kv_transport


@pytest.mark.parametrize("num_blocks", [1, 4, 512])
def test_scattered_blocks_have_no_neighbours(num_blocks: int) -> None:
    pairs = kv_transport.pairs_of("scattered", num_blocks, 2 * num_blocks)
    for side in zip(*pairs, strict=True):
        assert len(set(side)) == num_blocks
        assert all(0 <= block < 2 * num_blocks for block in side)
        assert not any(block + 1 in side for block in side)


def test_every_way_moves_the_right_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kv_transport.certificates(tmp_path)
    lines = kv_transport.measure(tmp_path, None, [16 << 10], repetitions=1)
    assert [line["pattern"] for line in lines] == list(kv_transport.PATTERNS)
    for line in lines:
        assert set(line["bytes_per_s"]) == {"copy", "shm", "tcp", "tcp_tls"}
        assert all(rate > 0 for rate in line["bytes_per_s"].values())
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(lines)
    width = kv_transport.header().splitlines()[0].count("|")
    assert all(line.count("|") == width for line in printed)
